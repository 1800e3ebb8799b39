//! Packed streams: what shares a stream does not matter.

use crate::common::*;
use gradtx_kernels::Device;
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::ops::AdamWStep;
use gradtx_models::decoder::{Activations, Decoder, Family, Gradients, Mode};
use gradtx_models::lora::{
    BlockLayout, Factor, LoraConfig, Module, MultiLora, PeftAdapter, initial_adapter, merge,
};
use gradtx_runtime::data::{BatchCapacity, PackedBatch, SegmentInfo};

const LENGTHS: [usize; 5] = [5, 1, 123, 17, 5];

/// The segment of a stream alone.
fn alone(batch: &PackedBatch, i: usize, row: u32) -> PackedBatch {
    let range = batch.offsets[i] as usize..batch.offsets[i + 1] as usize;
    let labels: Vec<usize> = (0..batch.labels()).filter(|&m| batch.label_segment[m] == i as u32).collect();
    PackedBatch {
        tokens: batch.tokens[range.clone()].to_vec(),
        positions: batch.positions[range.clone()].to_vec(),
        offsets: vec![0, range.len() as u32],
        adapter: vec![row],
        grad_row: vec![row],
        keys: vec![batch.keys[i]],
        label_rows: labels.iter().map(|&m| batch.label_rows[m] - range.start as u32).collect(),
        targets: labels.iter().map(|&m| batch.targets[m]).collect(),
        weights: labels.iter().map(|&m| batch.weights[m]).collect(),
        label_segment: vec![0; labels.len()],
    }
}

#[test]
fn a_packed_stream_equals_its_examples_one_by_one() {
    for family in [Family::Qwen2, Family::Qwen3, Family::Opt] {
        let config = config(family, true);
        let cpu = Cpu::new(2);
        let model = decoder_f32(&cpu, &config, 1);
        let batch = batch(&config, &LENGTHS, &[0; 5], 3);
        let packed = all_logits(&model, &batch, None);
        let mut sum = cpu.zeros(model.layout().total()).unwrap();
        let mut whole = cpu.zeros(model.layout().total()).unwrap();
        let gradient = |batch: &PackedBatch, into: &mut [f32]| {
            let mut acts = Activations::new(&model, capacity(batch), Mode::AllParameters).unwrap();
            let into = Gradients::All(into);
            model.loss_and_gradient(&mut acts, &upload(&cpu, batch), None, into).unwrap();
        };
        gradient(&batch, &mut whole);
        for i in 0..LENGTHS.len() {
            let one = alone(&batch, i, 0);
            let rows = batch.offsets[i] as usize * config.vocab..batch.offsets[i + 1] as usize * config.vocab;
            assert_near(&all_logits(&model, &one, None), &packed[rows], 1e-5, "logits");
            gradient(&one, &mut sum);
        }
        for param in model.layout().params().iter().filter(|p| !has_no_gradient(&config, &p.name)) {
            assert_near(&sum[param.range()], &whole[param.range()], 1e-5, &param.name);
        }
    }
}

#[test]
fn a_leak_between_segments_would_be_found() {
    let config = config(Family::Qwen2, true);
    let model = decoder_f32(&Cpu::new(1), &config, 1);
    let batch = batch(&config, &[5, 7], &[0; 2], 3);
    let mut joined = batch.clone();
    joined.offsets = vec![0, 12];
    for list in [&mut joined.adapter, &mut joined.grad_row] {
        list.truncate(1);
    }
    joined.keys.truncate(1);
    let (apart, joined) = (all_logits(&model, &batch, None), all_logits(&model, &joined, None));
    let second = 5 * config.vocab..;
    assert!(distance(&joined[second.clone()], &apart[second]) > 1e-2);
}

const STEP: AdamWStep =
    AdamWStep { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: 1 };

/// Three jobs of several examples each, interleaved; `only` trains one of them alone.
fn train(threads: usize, only: Option<u32>) -> Vec<(Vec<u32>, Vec<u64>)> {
    let config = config(Family::Qwen2, true);
    let cpu = Cpu::new(threads);
    let model = decoder_f32(&cpu, &config, 1);
    let lora =
        LoraConfig { rank: 2, alpha: 32.0, dropout: 0.1, targets: Module::ALL.to_vec(), layers: vec![] };
    let layout = gradtx_models::lora::BlockLayout::new(&config, &lora).unwrap();
    let initial = initial_adapter(&layout, 9);
    let capacity = BatchCapacity { tokens: 400, segments: 12, labels: 400 };
    let count = if only.is_some() { 1 } else { 3 };
    let mut jobs = MultiLora::new(&model, &layout, count, &initial, capacity).unwrap();
    let mut losses = vec![Vec::new(); count];
    for step in 0..3u32 {
        let mut batch = PackedBatch::default();
        for (i, len) in [7, 33, 1, 20, 123, 5, 64].into_iter().enumerate() {
            let job = i as u32 % 3;
            if only.is_none_or(|o| o == job) {
                let key = 1000 * step as u64 + i as u64;
                let row = if only.is_some() { 0 } else { job };
                let info = SegmentInfo { adapter: row, grad_row: row, key };
                batch.push(&example(&config, len, key), info, 0.02 * (i + 1) as f64);
            }
        }
        let report =
            jobs.train_step(&model, &batch, AdamWStep { step: step + 1, ..STEP }, Some(0.5)).unwrap();
        report.losses.iter().enumerate().for_each(|(j, l)| losses[j].push(l.to_bits()));
    }
    let bits = |job| jobs.update(job).unwrap().iter().map(|x| x.to_bits()).collect();
    losses.into_iter().enumerate().map(|(job, losses)| (bits(job), losses)).collect()
}

#[test]
fn a_job_is_the_same_to_the_bit_alone_or_among_others() {
    let together = train(2, None);
    for job in 0..3 {
        assert!(train(2, Some(job))[0] == together[job as usize], "job {job}");
    }
    assert!(together[0] != together[1]);
}

#[test]
fn threads_do_not_matter() {
    let one = train(1, None);
    for threads in [2, 3] {
        assert!(train(threads, None) == one, "{threads} threads");
    }
}

/// Adapters of two jobs after so many steps, without clipping, in the order of adapters whose A is trained too.
fn trained(freeze_a: bool, steps: u32) -> [Vec<f32>; 2] {
    let config = config(Family::Qwen2, true);
    let model = decoder_f32(&Cpu::new(2), &config, 1);
    let lora =
        LoraConfig { rank: 2, alpha: 32.0, dropout: 0.1, targets: Module::ALL.to_vec(), layers: vec![] };
    let whole = BlockLayout::new(&config, &lora).unwrap();
    let layout = if freeze_a { BlockLayout::with_frozen_a(&config, &lora).unwrap() } else { whole.clone() };
    let initial = initial_adapter(&layout, 9);
    let capacity = BatchCapacity { tokens: 400, segments: 12, labels: 400 };
    let mut jobs = MultiLora::new(&model, &layout, 2, &initial, capacity).unwrap();
    let moments = jobs.optimizer().moments().0.len();
    assert_eq!(moments, 2 * layout.blocks() * layout.width());
    let mut batch = PackedBatch::default();
    for (i, len) in [7, 33, 1, 20].into_iter().enumerate() {
        let job = i as u32 % 2;
        let info = SegmentInfo { adapter: job, grad_row: job, key: 50 + i as u64 };
        batch.push(&example(&config, len, i as u64), info, 0.02 * (i + 1) as f64);
    }
    for step in 1..=steps {
        jobs.train_step(&model, &batch, AdamWStep { step, ..STEP }, None).unwrap();
    }
    [0, 1].map(|job| {
        let (adapter, update) = (jobs.adapter(job).unwrap(), jobs.update(job).unwrap());
        assert_eq!(update.len(), layout.blocks() * layout.width());
        let change =
            adapter[layout.trained()].iter().zip(&initial[layout.trained()]).map(|(x, start)| x - start);
        assert!(change.zip(&update).all(|(x, y)| x == *y));
        layout.reordered(&adapter, &whole).unwrap()
    })
}

#[test]
fn a_frozen_a_stays_and_b_learns_as_beside_a_trained_one() {
    let config = config(Family::Qwen2, true);
    let lora =
        LoraConfig { rank: 2, alpha: 32.0, dropout: 0.1, targets: Module::ALL.to_vec(), layers: vec![] };
    let layout = BlockLayout::new(&config, &lora).unwrap();
    let initial = initial_adapter(&layout, 9);
    let of = |values: &[f32], factor: Factor| -> Vec<f32> {
        let slices = layout.slices().iter().filter(|slice| slice.factor == factor);
        (0..layout.blocks())
            .flat_map(|block| {
                slices
                    .clone()
                    .flat_map(|slice| values[layout.range(block, slice)].to_vec())
                    .collect::<Vec<_>>()
            })
            .collect()
    };
    let (frozen, whole, later) = (trained(true, 1), trained(false, 1), trained(true, 4));
    for job in 0..2 {
        // The gradient of B at the start does not depend on whether A will move.
        assert_eq!(of(&frozen[job], Factor::B), of(&whole[job], Factor::B));
        assert_ne!(of(&whole[job], Factor::A), of(&initial, Factor::A));
        assert_eq!(
            of(&later[job], Factor::A),
            of(&initial, Factor::A),
            "weight decay does not move it either"
        );
        assert_ne!(of(&later[job], Factor::B), of(&frozen[job], Factor::B));
    }
}

#[test]
fn a_merged_adapter_gives_the_same_logits() {
    let config = config(Family::Llama, false);
    let cpu = Cpu::new(2);
    let model = decoder_f32(&cpu, &config, 1);
    let (layout, values) = adapters(&config, &Module::ALL, 0.0, 1, 5);
    let values: Vec<f32> = values.iter().map(|&x| x as f32).collect();
    let beside = Adapters { values: cpu.buffer_from(&values).unwrap(), layout: &layout };
    let batch = batch(&config, &LENGTHS, &[0; 5], 3);
    let base = all_logits(&model, &batch, None);
    let want = all_logits(&model, &batch, Some(beside.view(0.0)));
    let (base_dir, merged_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    model.save(base_dir.path(), false).unwrap();
    let adapter = PeftAdapter { layout: layout.clone(), values, base_model: None };
    merge(base_dir.path(), &adapter, merged_dir.path(), 2).unwrap();
    let merged = Decoder::load(&cpu, merged_dir.path()).unwrap();
    assert_near(&all_logits(&merged, &batch, None), &want, 1e-5, "merged");
    assert!(distance(&base, &want) > 1e-2, "the adapter does something");
}
