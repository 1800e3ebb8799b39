//! Linear layers with low-rank adapters, several adapters in one packed stream.
//!
//! For a token t of a segment with adapter j, and every target q of the layer:
//!
//! ```text
//! s_q[t]          = (α/r) · drop_q(x[t]) A_qᵀ                  [r]
//! y[t, q's rows] += s_q[t] B_qᵀ                                [out_len]
//! ```
//!
//! beside the frozen product `y = [residual +] x Wᵀ`. One layer here may be several
//! fused ones (q, k and v; gate and up): a target is then a range of its outputs.
//!
//! The work is split where a device can fuse it. The *down* product `s` belongs to
//! whoever produces x (RMSNorm has the row in registers); the *up* product belongs
//! to the GEMM, as `tail` further columns of x and W. So x and s live together in
//! one *adapter input* buffer whose layout is the device's own: ask
//! [`LoraLinear::lora_input_len`] for its length, and [`LoraLinear::lora_rows`]
//! and [`LoraLinear::lora_row_stride`] for the rows of x in it. A device may want
//! frozen weights with room for such columns too: [`LoraLinear::lora_weight_stride`].
//!
//! Adapters are rows of one matrix `[jobs, adapter_stride]` in update-vector order;
//! a target's A `[r, in_dim]` and B `[out_len, r]` lie in a row at the offsets that
//! [`LoraTarget`] names. Gradients are rows of a matrix of the same shape, chosen
//! by segment, so gradient accumulation, several jobs on one base, and per-example
//! gradients are one thing. A gradient row's bits do not depend on which other
//! rows share the stream: sums run over a segment's tokens in order, then over
//! segments in order.
//!
//! Dropout: element c of x at position p of its segment (counted from the segment's
//! first token) is kept under target q when word `c % 4` of
//! `philox(key, [p, c / 4, site_q, DROPOUT_STREAM])` is at least
//! [`crate::rng::drop_threshold`]`(p_drop)`; kept elements are multiplied by
//! `1 / (1 − p_drop)`. `p_drop = 0` draws nothing.

use super::{RmsNormDims, Segments};
use crate::{Device, Real, Result};

/// Last word of the counters of dropout masks.
pub const DROPOUT_STREAM: u32 = 0x64_72_6f_70;

/// One adapted range of a layer's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoraTarget {
    /// Offset of A `[r, in_dim]` in an adapter row.
    pub a_offset: usize,
    /// Offset of B `[out_len, r]` in an adapter row.
    pub b_offset: usize,
    /// First output column.
    pub out_start: usize,
    /// Number of output columns.
    pub out_len: usize,
    /// Number of this target's dropout masks, different for every adapted module of the model.
    pub site: u32,
}

/// Shapes of an adapted layer.
#[derive(Clone, Copy, Debug)]
pub struct LoraDims<'a> {
    /// Tokens, `T`.
    pub tokens: usize,
    /// Columns of x.
    pub in_dim: usize,
    /// Columns of y.
    pub out_dim: usize,
    /// Rank r of every target.
    pub rank: usize,
    /// α/r.
    pub scale: f64,
    /// Dropout probability on the adapters' input; 0 outside training.
    pub dropout: f64,
    /// Elements of an adapter row and of a gradient row.
    pub adapter_stride: usize,
    /// The adapted ranges; may be empty.
    pub targets: &'a [LoraTarget],
}

impl LoraDims<'_> {
    /// Columns of s: targets × rank.
    pub fn tail(&self) -> usize {
        self.targets.len() * self.rank
    }
}

/// Adapted linear layers. `adapters` is `[jobs, adapter_stride]`.
///
/// `w` is `[out_dim, in_dim]`; or `[out_dim, lora_weight_stride(in_dim)]`, of which the columns
/// beyond `in_dim` are the device's: it writes there what it likes, whenever it likes.
pub trait LoraLinear<X: Real>: Device {
    /// Elements of an adapter input for these dims.
    fn lora_input_len(dims: &LoraDims<'_>) -> usize;

    /// Stride of the rows of x in an adapter input.
    fn lora_row_stride(dims: &LoraDims<'_>) -> usize;

    /// Bytes of its own scratch memory that a device takes for the backward passes of such a layer, on streams of
    /// so many segments, and then keeps.
    fn lora_scratch(_dims: &LoraDims<'_>, _segments: usize) -> usize {
        0
    }

    /// Elements from one row of a frozen weight to the next, as this device is fastest with;
    /// at least `in_dim`.
    fn lora_weight_stride(in_dim: usize) -> usize;

    /// The rows of x in an adapter input, `[T, in_dim]` with [`Self::lora_row_stride`].
    fn lora_rows<'a>(input: Self::View<'a, X>, dims: &LoraDims<'_>) -> Self::View<'a, X>;

    /// The same for writing.
    fn lora_rows_mut<'a>(input: Self::ViewMut<'a, X>, dims: &LoraDims<'_>) -> Self::ViewMut<'a, X>;

    /// Fills in s beside rows of x that are already in `input`: `s = (α/r) drop(x) Aᵀ` (`=`).
    fn lora_down_forward(
        &self,
        input: Self::ViewMut<'_, X>,
        adapters: Self::View<'_, X::Acc>,
        segments: Segments<'_, Self>,
        dims: LoraDims<'_>,
    ) -> Result<()>;

    /// RMSNorm and down-projection together: rows of `input` `= rmsnorm(x)`, and its s (`=`).
    ///
    /// `inv_rms` `[T]` `=`. `norm` gives rows, cols, x_stride and eps; its y_stride is ignored.
    fn rmsnorm_lora_forward(
        &self,
        input: Self::ViewMut<'_, X>,
        inv_rms: Self::ViewMut<'_, X::Acc>,
        x: Self::View<'_, X>,
        w_norm: Self::View<'_, X>,
        adapters: Self::View<'_, X::Acc>,
        segments: Segments<'_, Self>,
        norm: RmsNormDims,
        dims: LoraDims<'_>,
    ) -> Result<()>;

    /// `y = residual + x wᵀ + s Bᵀ` (`=`), y and residual `[T, out_dim]`.
    fn lora_linear_forward(
        &self,
        y: Self::ViewMut<'_, X>,
        input: Self::View<'_, X>,
        w: Self::View<'_, X>,
        residual: Option<Self::View<'_, X>>,
        adapters: Self::View<'_, X::Acc>,
        segments: Segments<'_, Self>,
        dims: LoraDims<'_>,
    ) -> Result<()>;

    /// Backward of the up-projection and the frozen product.
    ///
    /// `d_input`, an adapter input: its rows `= dy w`, its s `= dy B`.
    /// `grads` `[rows, adapter_stride]`: `dB += dyᵀ s`.
    fn lora_linear_backward(
        &self,
        d_input: Self::ViewMut<'_, X>,
        grads: Self::ViewMut<'_, X::Acc>,
        dy: Self::View<'_, X>,
        input: Self::View<'_, X>,
        w: Self::View<'_, X>,
        adapters: Self::View<'_, X::Acc>,
        segments: Segments<'_, Self>,
        dims: LoraDims<'_>,
    ) -> Result<()>;

    /// Backward of the down-projection.
    ///
    /// Rows of `d_input` `+= (α/r) mask ⊙ (ds A)`; `grads`: `dA += (α/r) dsᵀ drop(x)`,
    /// with ds the s part of `d_input` and x the rows of `input`.
    fn lora_down_backward(
        &self,
        d_input: Self::ViewMut<'_, X>,
        grads: Self::ViewMut<'_, X::Acc>,
        input: Self::View<'_, X>,
        adapters: Self::View<'_, X::Acc>,
        segments: Segments<'_, Self>,
        dims: LoraDims<'_>,
    ) -> Result<()>;

    /// [`Self::lora_down_backward`] and the backward of RMSNorm together.
    ///
    /// `dx` `[T, cols]` `+=`; `grads`: dA `+=`. `d_input` holds dy·w and ds on entry, anything after.
    fn rmsnorm_lora_backward(
        &self,
        dx: Self::ViewMut<'_, X>,
        d_input: Self::ViewMut<'_, X>,
        grads: Self::ViewMut<'_, X::Acc>,
        x: Self::View<'_, X>,
        input: Self::View<'_, X>,
        inv_rms: Self::View<'_, X::Acc>,
        w_norm: Self::View<'_, X>,
        adapters: Self::View<'_, X::Acc>,
        segments: Segments<'_, Self>,
        norm: RmsNormDims,
        dims: LoraDims<'_>,
    ) -> Result<()>;
}
