//! Dropout on the CPU: masks are drawn for many elements at a time and never stored.

use super::mask::{MASK_BLOCK, mask_words};
use super::simd::{Level, Task, dispatch};
use super::{Cpu, CpuReal};
use crate::error::{Error, Result, expect_len};
use crate::ops::{Dropout, DropoutDims};
use crate::rng::drop_threshold;

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
        let DropoutDims { cols, rows_per_key, p, site, .. } = self.dims;
        let threshold = drop_threshold(p);
        let scale = X::from_f64(1.0 / (1.0 - p));
        for (i, x) in self.x.chunks_exact_mut(cols).enumerate() {
            let row = self.first + i;
            let key = self.keys[row / rows_per_key];
            let counter = (row % rows_per_key) as u32;
            for (b, x) in x.chunks_mut(MASK_BLOCK).enumerate() {
                let words = mask_words(key, counter, site, b);
                let words = &words[..x.len()];
                for c in 0..x.len() {
                    x[c] = if words[c] >= threshold { x[c] * scale } else { X::zero() };
                }
            }
        }
    }
}

impl<X: CpuReal> Dropout<X> for Cpu {
    fn dropout(&self, x: &mut [X], keys: &[u64], dims: DropoutDims) -> Result<()> {
        let _timed = self.timed("dropout");
        const OP: &str = "dropout";
        let DropoutDims { rows, cols, rows_per_key, p, .. } = dims;
        expect_len(OP, "x", x.len(), rows * cols)?;
        if !(0.0..1.0).contains(&p) {
            return Err(Error::Unsupported { op: OP, why: format!("probability {p} is not in [0, 1)") });
        }
        if p == 0.0 || x.is_empty() {
            return Ok(());
        }
        if rows_per_key == 0 || !rows.is_multiple_of(rows_per_key) {
            let why = format!("{rows} rows are not a multiple of {rows_per_key} rows per key");
            return Err(Error::Unsupported { op: OP, why });
        }
        expect_len(OP, "keys", keys.len(), rows / rows_per_key)?;
        // A random word costs as much as several loads.
        let k = self.rows_per_part(rows, 8 * cols);
        self.for_parts(x.chunks_mut(k * cols).enumerate(), |(i, x)| {
            dispatch(Rows { x, first: i * k, keys, dims });
        });
        Ok(())
    }
}
