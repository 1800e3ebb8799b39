//! Dropout on CUDA: a block per row.

use super::elementwise::threads_for_row;
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::error::{Error, Result, expect_len};
use crate::ops::{Dropout, DropoutDims};
use crate::rng::drop_threshold;

const MOST_THREADS: usize = 256;

/// Fails unless `p` is a probability below 1.
pub(super) fn check_probability(op: &'static str, p: f64) -> Result<()> {
    if (0.0..1.0).contains(&p) {
        return Ok(());
    }
    Err(Error::Unsupported { op, why: format!("dropout probability {p} is not in [0, 1)") })
}

impl<X: CudaReal> Dropout<X> for Cuda {
    fn dropout(&self, x: CudaViewMut<'_, X>, keys: CudaView<'_, u64>, dims: DropoutDims) -> Result<()> {
        const OP: &str = "dropout";
        let DropoutDims { rows, cols, rows_per_key, p, site } = dims;
        expect_len(OP, "x", x.len(), rows * cols)?;
        check_probability(OP, p)?;
        if p == 0.0 || rows * cols == 0 {
            return Ok(());
        }
        if rows_per_key == 0 || !rows.is_multiple_of(rows_per_key) {
            let why = format!("{rows} rows are not a multiple of {rows_per_key} rows per key");
            return Err(Error::Unsupported { op: OP, why });
        }
        expect_len(OP, "keys", keys.len(), rows / rows_per_key)?;
        let kernel = self.kernel_of::<X>(OP, OP).write(&x).read(keys).int(cols).int(rows_per_key);
        let kernel = kernel.int(site as usize).int(drop_threshold(p) as usize).float(1.0 / (1.0 - p));
        // SAFETY: the lengths above.
        unsafe { kernel.run([rows, 1, 1], threads_for_row::<X>(cols, MOST_THREADS), 0) }
    }
}
