//! Sums over products for emulators of LLMs, and labels that are drawn for them, as on the CPU.

use crate::models::{FORWARD, WATCHED, assert_near, batch, config, cuda, decoder};
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::cuda::Cuda;
use gradtx_kernels::rng::Stream;
use gradtx_kernels::{Backend, Real, bf16};
use gradtx_models::decoder::{
    Activations, Decoder, DecoderConfig, Family, Gradients, Mode, ProductStatistics, ProductSums,
    StatisticsKind, StatisticsOf, drawn,
};
use gradtx_models::lora::Projection;
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, Example, PackedBatch, SegmentInfo};

/// The sums of the second of two layers, by product: of a stream, and of first tokens without labels alone.
fn sums<D: Backend<X>, X: Real<Acc = f32>>(device: &D, config: &DecoderConfig) -> Vec<ProductSums> {
    let model: Decoder<D, X> = decoder(device, config);
    let mut firsts = PackedBatch::default();
    for token in [3, 7, 11] {
        let example = Example { tokens: vec![token], trained: vec![false] };
        firsts.push(&example, SegmentInfo::default(), 1.0);
    }
    let streams = [batch(config), firsts];
    let capacity = BatchCapacity::of(&streams);
    let mut found = vec![];
    for (stream, kind) in streams.iter().zip([StatisticsKind::Curvature, StatisticsKind::Factors]) {
        let of = StatisticsOf { layers: vec![1], kind };
        let mut sums = ProductStatistics::new(device, config, &of).expect("there is memory");
        let mut acts = Activations::new(&model, capacity, Mode::Statistics(&of)).expect("there is memory");
        let mut on_device = DeviceBatch::new(device, capacity).expect("there is memory");
        on_device.load(device, stream).expect("the stream fits");
        let into = Gradients::Statistics(&mut sums);
        model.loss_and_gradient(&mut acts, &on_device, None, into).expect("the pass is possible");
        let of = |projection| sums.product(device, 1, projection).expect("its sums are there");
        found.extend(Projection::ALL.map(of));
    }
    found
}

#[test]
fn sums_over_products_for_an_emulator() {
    let config = config(Family::Qwen2, 10);
    let expected = sums::<Cpu, f32>(&Cpu::new(1), &config);
    let found = sums::<Cuda, f32>(&cuda(WATCHED), &config);
    let narrow = sums::<Cuda, bf16>(&cuda(FORWARD), &config);
    for (i, want) in expected.iter().enumerate() {
        let what = ["of a stream", "of first tokens"][i / 4];
        let near = |of: &[ProductSums], dtype: &str, tolerance: f64| {
            let name = |sum: &str| format!("{sum} of product {} {what}, {dtype}", i % 4);
            assert_near(&name("inputs"), &of[i].inputs, &want.inputs, tolerance);
            // Without labels there are no gradients.
            if i < 4 {
                assert_near(&name("outputs"), &of[i].outputs, &want.outputs, tolerance);
            }
            if !want.gradient.is_empty() {
                assert_near(&name("gradients"), &of[i].gradient, &want.gradient, tolerance);
            }
        };
        near(&found, "f32", 1e-4);
        near(&narrow, "bf16", 5e-2);
    }
}

/// Labels drawn from a model's own probabilities.
fn labels<D: Backend<X>, X: Real>(device: &D, config: &DecoderConfig) -> Vec<u32> {
    let model: Decoder<D, X> = decoder(device, config);
    let batch = batch(config);
    let capacity = BatchCapacity::of([&batch]);
    let mut acts = Activations::new(&model, capacity, Mode::Inference(None)).expect("there is memory");
    let mut on_device = DeviceBatch::new(device, capacity).expect("there is memory");
    on_device.load(device, &batch).expect("the stream fits");
    let mut stream = Stream::new(5);
    let mut labels = vec![];
    let mut each = |_, logits: &[X]| {
        labels.extend(logits.chunks_exact(config.vocab).map(|logits| drawn(logits, stream.uniform())));
    };
    model.each_logits(&mut acts, &on_device, None, &batch.label_rows, &mut each).expect("a pass");
    labels
}

#[test]
fn labels_are_drawn_as_on_the_cpu() {
    let config = config(Family::Qwen3, 10);
    let expected = labels::<Cpu, f32>(&Cpu::new(1), &config);
    assert!(expected.len() > 50 && expected.iter().any(|label| *label != expected[0]));
    // But for draws within a rounding of the bound between two tokens, of which there is none here.
    assert_eq!(labels::<Cuda, f32>(&cuda(FORWARD), &config), expected);
}
