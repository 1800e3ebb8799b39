//! Squared error over rows, and its gradient.

use crate::{Device, Real, Result};

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

/// Squared error.
pub trait Mse<X: Real>: Device {
    /// `sums` `[rows]` `= Σ_cols (pred − target)²`; `d_pred` `=` where asked for.
    fn mse(
        &self,
        sums: Self::ViewMut<'_, X::Acc>,
        d_pred: Option<Self::ViewMut<'_, X>>,
        pred: Self::View<'_, X>,
        target: Self::View<'_, X>,
        dims: MseDims,
    ) -> Result<()>;
}
