//! Linear layer without adapters: `y = [residual +] x Wᵀ + b`.

use super::Out;
use crate::{Device, Real, Result};

/// Shapes of a linear layer on `rows` rows.
#[derive(Clone, Copy, Debug)]
pub struct LinearDims {
    /// Rows of x and y.
    pub rows: usize,
    /// Columns of x.
    pub in_dim: usize,
    /// Columns of y.
    pub out_dim: usize,
    /// Row stride of x (and dx); y, residual and dy are contiguous.
    pub x_stride: usize,
}

impl LinearDims {
    /// Contiguous x.
    pub fn new(rows: usize, in_dim: usize, out_dim: usize) -> Self {
        Self { rows, in_dim, out_dim, x_stride: in_dim }
    }
}

/// Linear layers. `w` is `[out_dim, in_dim]`, `bias` `[out_dim]`.
pub trait Linear<X: Real>: Device {
    /// `y = residual + x wᵀ + bias` (`=`); absent terms are zero.
    fn linear_forward(
        &self,
        y: Self::ViewMut<'_, X>,
        x: Self::View<'_, X>,
        w: Self::View<'_, X>,
        bias: Option<Self::View<'_, X>>,
        residual: Option<Self::View<'_, X>>,
        dims: LinearDims,
    ) -> Result<()>;

    /// `dx (=|+=) dy w`.
    fn linear_backward_input(
        &self,
        dx: Self::ViewMut<'_, X>,
        dy: Self::View<'_, X>,
        w: Self::View<'_, X>,
        dims: LinearDims,
        out: Out,
    ) -> Result<()>;

    /// `dw (=|+=) dyᵀ x`, `dbias (=|+=) Σ_rows dy`.
    fn linear_backward_weight(
        &self,
        dw: Self::ViewMut<'_, X::Acc>,
        dbias: Option<Self::ViewMut<'_, X::Acc>>,
        dy: Self::View<'_, X>,
        x: Self::View<'_, X>,
        dims: LinearDims,
        out: Out,
    ) -> Result<()>;
}
