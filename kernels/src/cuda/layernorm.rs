//! Layer norm on CUDA: a block per row; gradients of weight and bias a block per 32 columns.

use super::elementwise::threads_for_row;
use super::rmsnorm::{COLUMN_BLOCK, COLUMN_THREADS};
use super::{Cuda, CudaReal};
use crate::error::Result;
use crate::ops::{LayerNorm, LayerNormBackward, LayerNormForward, Out, RmsNormDims};

const MODULE: &str = "layernorm";
const MAX_THREADS: usize = 512;

impl<X: CudaReal> LayerNorm<X> for Cuda {
    fn layernorm_forward(&self, args: LayerNormForward<Self, X>) -> Result<()> {
        args.check()?;
        let LayerNormForward { y, stats, x, w, b, dims } = args;
        let RmsNormDims { rows, cols, x_stride, y_stride, eps } = dims;
        let kernel = self.kernel_of::<X>(MODULE, "layernorm_forward").write(&y).write(&stats);
        let kernel = kernel.read(x).read(w).read(b).int(cols).long(x_stride).long(y_stride).float(eps);
        let blocks = if cols == 0 { 0 } else { rows };
        // SAFETY: the lengths checked above; the kernel has the number of rows from its grid.
        unsafe { kernel.run([blocks, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }
    }

    fn layernorm_backward(&self, args: LayerNormBackward<Self, X>) -> Result<()> {
        args.check()?;
        let LayerNormBackward { dx, dw_db, dy, x, stats, w, dims, out } = args;
        let RmsNormDims { rows, cols, x_stride, y_stride, .. } = dims;
        let kernel = self.kernel_of::<X>(MODULE, "layernorm_backward").write(&dx).read(dy).read(x);
        let kernel = kernel.read(stats).read(w).int(cols).long(x_stride).long(y_stride);
        let kernel = kernel.int((out == Out::Add).into());
        let blocks = if cols == 0 { 0 } else { rows };
        // SAFETY: as above.
        unsafe { kernel.run([blocks, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }?;
        let Some([dw, db]) = dw_db else { return Ok(()) };
        let kernel = self.kernel_of::<X>(MODULE, "layernorm_backward_weights").write(&dw).write(&db);
        let kernel = kernel.read(dy).read(x).read(stats).int(rows).int(cols).long(x_stride).long(y_stride);
        // SAFETY: as above.
        unsafe { kernel.run([cols.div_ceil(COLUMN_BLOCK), 1, 1], COLUMN_THREADS, 0) }
    }
}
