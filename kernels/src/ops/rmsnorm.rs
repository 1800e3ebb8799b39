//! RMS layer norm without mean or bias: `y = x / rms(x) · w`, `rms(x) = √(mean(x²) + ε)`.
//!
//! T5's layer norm is the same function, so the T5 stacks use this operation too.
//! Backward, with `x̂ = x / rms`: `dx = (w ⊙ dy − x̂ · mean(w ⊙ dy ⊙ x̂)) / rms`,
//! `dw = Σ_rows dy ⊙ x̂`.

use super::Out;
use crate::{Device, Real, Result};

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

/// RMS layer norm.
pub trait RmsNorm<X: Real>: Device {
    /// `y =`, `inv_rms` `[rows]` `= 1 / rms(x)`; `w` `[cols]`.
    fn rmsnorm_forward(
        &self,
        y: Self::ViewMut<'_, X>,
        inv_rms: Self::ViewMut<'_, X::Acc>,
        x: Self::View<'_, X>,
        w: Self::View<'_, X>,
        dims: RmsNormDims,
    ) -> Result<()>;

    /// `dx (=|+=)`, `dw` `[cols]` `+=` where asked for.
    fn rmsnorm_backward(
        &self,
        dx: Self::ViewMut<'_, X>,
        dw: Option<Self::ViewMut<'_, X::Acc>>,
        dy: Self::View<'_, X>,
        x: Self::View<'_, X>,
        inv_rms: Self::View<'_, X::Acc>,
        w: Self::View<'_, X>,
        dims: RmsNormDims,
        out: Out,
    ) -> Result<()>;

    /// `dw` `[cols]` `(=|+=) Σ_rows dy ⊙ x̂`: the part of [`Self::rmsnorm_backward`] for the weight.
    fn rmsnorm_backward_weight(
        &self,
        dw: Self::ViewMut<'_, X::Acc>,
        dy: Self::View<'_, X>,
        x: Self::View<'_, X>,
        inv_rms: Self::View<'_, X::Acc>,
        dims: RmsNormDims,
        out: Out,
    ) -> Result<()>;
}
