//! Training of all parameters.

use crate::common::*;
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::ops::AdamWStep;
use gradtx_models::decoder::{Decoder, Family, FullTrainer, InitialWeights, PretrainStep};
use gradtx_runtime::optim::MuonStep;

fn step(step: u32, muon: bool) -> PretrainStep {
    let adamw = AdamWStep { lr: 5e-3, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.01, step };
    let muon = muon.then_some(MuonStep { lr: 0.02, momentum: 0.95, weight_decay: 0.01, step });
    PretrainStep { adamw, max_norm: Some(1.0), muon }
}

fn losses(muon: bool, steps: u32) -> Vec<f64> {
    let config = config(Family::Qwen2, false);
    let cpu = Cpu::new(2);
    let initial = InitialWeights { embedding: 1.0, head: 0.1, matrices: None };
    let mut model = Decoder::<Cpu, f32>::random(&cpu, &config, &initial, 4).unwrap();
    let batch = batch(&config, &[12, 7, 9], &[0; 3], 3);
    let scale = 1.0 / batch.weights.iter().sum::<f64>();
    let mut trainer = FullTrainer::new(&model, muon, capacity(&batch)).unwrap();
    let run = |t| scale * trainer.train_step(&mut model, &batch, step(t, muon)).unwrap().0;
    (1..=steps).map(run).collect()
}

#[test]
fn both_optimizers_learn_a_stream_by_heart() {
    for muon in [false, true] {
        let losses = losses(muon, 40);
        assert!(losses[0] > 2.5 && losses[39] < 0.5, "muon {muon}: {losses:?}");
    }
}

#[test]
fn the_same_steps_give_the_same_bits() {
    assert_eq!(losses(true, 5), losses(true, 5));
}

#[test]
fn accumulated_streams_equal_one_stream() {
    let config = config(Family::Qwen3, true);
    let cpu = Cpu::new(2);
    let mut one = decoder_f32(&cpu, &config, 1);
    let mut parts = one.duplicate().unwrap();
    let (a, b) = (batch(&config, &[12, 7], &[0; 2], 3), batch(&config, &[9, 4], &[0; 2], 8));
    let mut both = a.clone();
    let shift = a.len() as u32;
    both.tokens.extend(&b.tokens);
    both.positions.extend(&b.positions);
    both.offsets.extend(b.offsets[1..].iter().map(|o| o + shift));
    both.adapter.extend(&b.adapter);
    both.grad_row.extend(&b.grad_row);
    both.keys.extend(&b.keys);
    both.label_rows.extend(b.label_rows.iter().map(|r| r + shift));
    both.targets.extend(&b.targets);
    both.weights.extend(&b.weights);
    both.label_segment.extend(b.label_segment.iter().map(|s| s + 2));
    let mut trainer = FullTrainer::new(&one, false, capacity(&both)).unwrap();
    let (loss, norm) = trainer.train_step(&mut one, &both, step(1, false)).unwrap();
    let mut trainer = FullTrainer::new(&parts, false, capacity(&both)).unwrap();
    let sum = trainer.accumulate(&parts, &a).unwrap() + trainer.accumulate(&parts, &b).unwrap();
    let norm_of_parts = trainer.apply(&mut parts, step(1, false)).unwrap();
    assert!((loss - sum).abs() <= 1e-6 * loss && (norm - norm_of_parts).abs() <= 1e-5 * norm);
    assert!(trainer.gradients().iter().all(|&g| g == 0.0), "the step's gradients are forgotten");
    assert!(trainer.apply(&mut parts, step(2, true)).is_err(), "Muon's numbers without Muon");
}
