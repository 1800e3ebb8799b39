//! The joint of two pre-norm sublayers: residual sum, dropout of the branch and RMS norm in one pass.
//!
//! Forward ends a sublayer and begins the next one; backward is the mirror: it ends the backward
//! pass of the later sublayer and begins that of the earlier one. Each is the same as
//! [`Dropout::dropout`], a sum and [`RmsNorm`] one after the other, without rounding to X between
//! dropout and sum. Rows are contiguous.
//!
//! [`Dropout::dropout`]: super::Dropout::dropout
//! [`RmsNorm`]: super::RmsNorm

use super::{DropoutDims, Out};
use crate::error::expect_len;
use crate::{Device, Real, Result, View, ViewMut};

/// Shapes of such a joint.
#[derive(Clone, Copy, Debug)]
pub struct ResidualNormDims {
    /// Rows, columns, and the branch's dropout; its `p` may be 0.
    pub drop: DropoutDims,
    /// ε of the norm, added to the mean square.
    pub eps: f64,
}

impl ResidualNormDims {
    /// Fails unless the matrices are `[rows, cols]`, and `inv_rms`, `w` and `keys` as long as they
    /// must be.
    fn check(
        &self,
        op: &'static str,
        matrices: [(&'static str, usize); 3],
        [inv_rms, w, keys]: [usize; 3],
    ) -> Result<()> {
        let DropoutDims { rows, cols, .. } = self.drop;
        for (what, found) in matrices {
            expect_len(op, what, found, rows * cols)?;
        }
        expect_len(op, "inv_rms", inv_rms, rows)?;
        expect_len(op, "w", w, cols)?;
        self.drop.check(op, keys)
    }
}

/// Arguments of [`ResidualNorm::residual_norm_forward`].
pub struct ResidualNormForward<'sum, 'y, 'inv_rms, 'residual, 'w, 'keys, D: Device, X: Real> {
    /// `[rows, cols]`: the branch on entry, `residual + mask ⊙ branch / (1 − p)` after.
    pub sum: D::ViewMut<'sum, X>,
    /// `[rows, cols]` `= sum / rms(sum) · w`.
    pub y: D::ViewMut<'y, X>,
    /// `[rows]` `= 1 / rms(sum)`.
    pub inv_rms: D::ViewMut<'inv_rms, X::Acc>,
    /// `[rows, cols]`.
    pub residual: D::View<'residual, X>,
    /// `[cols]`.
    pub w: D::View<'w, X>,
    /// A key for every example, as of dropout.
    pub keys: D::View<'keys, u64>,
    /// Shapes.
    pub dims: ResidualNormDims,
}

impl<D: Device, X: Real> ResidualNormForward<'_, '_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        let matrices = [("sum", self.sum.len()), ("y", self.y.len()), ("residual", self.residual.len())];
        let others = [self.inv_rms.len(), self.w.len(), self.keys.len()];
        self.dims.check("residual_norm_forward", matrices, others)
    }
}

/// Arguments of [`ResidualNorm::residual_norm_backward`].
pub struct ResidualNormBackward<'dx, 'd_branch, 'dy, 'x, 'inv_rms, 'w, 'keys, D: Device, X: Real> {
    /// `[rows, cols]`: the gradient of x by the norm, assigned or added to as `out` says.
    pub dx: D::ViewMut<'dx, X>,
    /// `[rows, cols]` `= mask ⊙ dx / (1 − p)`.
    pub d_branch: D::ViewMut<'d_branch, X>,
    /// `[rows, cols]`: the gradient of the norm's output.
    pub dy: D::View<'dy, X>,
    /// `[rows, cols]`: the sum that the forward pass left.
    pub x: D::View<'x, X>,
    /// `[rows]`.
    pub inv_rms: D::View<'inv_rms, X::Acc>,
    /// `[cols]`.
    pub w: D::View<'w, X>,
    /// A key for every example, as of dropout.
    pub keys: D::View<'keys, u64>,
    /// Shapes.
    pub dims: ResidualNormDims,
    /// Whether `dx` is assigned or added to.
    pub out: Out,
}

impl<D: Device, X: Real> ResidualNormBackward<'_, '_, '_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "residual_norm_backward";
        expect_len(OP, "d_branch", self.d_branch.len(), self.dx.len())?;
        let matrices = [("dx", self.dx.len()), ("dy", self.dy.len()), ("x", self.x.len())];
        self.dims.check(OP, matrices, [self.inv_rms.len(), self.w.len(), self.keys.len()])
    }
}

/// Residual sum with dropout, and the norm after it.
pub trait ResidualNorm<X: Real>: Device {
    /// `sum = residual + mask ⊙ branch / (1 − p)` in the place of the branch; then its norm.
    fn residual_norm_forward(&self, args: ResidualNormForward<Self, X>) -> Result<()>;

    /// `dx (=|+=)` the gradient of x by the norm; then `d_branch = mask ⊙ dx / (1 − p)`.
    fn residual_norm_backward(&self, args: ResidualNormBackward<Self, X>) -> Result<()>;
}
