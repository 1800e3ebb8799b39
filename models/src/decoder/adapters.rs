//! [`AdapterView`]: the adapters of a pass, and the shapes of products with them.

use super::DecoderConfig;
use crate::lora::{BlockLayout, Projection};
use gradtx_kernels::ops::LoraDims;
use gradtx_kernels::{Device, Real};

/// Adapters that a pass uses: `values` `[adapters, L·d]`; a segment names its row.
pub struct AdapterView<'a, D: Device, A: Real> {
    /// The adapters.
    pub values: &'a D::Buf<A>,
    /// Their layout.
    pub layout: &'a BlockLayout,
    /// Dropout probability on their input; 0 outside training.
    pub dropout: f64,
}

impl<D: Device, A: Real> Clone for AdapterView<'_, D, A> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device, A: Real> Copy for AdapterView<'_, D, A> {}

/// Shapes of an adapted product of one block.
pub(super) fn lora_dims<'a>(
    config: &DecoderConfig,
    layout: Option<&'a BlockLayout>,
    dropout: f64,
    block: usize,
    fused: Projection,
    tokens: usize,
) -> LoraDims<'a> {
    let (in_dim, out_dim) = fused.dims(config);
    let none: &[_] = &[];
    LoraDims {
        tokens,
        in_dim,
        out_dim,
        rank: layout.map_or(1, |l| l.lora().rank),
        scale: layout.map_or(0.0, |l| l.lora().scale()),
        dropout,
        adapter_stride: layout.map_or(0, BlockLayout::total),
        targets: layout.map_or(none, |l| l.targets(block, fused)),
    }
}
