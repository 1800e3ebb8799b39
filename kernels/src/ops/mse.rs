//! Squared error over rows, and its gradient.

use crate::error::expect_len;
use crate::{Device, Real, Result, View, ViewMut};

/// Shapes of the squared error.
#[derive(Clone, Copy, Debug)]
pub struct MseDims {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// `d_pred = grad_scale · (pred − target)`; 2/(number of elements) for the mean.
    pub grad_scale: f64,
}

/// Arguments of [`Mse::mse`].
pub struct SquaredError<'sums, 'd_pred, 'pred, 'target, D: Device, X: Real> {
    /// `[rows]` `= Σ_cols (pred − target)²`.
    pub sums: D::ViewMut<'sums, X::Acc>,
    /// `[rows, cols]` `=`, where asked for.
    pub d_pred: Option<D::ViewMut<'d_pred, X>>,
    /// `[rows, cols]`.
    pub pred: D::View<'pred, X>,
    /// `[rows, cols]`.
    pub target: D::View<'target, X>,
    /// Shapes.
    pub dims: MseDims,
}

impl<D: Device, X: Real> SquaredError<'_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "mse";
        let MseDims { rows, cols, .. } = self.dims;
        expect_len(OP, "sums", self.sums.len(), rows)?;
        expect_len(OP, "pred", self.pred.len(), rows * cols)?;
        expect_len(OP, "target", self.target.len(), rows * cols)?;
        match &self.d_pred {
            Some(d_pred) => expect_len(OP, "d_pred", d_pred.len(), rows * cols),
            None => Ok(()),
        }
    }
}

/// Squared error.
pub trait Mse<X: Real>: Device {
    /// Squared errors of every row, and the gradient where asked for.
    fn mse(&self, args: SquaredError<Self, X>) -> Result<()>;
}
