//! RMS layer norm on CUDA: a block per row; the gradient of the weight a block per 32 columns.

use super::elementwise::threads_for_row;
use super::{Cuda, CudaReal};
use crate::error::Result;
use crate::ops::{Out, RmsNorm, RmsNormBackward, RmsNormBackwardWeight, RmsNormDims, RmsNormForward};

const MODULE: &str = "rmsnorm";
const MAX_THREADS: usize = 512;
/// Columns of a block of a kernel made with `column_sums` (`cu/common.cuh`), and its threads.
pub(super) const COLUMN_BLOCK: usize = 32;
pub(super) const COLUMN_THREADS: usize = COLUMN_BLOCK * COLUMN_BLOCK;

impl<X: CudaReal> RmsNorm<X> for Cuda {
    fn rmsnorm_forward(&self, args: RmsNormForward<Self, X>) -> Result<()> {
        args.check()?;
        let RmsNormForward { y, inv_rms, x, w, dims } = args;
        const OP: &str = "rmsnorm_forward";
        let RmsNormDims { rows, cols, x_stride, y_stride, eps } = dims;
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&y).write(&inv_rms).read(x).read(w);
        let kernel = kernel.int(cols).long(x_stride).long(y_stride).float(eps);
        let blocks = if cols == 0 { 0 } else { rows };
        // SAFETY: the lengths checked above.
        unsafe { kernel.run([blocks, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }
    }

    fn rmsnorm_backward(&self, args: RmsNormBackward<Self, X>) -> Result<()> {
        args.check()?;
        let RmsNormBackward { dx, dw, dy, x, inv_rms, w, dims, out } = args;
        const OP: &str = "rmsnorm_backward";
        let RmsNormDims { rows, cols, x_stride, y_stride, .. } = dims;
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&dx).read(dy).read(x).read(inv_rms).read(w);
        let kernel = kernel.int(cols).long(x_stride).long(y_stride).int((out == Out::Add).into());
        let blocks = if cols == 0 { 0 } else { rows };
        // SAFETY: the lengths checked above.
        unsafe { kernel.run([blocks, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }?;
        match dw {
            Some(dw) => self.rmsnorm_backward_weight(RmsNormBackwardWeight {
                dw,
                dy,
                x,
                inv_rms,
                dims,
                out: Out::Add,
            }),
            None => Ok(()),
        }
    }

    fn rmsnorm_backward_weight(&self, args: RmsNormBackwardWeight<Self, X>) -> Result<()> {
        args.check()?;
        let RmsNormBackwardWeight { dw, dy, x, inv_rms, dims, out } = args;
        const OP: &str = "rmsnorm_backward_weight";
        let RmsNormDims { rows, cols, x_stride, y_stride, .. } = dims;
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&dw).read(dy).read(x).read(inv_rms);
        let kernel = kernel.int(rows).int(cols).long(x_stride).long(y_stride).int((out == Out::Add).into());
        // SAFETY: the lengths checked above.
        unsafe { kernel.run([cols.div_ceil(COLUMN_BLOCK), 1, 1], COLUMN_THREADS, 0) }
    }
}
