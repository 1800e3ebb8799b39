//! Layer norm: `y = (x − μ) / σ · w + b` with `μ = mean(x)`, `σ = √(mean((x − μ)²) + ε)`.
//!
//! Backward, with `x̂ = (x − μ) / σ` and `g = w ⊙ dy`: `dx = (g − mean(g) − x̂ · mean(g ⊙ x̂)) / σ`,
//! `dw = Σ_rows dy ⊙ x̂`, `db = Σ_rows dy`.

use super::{Out, RmsNormDims};
use crate::error::{expect_len, expect_rows};
use crate::{Device, Real, Result, View, ViewMut};

/// Arguments of [`LayerNorm::layernorm_forward`].
pub struct LayerNormForward<'y, 'stats, 'x, 'w, 'b, D: Device, X: Real> {
    /// `[rows, cols]` at `dims.y_stride`, `=`.
    pub y: D::ViewMut<'y, X>,
    /// `[2, rows]` `=`: μ of every row, then 1 / σ of every row.
    pub stats: D::ViewMut<'stats, X::Acc>,
    /// `[rows, cols]` at `dims.x_stride`.
    pub x: D::View<'x, X>,
    /// `[cols]`.
    pub w: D::View<'w, X>,
    /// `[cols]`.
    pub b: D::View<'b, X>,
    /// Shapes; ε is added to the variance.
    pub dims: RmsNormDims,
}

impl<D: Device, X: Real> LayerNormForward<'_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "layernorm_forward";
        let RmsNormDims { rows, cols, x_stride, y_stride, .. } = self.dims;
        expect_rows(OP, "y", self.y.len(), rows, cols, y_stride)?;
        expect_len(OP, "stats", self.stats.len(), 2 * rows)?;
        expect_rows(OP, "x", self.x.len(), rows, cols, x_stride)?;
        expect_len(OP, "w", self.w.len(), cols)?;
        expect_len(OP, "b", self.b.len(), cols)
    }
}

/// Arguments of [`LayerNorm::layernorm_backward`].
pub struct LayerNormBackward<'dx, 'dw, 'dy, 'x, 'stats, 'w, D: Device, X: Real> {
    /// `[rows, cols]` at `dims.x_stride`, assigned or added to as `out` says.
    pub dx: D::ViewMut<'dx, X>,
    /// dw and db, `[cols]` `+=` each, where asked for.
    pub dw_db: Option<[D::ViewMut<'dw, X::Acc>; 2]>,
    /// `[rows, cols]` at `dims.y_stride`.
    pub dy: D::View<'dy, X>,
    /// As of the forward pass.
    pub x: D::View<'x, X>,
    /// `[2, rows]`, as the forward pass left it.
    pub stats: D::View<'stats, X::Acc>,
    /// `[cols]`.
    pub w: D::View<'w, X>,
    /// Shapes.
    pub dims: RmsNormDims,
    /// Whether `dx` is assigned or added to.
    pub out: Out,
}

impl<D: Device, X: Real> LayerNormBackward<'_, '_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "layernorm_backward";
        let RmsNormDims { rows, cols, x_stride, y_stride, .. } = self.dims;
        expect_rows(OP, "dx", self.dx.len(), rows, cols, x_stride)?;
        expect_rows(OP, "dy", self.dy.len(), rows, cols, y_stride)?;
        expect_rows(OP, "x", self.x.len(), rows, cols, x_stride)?;
        expect_len(OP, "stats", self.stats.len(), 2 * rows)?;
        expect_len(OP, "w", self.w.len(), cols)?;
        self.dw_db.iter().flatten().try_for_each(|d| expect_len(OP, "dw or db", d.len(), cols))
    }
}

/// Layer norm.
pub trait LayerNorm<X: Real>: Device {
    /// `y = (x − μ) / σ · w + b`, and μ and 1 / σ of every row.
    fn layernorm_forward(&self, args: LayerNormForward<Self, X>) -> Result<()>;

    /// Gradients of x, and of w and b where asked for.
    fn layernorm_backward(&self, args: LayerNormBackward<Self, X>) -> Result<()>;
}
