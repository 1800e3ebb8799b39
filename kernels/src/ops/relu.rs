//! ReLU: `h = max(x, 0)`; its derivative at 0 is 0.

use crate::error::{expect_len, expect_rows};
use crate::{Device, Real, Result};

/// Shapes of a ReLU.
#[derive(Clone, Copy, Debug)]
pub struct ReluDims {
    /// Rows.
    pub rows: usize,
    /// Columns; x and dx are contiguous.
    pub cols: usize,
    /// Row stride of h and dh.
    pub h_stride: usize,
}

impl ReluDims {
    /// Fails unless h (or dh) and x (each of the others) have these lengths.
    pub(crate) fn check(&self, op: &'static str, h: usize, others: &[usize]) -> Result<()> {
        expect_rows(op, "h", h, self.rows, self.cols, self.h_stride)?;
        others.iter().try_for_each(|&x| expect_len(op, "x", x, self.rows * self.cols))
    }
}

/// ReLU.
pub trait Relu<X: Real>: Device {
    /// `h` `[rows, cols]` at `dims.h_stride` `= max(x, 0)`; `x` `[rows, cols]`. NaN stays NaN.
    fn relu_forward(&self, h: Self::ViewMut<'_, X>, x: Self::View<'_, X>, dims: ReluDims) -> Result<()>;

    /// `dx` `[rows, cols]` `= dh` where `x > 0`, else 0; `dh` `[rows, cols]` at `dims.h_stride`.
    fn relu_backward(
        &self,
        dx: Self::ViewMut<'_, X>,
        dh: Self::View<'_, X>,
        x: Self::View<'_, X>,
        dims: ReluDims,
    ) -> Result<()>;
}
