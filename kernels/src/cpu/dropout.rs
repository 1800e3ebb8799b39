//! Dropout on the CPU: masks are drawn for many elements at a time and never stored.

use super::mask::{MASK_BLOCK, mask_words};
use super::simd::{Level, Task, dispatch};
use super::{Cpu, CpuReal};
use crate::error::{Result, expect_len};
use crate::ops::{Dropout, DropoutDims};
use crate::rng::drop_threshold;

/// `x = mask ⊙ x / (1 − p)` for row `row`; nothing if p is 0.
#[inline(always)]
pub(super) fn drop_row<X: CpuReal>(x: &mut [X], row: usize, keys: &[u64], dims: DropoutDims) {
    let DropoutDims { rows_per_key, p, site, .. } = dims;
    if p == 0.0 {
        return;
    }
    let threshold = drop_threshold(p);
    let scale = X::from_f64(1.0 / (1.0 - p));
    let key = keys[row / rows_per_key];
    let counter = (row % rows_per_key) as u32;
    for (b, x) in x.chunks_mut(MASK_BLOCK).enumerate() {
        let words = mask_words(key, counter, site, b);
        let words = &words[..x.len()];
        for c in 0..x.len() {
            x[c] = if words[c] >= threshold { x[c] * scale } else { X::zero() };
        }
    }
}

/// Rows from `first`; x begins there.
struct Rows<'a, X> {
    x: &'a mut [X],
    first: usize,
    keys: &'a [u64],
    dims: DropoutDims,
}

impl<X: CpuReal> Task for Rows<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let cols = self.dims.cols;
        for (i, x) in self.x.chunks_exact_mut(cols).enumerate() {
            drop_row(x, self.first + i, self.keys, self.dims);
        }
    }
}

impl<X: CpuReal> Dropout<X> for Cpu {
    fn dropout(&self, x: &mut [X], keys: &[u64], dims: DropoutDims) -> Result<()> {
        let _timed = self.timed("dropout");
        const OP: &str = "dropout";
        let DropoutDims { rows, cols, p, .. } = dims;
        expect_len(OP, "x", x.len(), rows * cols)?;
        dims.check(OP, keys.len())?;
        if p == 0.0 || x.is_empty() {
            return Ok(());
        }
        // A random word costs as much as several loads.
        let k = self.rows_per_part(rows, 8 * cols);
        self.for_parts(x.chunks_mut(k * cols).enumerate(), |(i, x)| {
            dispatch(Rows { x, first: i * k, keys, dims });
        });
        Ok(())
    }
}
