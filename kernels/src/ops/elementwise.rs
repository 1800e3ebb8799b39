//! Sums, scaling and conversion of flat views.

use crate::{Device, Elem, Real, Result};

/// Elementwise arithmetic on views of equal length.
pub trait Elementwise<X: Real>: Device {
    /// `y = a·x + b·y`. With `b = 0` what y held has no influence.
    fn axpby(&self, y: Self::ViewMut<'_, X>, a: f64, x: Self::View<'_, X>, b: f64) -> Result<()>;

    /// `out = x − y` (an update vector: adapter less initial adapter).
    fn difference(&self, out: Self::ViewMut<'_, X>, x: Self::View<'_, X>, y: Self::View<'_, X>)
    -> Result<()>;

    /// `out[i] = x[rows[i]]` for rows of `cols` values (`=`).
    fn gather_rows(
        &self,
        out: Self::ViewMut<'_, X>,
        x: Self::View<'_, X>,
        rows: Self::View<'_, u32>,
        cols: usize,
    ) -> Result<()>;
}

/// Conversion between element types, to the nearest value.
pub trait Cast<From: Elem, To: Elem>: Device {
    /// `dst = src`, converted.
    fn cast(&self, dst: Self::ViewMut<'_, To>, src: Self::View<'_, From>) -> Result<()>;
}
