//! Residual sum, dropout and RMS norm on CUDA: a block per row.

use super::elementwise::threads_for_row;
use super::{Cuda, CudaReal};
use crate::Result;
use crate::ops::{Out, ResidualNorm, ResidualNormBackward, ResidualNormForward};

const MODULE: &str = "residual";
const MAX_THREADS: usize = 512;

impl<X: CudaReal> ResidualNorm<X> for Cuda {
    fn residual_norm_forward(&self, args: ResidualNormForward<Self, X>) -> Result<()> {
        args.check()?;
        let ResidualNormForward { sum, y, inv_rms, residual, w, keys, dims } = args;
        const OP: &str = "residual_norm_forward";
        let (cols, blocks) = (dims.drop.cols, if dims.drop.cols == 0 { 0 } else { dims.drop.rows });
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&sum).write(&y).write(&inv_rms).read(residual);
        let kernel = kernel.read(w).int(cols).float(dims.eps).drop_mask(keys, &dims.drop);
        // SAFETY: the lengths checked above; without dropout no key is read.
        unsafe { kernel.run([blocks, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }
    }

    fn residual_norm_backward(&self, args: ResidualNormBackward<Self, X>) -> Result<()> {
        args.check()?;
        let ResidualNormBackward { dx, d_branch, dy, x, inv_rms, w, keys, dims, out } = args;
        const OP: &str = "residual_norm_backward";
        let (cols, blocks) = (dims.drop.cols, if dims.drop.cols == 0 { 0 } else { dims.drop.rows });
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&dx).write(&d_branch).read(dy).read(x);
        let kernel = kernel.read(inv_rms).read(w).int(cols).int((out == Out::Add).into());
        let kernel = kernel.drop_mask(keys, &dims.drop);
        // SAFETY: as above.
        unsafe { kernel.run([blocks, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }
    }
}
