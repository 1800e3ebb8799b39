//! Dropout of whole rows' elements, in place; the mask is drawn again in backward.

use crate::{Device, Real, Result};

/// Shapes of dropout. Example b owns rows `b·rows_per_key ..`.
#[derive(Clone, Copy, Debug)]
pub struct DropoutDims {
    /// Rows; a multiple of `rows_per_key`.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Rows that share a key.
    pub rows_per_key: usize,
    /// Probability of dropping; 0 does nothing.
    pub p: f64,
    /// Number of this place's masks.
    pub site: u32,
}

/// Dropout.
pub trait Dropout<X: Real>: Device {
    /// `x = mask ⊙ x / (1 − p)`, in place; forward and backward alike (apply it to dx).
    ///
    /// Element c of row i within its example is kept when word `c % 4` of
    /// `philox(keys[b], [i, c / 4, site, DROPOUT_STREAM])` passes.
    fn dropout(&self, x: Self::ViewMut<'_, X>, keys: Self::View<'_, u64>, dims: DropoutDims) -> Result<()>;
}
