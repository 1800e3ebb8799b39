//! Residual sum, dropout and RMS norm on CUDA: a block per row.

use super::elementwise::threads_for_row;
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::Result;
use crate::error::expect_len;
use crate::ops::{Out, ResidualNorm, ResidualNormDims};

const MODULE: &str = "residual";
const MAX_THREADS: usize = 512;

impl<X: CudaReal> ResidualNorm<X> for Cuda {
    fn residual_norm_forward(
        &self,
        sum: CudaViewMut<'_, X>,
        y: CudaViewMut<'_, X>,
        inv_rms: CudaViewMut<'_, f32>,
        residual: CudaView<'_, X>,
        w: CudaView<'_, X>,
        keys: CudaView<'_, u64>,
        dims: ResidualNormDims,
    ) -> Result<()> {
        const OP: &str = "residual_norm_forward";
        dims.check(
            OP,
            [("sum", sum.len()), ("y", y.len()), ("residual", residual.len())],
            [inv_rms.len(), w.len(), keys.len()],
        )?;
        let (cols, blocks) = (dims.drop.cols, if dims.drop.cols == 0 { 0 } else { dims.drop.rows });
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&sum).write(&y).write(&inv_rms).read(residual);
        let kernel = kernel.read(w).int(cols).float(dims.eps).drop_mask(keys, &dims.drop);
        // SAFETY: the lengths above; without dropout no key is read.
        unsafe { kernel.run([blocks, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }
    }

    fn residual_norm_backward(
        &self,
        dx: CudaViewMut<'_, X>,
        d_branch: CudaViewMut<'_, X>,
        dy: CudaView<'_, X>,
        x: CudaView<'_, X>,
        inv_rms: CudaView<'_, f32>,
        w: CudaView<'_, X>,
        keys: CudaView<'_, u64>,
        dims: ResidualNormDims,
        out: Out,
    ) -> Result<()> {
        const OP: &str = "residual_norm_backward";
        expect_len(OP, "d_branch", d_branch.len(), dx.len())?;
        dims.check(
            OP,
            [("dx", dx.len()), ("dy", dy.len()), ("x", x.len())],
            [inv_rms.len(), w.len(), keys.len()],
        )?;
        let (cols, blocks) = (dims.drop.cols, if dims.drop.cols == 0 { 0 } else { dims.drop.rows });
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&dx).write(&d_branch).read(dy).read(x);
        let kernel = kernel.read(inv_rms).read(w).int(cols).int((out == Out::Add).into());
        let kernel = kernel.drop_mask(keys, &dims.drop);
        // SAFETY: as above.
        unsafe { kernel.run([blocks, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }
    }
}
