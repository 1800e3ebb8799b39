//! RMS layer norm without mean or bias: `y = x / rms(x) · w`, `rms(x) = √(mean(x²) + ε)`.
//!
//! T5's layer norm is the same function, so the T5 stacks use this operation too.
//! Backward, with `x̂ = x / rms`: `dx = (w ⊙ dy − x̂ · mean(w ⊙ dy ⊙ x̂)) / rms`,
//! `dw = Σ_rows dy ⊙ x̂`.

use super::Out;
use crate::error::{expect_len, expect_rows};
use crate::{Device, Real, Result, View, ViewMut};

/// Shapes of a norm over rows.
#[derive(Clone, Copy, Debug)]
pub struct RmsNormDims {
    /// Rows.
    pub rows: usize,
    /// Values that are normalised together.
    pub cols: usize,
    /// Row stride of x and dx.
    pub x_stride: usize,
    /// Row stride of y and dy.
    pub y_stride: usize,
    /// ε, added to the mean square.
    pub eps: f64,
}

impl RmsNormDims {
    /// Contiguous rows.
    pub fn new(rows: usize, cols: usize, eps: f64) -> Self {
        Self { rows, cols, x_stride: cols, y_stride: cols, eps }
    }
}

/// Arguments of [`RmsNorm::rmsnorm_forward`].
pub struct RmsNormForward<'y, 'inv_rms, 'x, 'w, D: Device, X: Real> {
    /// `[rows, cols]` at `dims.y_stride`, `=`.
    pub y: D::ViewMut<'y, X>,
    /// `[rows]` `= 1 / rms(x)`.
    pub inv_rms: D::ViewMut<'inv_rms, X::Acc>,
    /// `[rows, cols]` at `dims.x_stride`.
    pub x: D::View<'x, X>,
    /// `[cols]`.
    pub w: D::View<'w, X>,
    /// Shapes.
    pub dims: RmsNormDims,
}

impl<D: Device, X: Real> RmsNormForward<'_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "rmsnorm_forward";
        let RmsNormDims { rows, cols, x_stride, y_stride, .. } = self.dims;
        expect_rows(OP, "y", self.y.len(), rows, cols, y_stride)?;
        expect_len(OP, "inv_rms", self.inv_rms.len(), rows)?;
        expect_rows(OP, "x", self.x.len(), rows, cols, x_stride)?;
        expect_len(OP, "w", self.w.len(), cols)
    }
}

/// Arguments of [`RmsNorm::rmsnorm_backward`].
pub struct RmsNormBackward<'dx, 'dw, 'dy, 'x, 'inv_rms, 'w, D: Device, X: Real> {
    /// `[rows, cols]` at `dims.x_stride`, assigned or added to as `out` says.
    pub dx: D::ViewMut<'dx, X>,
    /// `[cols]` `+=`, where asked for.
    pub dw: Option<D::ViewMut<'dw, X::Acc>>,
    /// `[rows, cols]` at `dims.y_stride`.
    pub dy: D::View<'dy, X>,
    /// As of the forward pass.
    pub x: D::View<'x, X>,
    /// `[rows]`, as the forward pass left it.
    pub inv_rms: D::View<'inv_rms, X::Acc>,
    /// `[cols]`.
    pub w: D::View<'w, X>,
    /// Shapes.
    pub dims: RmsNormDims,
    /// Whether `dx` is assigned or added to.
    pub out: Out,
}

impl<D: Device, X: Real> RmsNormBackward<'_, '_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "rmsnorm_backward";
        let RmsNormDims { rows, cols, x_stride, y_stride, .. } = self.dims;
        expect_rows(OP, "dx", self.dx.len(), rows, cols, x_stride)?;
        expect_rows(OP, "dy", self.dy.len(), rows, cols, y_stride)?;
        expect_rows(OP, "x", self.x.len(), rows, cols, x_stride)?;
        expect_len(OP, "inv_rms", self.inv_rms.len(), rows)?;
        expect_len(OP, "w", self.w.len(), cols)?;
        match &self.dw {
            Some(dw) => expect_len(OP, "dw", dw.len(), cols),
            None => Ok(()),
        }
    }
}

/// Arguments of [`RmsNorm::rmsnorm_backward_weight`].
pub struct RmsNormBackwardWeight<'dw, 'dy, 'x, 'inv_rms, D: Device, X: Real> {
    /// `[cols]`, assigned or added to as `out` says.
    pub dw: D::ViewMut<'dw, X::Acc>,
    /// `[rows, cols]` at `dims.y_stride`.
    pub dy: D::View<'dy, X>,
    /// As of the forward pass.
    pub x: D::View<'x, X>,
    /// `[rows]`, as the forward pass left it.
    pub inv_rms: D::View<'inv_rms, X::Acc>,
    /// Shapes.
    pub dims: RmsNormDims,
    /// Whether `dw` is assigned or added to.
    pub out: Out,
}

impl<D: Device, X: Real> RmsNormBackwardWeight<'_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "rmsnorm_backward_weight";
        let RmsNormDims { rows, cols, x_stride, y_stride, .. } = self.dims;
        expect_len(OP, "dw", self.dw.len(), cols)?;
        expect_rows(OP, "dy", self.dy.len(), rows, cols, y_stride)?;
        expect_rows(OP, "x", self.x.len(), rows, cols, x_stride)?;
        expect_len(OP, "inv_rms", self.inv_rms.len(), rows)
    }
}

/// RMS layer norm.
pub trait RmsNorm<X: Real>: Device {
    /// `y = x / rms(x) · w`, and `1 / rms(x)` of every row.
    fn rmsnorm_forward(&self, args: RmsNormForward<Self, X>) -> Result<()>;

    /// Gradients of x, and of w where asked for.
    fn rmsnorm_backward(&self, args: RmsNormBackward<Self, X>) -> Result<()>;

    /// `dw` `[cols]` `(=|+=) Σ_rows dy ⊙ x̂`: the part of [`Self::rmsnorm_backward`] for the weight.
    fn rmsnorm_backward_weight(&self, args: RmsNormBackwardWeight<Self, X>) -> Result<()>;
}
