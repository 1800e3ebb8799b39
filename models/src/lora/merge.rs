//! An adapter merged into the weights it was trained beside: `W ← W + (α/r) B A`.

use super::{BlockLayout, Factor};
use crate::decoder::Decoder;
use gradtx_kernels::{Device, Real};
use gradtx_runtime::{Error, Result};

/// Adds an adapter `[L, d]` to a decoder's weights, computed in f32.
pub fn merge<D: Device, X: Real>(
    decoder: &mut Decoder<D, X>,
    layout: &BlockLayout,
    adapter: &[f32],
) -> Result<()> {
    if adapter.len() != layout.total() || layout.blocks() != decoder.config().layers {
        let (want, blocks) = (layout.total(), decoder.config().layers);
        let why = format!(
            "the layout has {} blocks and {want} values; the model has {blocks} blocks, the adapter {} values",
            layout.blocks(),
            adapter.len()
        );
        return Err(Error::invalid("adapter to be merged", why));
    }
    let device = decoder.device().clone();
    let (rank, scale) = (layout.lora().rank, layout.lora().scale() as f32);
    for block in 0..layout.blocks() {
        for pair in layout.slices().chunks_exact(2) {
            debug_assert!(pair[0].factor == Factor::A && pair[1].factor == Factor::B);
            let name = format!("model.layers.{block}.{}.weight", pair[0].module.path());
            let range = decoder.layout().range(&name)?;
            let a = &adapter[layout.range(block, &pair[0])];
            let b = &adapter[layout.range(block, &pair[1])];
            let mut weight = device.to_host(D::view(decoder.values(), range.clone()))?;
            let columns = pair[0].shape[1];
            for (row, b) in weight.chunks_exact_mut(columns).zip(b.chunks_exact(rank)) {
                for (i, w) in row.iter_mut().enumerate() {
                    let delta: f32 = b.iter().zip(a.chunks_exact(columns)).map(|(b, a)| b * a[i]).sum();
                    *w = X::from_f64((w.to_f64() as f32 + scale * delta) as f64);
                }
            }
            device.upload(D::view_mut(decoder.values_mut(), range), &weight)?;
        }
    }
    Ok(())
}
