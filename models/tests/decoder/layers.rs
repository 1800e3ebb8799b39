//! Training of the full weights of some layers.

use crate::common::*;
use gradtx_kernels::Device;
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::ops::AdamWStep;
use gradtx_models::decoder::{
    Activations, Decoder, DecoderConfig, Family, Gradients, LayerParams, LayerTrainer, Mode,
};
use gradtx_runtime::data::PackedBatch;

fn deep(family: Family) -> DecoderConfig {
    DecoderConfig { layers: 4, ..config(family, true) }
}

fn step(step: u32) -> AdamWStep {
    AdamWStep { lr: 5e-3, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.01, step }
}

/// Gradients of the parameters of these layers.
fn gradients(config: &DecoderConfig, params: &LayerParams, batch: &PackedBatch) -> Vec<f64> {
    let cpu = Cpu::new(2);
    let model = decoder::<f64>(&cpu, config, &values(config, 1));
    let mut acts = Activations::new(&model, capacity(batch), Mode::Layers(params)).unwrap();
    let mut grads = cpu.zeros(params.total()).unwrap();
    let into = Gradients::Layers(&mut grads[..], params);
    model.loss_and_gradient(&mut acts, &upload(&cpu, batch), None, into).unwrap();
    grads.to_vec()
}

#[test]
fn gradients_of_layers_are_those_of_all_parameters() {
    for family in [Family::Qwen2, Family::Qwen3, Family::Llama] {
        let config = deep(family);
        let batch = batch(&config, &[5, 1, 9, 4], &[0; 4], 3);
        let cpu = Cpu::new(2);
        let model = decoder::<f64>(&cpu, &config, &values(&config, 1));
        let mut acts = Activations::new(&model, capacity(&batch), Mode::AllParameters).unwrap();
        let mut all = cpu.zeros(model.layout().total()).unwrap();
        let into = Gradients::All(&mut all[..]);
        model.loss_and_gradient(&mut acts, &upload(&cpu, &batch), None, into).unwrap();
        for layers in [&[0, 3][..], &[2], &[1, 3], &[0, 1, 2, 3]] {
            let params = LayerParams::new(&config, layers).unwrap();
            assert_eq!(params.layers(), layers);
            let found = gradients(&config, &params, &batch);
            // All tensors of a layer: matrices, norms, and the biases or norms of heads that the family has.
            let of_layer = if family == Family::Llama {
                9
            } else if family == Family::Qwen2 {
                12
            } else {
                11
            };
            assert_eq!(params.params().len(), of_layer * layers.len());
            for param in params.params() {
                let want = &all[model.layout().get(&param.name).unwrap().range()];
                let own = &found[param.range()];
                let far = own.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                let largest = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
                assert!(
                    largest > 0.0 && far <= 1e-12 * largest,
                    "{family:?}, {layers:?}, {}: {far:e}",
                    param.name
                );
            }
        }
    }
}

/// A model after some steps on two layers, and its masters.
fn trained(threads: usize, steps: u32) -> (Decoder<Cpu, f32>, Vec<f32>) {
    let config = deep(Family::Qwen2);
    let cpu = Cpu::new(threads);
    let start: Vec<f32> = values(&config, 1).iter().map(|&x| x as f32).collect();
    let mut model = decoder(&cpu, &config, &start);
    let params = LayerParams::new(&config, &[0, 3]).unwrap();
    let mut masters = vec![0.0; params.total()];
    for param in params.params() {
        let of_model = model.layout().get(&param.name).unwrap().range();
        masters[param.range()].copy_from_slice(&start[of_model]);
    }
    let batches = [batch(&config, &[12, 7, 9], &[0; 3], 3), batch(&config, &[6, 10], &[0; 2], 8)];
    let room = capacity(&batches[0]).max(capacity(&batches[1]));
    let mut trainer = LayerTrainer::new(&mut model, params, &masters, room).unwrap();
    for t in 1..=steps {
        for batch in &batches {
            trainer.accumulate(&model, batch).unwrap();
        }
        trainer.apply(&mut model, step(t), Some(1.0)).unwrap();
    }
    let masters = trainer.masters().unwrap();
    (model, masters)
}

#[test]
fn other_layers_embedding_and_head_stay() {
    let (model, _) = trained(1, 3);
    let config = deep(Family::Qwen2);
    let before: Vec<f32> = values(&config, 1).iter().map(|&x| x as f32).collect();
    for param in model.layout().params() {
        let is_trained = ["layers.0.", "layers.3."].iter().any(|layer| param.name.contains(layer));
        let (old, new) = (&before[param.range()], model.tensor(param).unwrap());
        assert_eq!(old != new.as_slice(), is_trained, "{}", param.name);
    }
}

#[test]
fn threads_change_no_bit_of_trained_layers() {
    let [one, three] = [1, 3].map(|threads| trained(threads, 4).1);
    assert!(one == three);
}

#[test]
fn training_goes_on_from_a_state_with_the_same_bits() {
    let config = deep(Family::Qwen3);
    let cpu = Cpu::new(2);
    let batch = batch(&config, &[12, 7, 9], &[0; 3], 3);
    let params = LayerParams::new(&config, &[3]).unwrap();
    let start = |key: u64| {
        let mut model = decoder_f32(&cpu, &config, key);
        let values = vec![0.01 * key as f32; params.total()];
        let trainer = LayerTrainer::new(&mut model, params.clone(), &values, capacity(&batch)).unwrap();
        (model, trainer)
    };
    let run = |model: &mut Decoder<Cpu, f32>,
               trainer: &mut LayerTrainer<Cpu, f32>,
               steps: std::ops::RangeInclusive<u32>| {
        for t in steps {
            trainer.accumulate(model, &batch).unwrap();
            trainer.apply(model, step(t), Some(1.0)).unwrap();
        }
    };
    let (mut model, mut trainer) = start(1);
    run(&mut model, &mut trainer, 1..=2);
    let state = trainer.state().unwrap();
    run(&mut model, &mut trainer, 3..=5);
    let (mut again, mut resumed) = start(1);
    resumed.restore(&mut again, &state).unwrap();
    run(&mut again, &mut resumed, 3..=5);
    assert!(trainer.state().unwrap() == resumed.state().unwrap() && model.values()[..] == again.values()[..]);
    let mut short = state;
    short.first.pop();
    assert!(resumed.restore(&mut again, &short).is_err());
}

#[test]
fn layers_that_cannot_be_trained_are_refused() {
    let config = deep(Family::Llama);
    for layers in [&[][..], &[4], &[1, 1], &[2, 0]] {
        assert!(LayerParams::new(&config, layers).is_err(), "{layers:?}");
    }
    // Buffers for other layers, or for another purpose.
    let cpu = Cpu::new(1);
    let model = decoder::<f64>(&cpu, &config, &values(&config, 1));
    let batch = batch(&config, &[5], &[0], 3);
    let [one, other] = [1, 2].map(|layer| LayerParams::new(&config, &[layer]).unwrap());
    let run = |mode| {
        let mut acts = Activations::new(&model, capacity(&batch), mode).unwrap();
        let mut grads = cpu.zeros(one.total()).unwrap();
        let into = Gradients::Layers(&mut grads[..], &one);
        model.loss_and_gradient(&mut acts, &upload(&cpu, &batch), None, into).is_ok()
    };
    assert!(run(Mode::Layers(&one)));
    assert!(!run(Mode::Layers(&other)) && !run(Mode::AllParameters) && !run(Mode::Inference(None)));
}

#[test]
fn memory_is_of_the_trained_layers_alone() {
    let config = deep(Family::Qwen2);
    let room = capacity(&batch(&config, &[12, 7], &[0; 2], 3));
    let total = |layers: &[usize]| {
        let params = LayerParams::new(&config, layers).unwrap();
        LayerTrainer::<Cpu, f32>::plan(&config, &params, room).total()
    };
    let (last, edge, all) = (total(&[3]), total(&[0, 3]), total(&[0, 1, 2, 3]));
    assert!(last < edge && edge < all, "{last}, {edge}, {all}");
}
