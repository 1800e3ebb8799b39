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
use crate::{Device, Real, Result};

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
    pub(crate) fn check(
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

/// Residual sum with dropout, and the norm after it.
pub trait ResidualNorm<X: Real>: Device {
    /// `sum` `[rows, cols]` holds the branch and becomes `residual + mask ⊙ branch / (1 − p)`;
    /// then `inv_rms` `[rows]` `= 1 / rms(sum)` and `y = sum / rms(sum) · w`. `keys` as of dropout.
    fn residual_norm_forward(
        &self,
        sum: Self::ViewMut<'_, X>,
        y: Self::ViewMut<'_, X>,
        inv_rms: Self::ViewMut<'_, X::Acc>,
        residual: Self::View<'_, X>,
        w: Self::View<'_, X>,
        keys: Self::View<'_, u64>,
        dims: ResidualNormDims,
    ) -> Result<()>;

    /// `dx (=|+=)` the gradient of x by the norm, whose output's is `dy`; then
    /// `d_branch = mask ⊙ dx / (1 − p)`. `x` is the sum that forward left.
    fn residual_norm_backward(
        &self,
        dx: Self::ViewMut<'_, X>,
        d_branch: Self::ViewMut<'_, X>,
        dy: Self::View<'_, X>,
        x: Self::View<'_, X>,
        inv_rms: Self::View<'_, X::Acc>,
        w: Self::View<'_, X>,
        keys: Self::View<'_, u64>,
        dims: ResidualNormDims,
        out: Out,
    ) -> Result<()>;
}
