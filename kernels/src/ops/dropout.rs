//! Dropout of whole rows' elements, in place; the mask is drawn again in backward.

use crate::error::expect_len;
use crate::{Device, Error, Real, Result};

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

impl DropoutDims {
    /// Fails unless `p` is a probability below 1 and, where something is dropped, `keys` is the number
    /// of examples.
    pub(crate) fn check(&self, op: &'static str, keys: usize) -> Result<()> {
        let Self { rows, cols, rows_per_key, p, .. } = *self;
        check_probability(op, p)?;
        if p == 0.0 || rows * cols == 0 {
            return Ok(());
        }
        if rows_per_key == 0 || !rows.is_multiple_of(rows_per_key) {
            let why = format!("{rows} rows are not a multiple of {rows_per_key} rows per key");
            return Err(Error::Unsupported { op, why });
        }
        expect_len(op, "keys", keys, rows / rows_per_key)
    }
}

/// Fails unless `p` is a probability below 1.
pub(crate) fn check_probability(op: &'static str, p: f64) -> Result<()> {
    if (0.0..1.0).contains(&p) {
        return Ok(());
    }
    Err(Error::Unsupported { op, why: format!("dropout probability {p} is not in [0, 1)") })
}

/// Dropout.
pub trait Dropout<X: Real>: Device {
    /// `x = mask ⊙ x / (1 − p)`, in place; forward and backward alike (apply it to dx).
    ///
    /// Element c of row i within its example is kept when word `c % 4` of
    /// `philox(keys[b], [i, c / 4, site, DROPOUT_STREAM])` passes.
    fn dropout(&self, x: Self::ViewMut<'_, X>, keys: Self::View<'_, u64>, dims: DropoutDims) -> Result<()>;
}
