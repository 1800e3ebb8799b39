//! Labels drawn from the LLM's own probabilities, for the Fisher matrix as it is defined.

use super::support::Support;
use anyhow::Result;
use gradtx_kernels::rng::{Stream, derive, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{Activations, Decoder, Mode, drawn};
use gradtx_run::context::Context;
use gradtx_runtime::data::{DeviceBatch, PackedBatch};
use rayon::prelude::*;

/// The streams of both halves with labels drawn by the seed, the number of the example, and the position.
pub(super) fn drawn_labels<X: Real<Acc = f32>, D: Backend<X>>(
    context: &Context,
    decoder: &Decoder<D, X>,
    support: &Support,
    seed: u64,
) -> Result<[Vec<PackedBatch>; 2]> {
    let (device, capacity, vocab) = (decoder.device(), support.capacity(), decoder.config().vocab);
    let mut acts = Activations::new(decoder, capacity, Mode::Inference(None))?;
    let mut batch = DeviceBatch::new(device, capacity)?;
    let key = derive_named(seed, "labels of the emulator");
    let mut halves = support.halves.clone();
    let mut progress = context.ui.progress("emulate: labels", support.streams().count() as u64);
    for (done, stream) in halves.iter_mut().flatten().enumerate() {
        batch.load(device, stream)?;
        let uniform = |label: usize| {
            let (row, segment) = (stream.label_rows[label] as usize, stream.label_segment[label] as usize);
            let of_example = derive(key, stream.keys[segment]);
            Stream::new(derive(of_example, u64::from(stream.positions[row]))).uniform()
        };
        let mut labels = vec![];
        decoder.each_logits(&mut acts, &batch, None, &stream.label_rows, &mut |first, logits: &[X]| {
            let of = |(i, logits): (usize, &[X])| drawn(logits, uniform(first + i));
            labels.extend(logits.par_chunks_exact(vocab).enumerate().map(of).collect::<Vec<_>>());
        })?;
        stream.targets = labels;
        progress.set(done as u64 + 1, "");
    }
    Ok(halves)
}
