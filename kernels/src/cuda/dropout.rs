//! Dropout on CUDA: a block per row.

use super::elementwise::threads_for_row;
use super::launch::Launch;
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::error::{Result, expect_len};
use crate::ops::{Dropout, DropoutDims};
use crate::rng::drop_threshold;
use crate::{View, ViewMut};

const MAX_THREADS: usize = 256;

impl<'a> Launch<'a> {
    /// The arguments of a dropout mask over rows: `DROP_MASK_PARAMETERS` of `cu/common.cuh`.
    pub(super) fn drop_mask(self, keys: CudaView<'_, u64>, dims: &DropoutDims) -> Launch<'a> {
        let DropoutDims { rows_per_key, p, site, .. } = *dims;
        let launch = self.read(keys).int(rows_per_key).int(site as usize);
        launch.int(drop_threshold(p) as usize).float(1.0 / (1.0 - p))
    }
}

impl<X: CudaReal> Dropout<X> for Cuda {
    fn dropout(&self, x: CudaViewMut<'_, X>, keys: CudaView<'_, u64>, dims: DropoutDims) -> Result<()> {
        const OP: &str = "dropout";
        let DropoutDims { rows, cols, p, .. } = dims;
        expect_len(OP, "x", x.len(), rows * cols)?;
        dims.check(OP, keys.len())?;
        if p == 0.0 || rows * cols == 0 {
            return Ok(());
        }
        let kernel = self.kernel_of::<X>(OP, OP).write(&x).int(cols).drop_mask(keys, &dims);
        // SAFETY: the lengths checked above.
        unsafe { kernel.run([rows, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }
    }
}
