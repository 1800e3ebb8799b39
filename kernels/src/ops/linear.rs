//! Linear layer without adapters: `y = [residual +] x Wᵀ + b`.

use super::Out;
use crate::error::{expect_len, expect_rows};
use crate::{Device, Real, Result, View, ViewMut};

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

/// Arguments of [`Linear::linear_forward`].
pub struct LinearForward<'y, 'x, 'w, 'bias, 'residual, D: Device, X: Real> {
    /// `[rows, out_dim]` `=`.
    pub y: D::ViewMut<'y, X>,
    /// `[rows, in_dim]` at `dims.x_stride`.
    pub x: D::View<'x, X>,
    /// `[out_dim, in_dim]`.
    pub w: D::View<'w, X>,
    /// `[out_dim]`; absent it is zero.
    pub bias: Option<D::View<'bias, X>>,
    /// `[rows, out_dim]`; absent it is zero.
    pub residual: Option<D::View<'residual, X>>,
    /// Shapes.
    pub dims: LinearDims,
}

impl<D: Device, X: Real> LinearForward<'_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "linear_forward";
        let LinearDims { rows, in_dim, out_dim, x_stride } = self.dims;
        expect_len(OP, "y", self.y.len(), rows * out_dim)?;
        expect_len(OP, "w", self.w.len(), out_dim * in_dim)?;
        expect_rows(OP, "x", self.x.len(), rows, in_dim, x_stride)?;
        if let Some(bias) = self.bias {
            expect_len(OP, "bias", bias.len(), out_dim)?;
        }
        match self.residual {
            Some(residual) => expect_len(OP, "residual", residual.len(), rows * out_dim),
            None => Ok(()),
        }
    }
}

/// Arguments of [`Linear::linear_backward_input`].
pub struct LinearBackwardInput<'dx, 'dy, 'w, D: Device, X: Real> {
    /// `[rows, in_dim]` at `dims.x_stride`, assigned or added to as `out` says.
    pub dx: D::ViewMut<'dx, X>,
    /// `[rows, out_dim]`.
    pub dy: D::View<'dy, X>,
    /// `[out_dim, in_dim]`.
    pub w: D::View<'w, X>,
    /// Shapes.
    pub dims: LinearDims,
    /// Whether `dx` is assigned or added to.
    pub out: Out,
}

impl<D: Device, X: Real> LinearBackwardInput<'_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "linear_backward_input";
        let LinearDims { rows, in_dim, out_dim, x_stride } = self.dims;
        expect_rows(OP, "dx", self.dx.len(), rows, in_dim, x_stride)?;
        expect_len(OP, "dy", self.dy.len(), rows * out_dim)?;
        expect_len(OP, "w", self.w.len(), out_dim * in_dim)
    }
}

/// Arguments of [`Linear::linear_backward_weight`].
pub struct LinearBackwardWeight<'dw, 'dbias, 'dy, 'x, D: Device, X: Real> {
    /// `[out_dim, in_dim]`, assigned or added to as `out` says.
    pub dw: D::ViewMut<'dw, X::Acc>,
    /// `[out_dim]` as `dw`, where asked for.
    pub dbias: Option<D::ViewMut<'dbias, X::Acc>>,
    /// `[rows, out_dim]`.
    pub dy: D::View<'dy, X>,
    /// `[rows, in_dim]` at `dims.x_stride`.
    pub x: D::View<'x, X>,
    /// Shapes.
    pub dims: LinearDims,
    /// Whether `dw` and `dbias` are assigned or added to.
    pub out: Out,
}

impl<D: Device, X: Real> LinearBackwardWeight<'_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "linear_backward_weight";
        let LinearDims { rows, in_dim, out_dim, x_stride } = self.dims;
        expect_len(OP, "dw", self.dw.len(), out_dim * in_dim)?;
        expect_len(OP, "dy", self.dy.len(), rows * out_dim)?;
        expect_rows(OP, "x", self.x.len(), rows, in_dim, x_stride)?;
        match &self.dbias {
            Some(dbias) => expect_len(OP, "dbias", dbias.len(), out_dim),
            None => Ok(()),
        }
    }
}

/// Linear layers. `w` is `[out_dim, in_dim]`, `bias` `[out_dim]`.
pub trait Linear<X: Real>: Device {
    /// `y = residual + x wᵀ + bias` (`=`); absent terms are zero.
    fn linear_forward(&self, args: LinearForward<Self, X>) -> Result<()>;

    /// `dx (=|+=) dy w`.
    fn linear_backward_input(&self, args: LinearBackwardInput<Self, X>) -> Result<()>;

    /// `dw (=|+=) dyᵀ x`, `dbias (=|+=) Σ_rows dy`.
    fn linear_backward_weight(&self, args: LinearBackwardWeight<Self, X>) -> Result<()>;
}
