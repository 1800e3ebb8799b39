//! Linear layers with low-rank adapters, several adapters in one packed stream.
//!
//! For a token t of a segment with adapter j, and every target q of the layer:
//!
//! ```text
//! s_q[t]          = (α/r) · drop_q(x[t]) A_qᵀ                  [r]
//! y[t, q's rows] += s_q[t] B_qᵀ                                [out_len]
//! ```
//!
//! beside the frozen product `y = [residual +] [bias +] x Wᵀ`. One layer here may be several
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

use super::dropout::check_probability;
use super::{RmsNormDims, Segments};
use crate::error::{expect_len, expect_rows};
use crate::{Device, Error, Real, Result, View, ViewMut};

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

    /// Fails unless an adapter input of this length, segments and targets fit.
    pub(crate) fn check_input<D: LoraLinear<X>, X: Real>(
        &self,
        op: &'static str,
        input: usize,
        segments: &Segments<'_, D>,
    ) -> Result<()> {
        expect_len(op, "input", input, D::lora_input_len(self))?;
        expect_len(op, "segments.offsets", segments.offsets.len(), segments.count + 1)?;
        expect_len(op, "segments.adapter", segments.adapter.len(), segments.count)?;
        expect_len(op, "segments.grad_row", segments.grad_row.len(), segments.count)?;
        expect_len(op, "segments.keys", segments.keys.len(), segments.count)?;
        for (n, target) in self.targets.iter().enumerate() {
            let a_end = target.a_offset + self.rank * self.in_dim;
            let b_end = target.b_offset + self.rank * target.out_len;
            if a_end.max(b_end) > self.adapter_stride || target.out_start + target.out_len > self.out_dim {
                let why = format!("target {n} reaches beyond the adapter row or the outputs");
                return Err(Error::Unsupported { op, why });
            }
        }
        check_probability(op, self.dropout)
    }
}

/// Fails unless norm and adapted layer have the same rows.
fn check_norm(op: &'static str, norm: &RmsNormDims, dims: &LoraDims<'_>) -> Result<()> {
    if (norm.rows, norm.cols) == (dims.tokens, dims.in_dim) {
        return Ok(());
    }
    let found = format!("{} rows of {} for the norm", norm.rows, norm.cols);
    let why = format!("{found}, {} rows of {} for the layer", dims.tokens, dims.in_dim);
    Err(Error::Unsupported { op, why })
}

/// Fails unless a weight of this length has the layer's rows, with room for the device behind each or without.
fn check_weight<D: LoraLinear<X>, X: Real>(op: &'static str, len: usize, dims: &LoraDims<'_>) -> Result<()> {
    if len == dims.out_dim * D::lora_weight_stride(dims.in_dim) {
        return Ok(());
    }
    expect_len(op, "w", len, dims.out_dim * dims.in_dim)
}

/// Arguments of [`LoraLinear::rmsnorm_lora_forward`].
pub struct RmsNormLoraForward<'input, 'inv_rms, 'x, 'w_norm, 'adapters, 'segments, 'dims, D: Device, X: Real>
{
    /// The adapter input: rows `= rmsnorm(x)`, and its s `=`.
    pub input: D::ViewMut<'input, X>,
    /// `[T]` `= 1 / rms(x)`.
    pub inv_rms: D::ViewMut<'inv_rms, X::Acc>,
    /// `[T, in_dim]` at `norm.x_stride`.
    pub x: D::View<'x, X>,
    /// `[in_dim]`.
    pub w_norm: D::View<'w_norm, X>,
    /// `[jobs, adapter_stride]`.
    pub adapters: D::View<'adapters, X::Acc>,
    /// Where segments begin, and their adapters, gradient rows and keys.
    pub segments: Segments<'segments, D>,
    /// Rows, columns, stride of x and ε; its `y_stride` is ignored.
    pub norm: RmsNormDims,
    /// Shapes and targets.
    pub dims: LoraDims<'dims>,
}

impl<D: LoraLinear<X>, X: Real> RmsNormLoraForward<'_, '_, '_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "rmsnorm_lora_forward";
        self.dims.check_input::<D, X>(OP, self.input.len(), &self.segments)?;
        check_norm(OP, &self.norm, &self.dims)?;
        expect_len(OP, "inv_rms", self.inv_rms.len(), self.norm.rows)?;
        expect_rows(OP, "x", self.x.len(), self.norm.rows, self.norm.cols, self.norm.x_stride)?;
        expect_len(OP, "w_norm", self.w_norm.len(), self.norm.cols)
    }
}

/// Arguments of [`LoraLinear::lora_linear_forward`].
pub struct LoraLinearForward<
    'y,
    'input,
    'w,
    'bias,
    'residual,
    'adapters,
    'segments,
    'dims,
    D: Device,
    X: Real,
> {
    /// `[T, out_dim]` `=`.
    pub y: D::ViewMut<'y, X>,
    /// The adapter input, with its s.
    pub input: D::View<'input, X>,
    /// `[out_dim, in_dim]`, or with room for the device behind each row.
    pub w: D::View<'w, X>,
    /// `[out_dim]`; absent it is zero.
    pub bias: Option<D::View<'bias, X>>,
    /// `[T, out_dim]`; absent it is zero.
    pub residual: Option<D::View<'residual, X>>,
    /// `[jobs, adapter_stride]`.
    pub adapters: D::View<'adapters, X::Acc>,
    /// Where segments begin, and their adapters, gradient rows and keys.
    pub segments: Segments<'segments, D>,
    /// Shapes and targets.
    pub dims: LoraDims<'dims>,
}

impl<D: LoraLinear<X>, X: Real> LoraLinearForward<'_, '_, '_, '_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "lora_linear_forward";
        let LoraDims { tokens, out_dim, .. } = self.dims;
        self.dims.check_input::<D, X>(OP, self.input.len(), &self.segments)?;
        expect_len(OP, "y", self.y.len(), tokens * out_dim)?;
        if let Some(bias) = self.bias {
            expect_len(OP, "bias", bias.len(), out_dim)?;
        }
        if let Some(residual) = self.residual {
            expect_len(OP, "residual", residual.len(), tokens * out_dim)?;
        }
        check_weight::<D, X>(OP, self.w.len(), &self.dims)
    }
}

/// Arguments of [`LoraLinear::lora_linear_backward`].
pub struct LoraLinearBackward<
    'd_input,
    'grads,
    'dy,
    'input,
    'w,
    'adapters,
    'segments,
    'dims,
    D: Device,
    X: Real,
> {
    /// An adapter input: its rows `= dy w`, its s `= dy B`.
    pub d_input: D::ViewMut<'d_input, X>,
    /// `[rows, adapter_stride]`: `dB += dyᵀ s`.
    pub grads: D::ViewMut<'grads, X::Acc>,
    /// `[T, out_dim]`.
    pub dy: D::View<'dy, X>,
    /// The adapter input of the forward pass.
    pub input: D::View<'input, X>,
    /// As of the forward pass.
    pub w: D::View<'w, X>,
    /// `[jobs, adapter_stride]`.
    pub adapters: D::View<'adapters, X::Acc>,
    /// Where segments begin, and their adapters, gradient rows and keys.
    pub segments: Segments<'segments, D>,
    /// Shapes and targets.
    pub dims: LoraDims<'dims>,
}

impl<D: LoraLinear<X>, X: Real> LoraLinearBackward<'_, '_, '_, '_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "lora_linear_backward";
        self.dims.check_input::<D, X>(OP, self.input.len(), &self.segments)?;
        expect_len(OP, "d_input", self.d_input.len(), self.input.len())?;
        expect_len(OP, "dy", self.dy.len(), self.dims.tokens * self.dims.out_dim)?;
        check_weight::<D, X>(OP, self.w.len(), &self.dims)
    }
}

/// Arguments of [`LoraLinear::lora_down_backward`].
pub struct LoraDownBackward<'d_input, 'grads, 'input, 'adapters, 'segments, 'dims, D: Device, X: Real> {
    /// An adapter input: rows `+= (α/r) mask ⊙ (ds A)`; its s part is ds.
    pub d_input: D::ViewMut<'d_input, X>,
    /// `[rows, adapter_stride]`: `dA += (α/r) dsᵀ drop(x)`; empty where A is frozen.
    pub grads: D::ViewMut<'grads, X::Acc>,
    /// The adapter input of the forward pass, whose rows are x.
    pub input: D::View<'input, X>,
    /// `[jobs, adapter_stride]`.
    pub adapters: D::View<'adapters, X::Acc>,
    /// Where segments begin, and their adapters, gradient rows and keys.
    pub segments: Segments<'segments, D>,
    /// Shapes and targets.
    pub dims: LoraDims<'dims>,
}

impl<D: LoraLinear<X>, X: Real> LoraDownBackward<'_, '_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "lora_down_backward";
        self.dims.check_input::<D, X>(OP, self.input.len(), &self.segments)?;
        expect_len(OP, "d_input", self.d_input.len(), self.input.len())
    }
}

/// Arguments of [`LoraLinear::rmsnorm_lora_backward`].
pub struct RmsNormLoraBackward<
    'dx,
    'd_input,
    'grads,
    'x,
    'input,
    'inv_rms,
    'w_norm,
    'adapters,
    'segments,
    'dims,
    D: Device,
    X: Real,
> {
    /// `[T, in_dim]` at `norm.x_stride`, `+=`.
    pub dx: D::ViewMut<'dx, X>,
    /// An adapter input: `dy w` and ds on entry, anything after.
    pub d_input: D::ViewMut<'d_input, X>,
    /// `[rows, adapter_stride]`: dA `+=`; empty where A is frozen.
    pub grads: D::ViewMut<'grads, X::Acc>,
    /// `[T, in_dim]`, the input of the norm.
    pub x: D::View<'x, X>,
    /// The adapter input of the forward pass.
    pub input: D::View<'input, X>,
    /// `[T]`, as the forward pass left it.
    pub inv_rms: D::View<'inv_rms, X::Acc>,
    /// `[in_dim]`.
    pub w_norm: D::View<'w_norm, X>,
    /// `[jobs, adapter_stride]`.
    pub adapters: D::View<'adapters, X::Acc>,
    /// Where segments begin, and their adapters, gradient rows and keys.
    pub segments: Segments<'segments, D>,
    /// Rows, columns, stride of x and ε; its `y_stride` is ignored.
    pub norm: RmsNormDims,
    /// Shapes and targets.
    pub dims: LoraDims<'dims>,
}

impl<D: LoraLinear<X>, X: Real> RmsNormLoraBackward<'_, '_, '_, '_, '_, '_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "rmsnorm_lora_backward";
        self.dims.check_input::<D, X>(OP, self.input.len(), &self.segments)?;
        check_norm(OP, &self.norm, &self.dims)?;
        expect_len(OP, "d_input", self.d_input.len(), self.input.len())?;
        expect_rows(OP, "dx", self.dx.len(), self.norm.rows, self.norm.cols, self.norm.x_stride)?;
        expect_rows(OP, "x", self.x.len(), self.norm.rows, self.norm.cols, self.norm.x_stride)?;
        expect_len(OP, "inv_rms", self.inv_rms.len(), self.norm.rows)?;
        expect_len(OP, "w_norm", self.w_norm.len(), self.norm.cols)
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
    fn rmsnorm_lora_forward(&self, args: RmsNormLoraForward<Self, X>) -> Result<()>;

    /// `y = residual + bias + x wᵀ + s Bᵀ` (`=`); absent terms are zero.
    fn lora_linear_forward(&self, args: LoraLinearForward<Self, X>) -> Result<()>;

    /// Backward of the up-projection and the frozen product: `dx = dy w`, `ds = dy B`, `dB += dyᵀ s`.
    fn lora_linear_backward(&self, args: LoraLinearBackward<Self, X>) -> Result<()>;

    /// Backward of the down-projection: `dx += (α/r) mask ⊙ (ds A)`, `dA += (α/r) dsᵀ drop(x)`.
    fn lora_down_backward(&self, args: LoraDownBackward<Self, X>) -> Result<()>;

    /// [`Self::lora_down_backward`] and the backward of RMSNorm together.
    fn rmsnorm_lora_backward(&self, args: RmsNormLoraBackward<Self, X>) -> Result<()>;
}
