//! Sums, scaling and conversion of flat views.

use crate::{Device, Elem, Real, Result};

/// Elementwise arithmetic on views of equal length.
pub trait Elementwise<X: Real>: Device {
    /// `y = a·x + b·y`. With `b = 0` what y held has no influence.
    fn axpby(&self, y: Self::ViewMut<'_, X>, a: f64, x: Self::View<'_, X>, b: f64) -> Result<()>;

    /// `out = x − y` (an update vector: adapter less initial adapter).
    fn difference(&self, out: Self::ViewMut<'_, X>, x: Self::View<'_, X>, y: Self::View<'_, X>)
    -> Result<()>;

    /// `y[r · cols + c] += row[c]` for the `cols` values of `row`, in every row of y.
    fn add_row(&self, y: Self::ViewMut<'_, X>, row: Self::View<'_, X>) -> Result<()>;

    /// `out[i] = x[rows[i]]` for rows of `cols` values (`=`).
    fn gather_rows(
        &self,
        out: Self::ViewMut<'_, X>,
        x: Self::View<'_, X>,
        rows: Self::View<'_, u32>,
        cols: usize,
    ) -> Result<()>;

    /// `out[r · out_stride + c] = x[r · x_stride + c]` for rows of `cols` values (`=`); what lies between
    /// the rows of `out` stays as it is.
    fn copy_strided(&self, out: Self::ViewMut<'_, X>, x: Self::View<'_, X>, rows: StridedRows) -> Result<()>;

    /// `out[r · stride + c] = std · number r · cols + c` of a key's bell-shaped numbers
    /// ([`rng::bell`](crate::rng::bell)) of standard deviation 1, rounded from f32 to X; what lies
    /// between rows stays as it is. The same values on every device.
    fn random_rows(&self, out: Self::ViewMut<'_, X>, rows: RandomRows) -> Result<()>;
}

/// Rows that lie apart from each other. Strides are in elements, at least `cols`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StridedRows {
    /// Number of rows.
    pub rows: usize,
    /// Values of a row.
    pub cols: usize,
    /// From one row of the output to the next.
    pub out_stride: usize,
    /// From one row of the input to the next.
    pub x_stride: usize,
}

/// Rows of random numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RandomRows {
    /// Number of rows.
    pub rows: usize,
    /// Values of a row.
    pub cols: usize,
    /// Elements from one row to the next.
    pub stride: usize,
    /// Which numbers.
    pub key: u64,
    /// Standard deviation.
    pub std: f64,
}

/// Conversion between element types, to the nearest value.
pub trait Cast<From: Elem, To: Elem>: Device {
    /// `dst = src`, converted.
    fn cast(&self, dst: Self::ViewMut<'_, To>, src: Self::View<'_, From>) -> Result<()>;
}
