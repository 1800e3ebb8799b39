//! RMS layer norm on CUDA: a block per row; the gradient of the weight a block per 32 columns.

use super::elementwise::threads_for_row;
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::error::{Result, expect_len, expect_rows};
use crate::ops::{Out, RmsNorm, RmsNormDims};

const MODULE: &str = "rmsnorm";
const MAX_THREADS: usize = 512;
/// Columns of a block of a kernel made with `column_sums` (`cu/common.cuh`), and its threads.
pub(super) const COLUMN_BLOCK: usize = 32;
pub(super) const COLUMN_THREADS: usize = COLUMN_BLOCK * COLUMN_BLOCK;

impl<X: CudaReal> RmsNorm<X> for Cuda {
    fn rmsnorm_forward(
        &self,
        y: CudaViewMut<'_, X>,
        inv_rms: CudaViewMut<'_, f32>,
        x: CudaView<'_, X>,
        w: CudaView<'_, X>,
        dims: RmsNormDims,
    ) -> Result<()> {
        const OP: &str = "rmsnorm_forward";
        let RmsNormDims { rows, cols, x_stride, y_stride, eps } = dims;
        expect_rows(OP, "y", y.len(), rows, cols, y_stride)?;
        expect_len(OP, "inv_rms", inv_rms.len(), rows)?;
        expect_rows(OP, "x", x.len(), rows, cols, x_stride)?;
        expect_len(OP, "w", w.len(), cols)?;
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&y).write(&inv_rms).read(x).read(w);
        let kernel = kernel.int(cols).long(x_stride).long(y_stride).float(eps);
        let blocks = if cols == 0 { 0 } else { rows };
        // SAFETY: the lengths above.
        unsafe { kernel.run([blocks, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }
    }

    fn rmsnorm_backward(
        &self,
        dx: CudaViewMut<'_, X>,
        dw: Option<CudaViewMut<'_, f32>>,
        dy: CudaView<'_, X>,
        x: CudaView<'_, X>,
        inv_rms: CudaView<'_, f32>,
        w: CudaView<'_, X>,
        dims: RmsNormDims,
        out: Out,
    ) -> Result<()> {
        const OP: &str = "rmsnorm_backward";
        let RmsNormDims { rows, cols, x_stride, y_stride, .. } = dims;
        expect_rows(OP, "dx", dx.len(), rows, cols, x_stride)?;
        expect_rows(OP, "dy", dy.len(), rows, cols, y_stride)?;
        expect_rows(OP, "x", x.len(), rows, cols, x_stride)?;
        expect_len(OP, "inv_rms", inv_rms.len(), rows)?;
        expect_len(OP, "w", w.len(), cols)?;
        if let Some(dw) = &dw {
            expect_len(OP, "dw", dw.len(), cols)?;
        }
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&dx).read(dy).read(x).read(inv_rms).read(w);
        let kernel = kernel.int(cols).long(x_stride).long(y_stride).int((out == Out::Add).into());
        let blocks = if cols == 0 { 0 } else { rows };
        // SAFETY: the lengths above.
        unsafe { kernel.run([blocks, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }?;
        match dw {
            Some(dw) => self.rmsnorm_backward_weight(dw, dy, x, inv_rms, dims, Out::Add),
            None => Ok(()),
        }
    }

    fn rmsnorm_backward_weight(
        &self,
        dw: CudaViewMut<'_, f32>,
        dy: CudaView<'_, X>,
        x: CudaView<'_, X>,
        inv_rms: CudaView<'_, f32>,
        dims: RmsNormDims,
        out: Out,
    ) -> Result<()> {
        const OP: &str = "rmsnorm_backward_weight";
        let RmsNormDims { rows, cols, x_stride, y_stride, .. } = dims;
        expect_len(OP, "dw", dw.len(), cols)?;
        expect_rows(OP, "dy", dy.len(), rows, cols, y_stride)?;
        expect_rows(OP, "x", x.len(), rows, cols, x_stride)?;
        expect_len(OP, "inv_rms", inv_rms.len(), rows)?;
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&dw).read(dy).read(x).read(inv_rms);
        let kernel = kernel.int(rows).int(cols).long(x_stride).long(y_stride).int((out == Out::Add).into());
        // SAFETY: the lengths above.
        unsafe { kernel.run([cols.div_ceil(COLUMN_BLOCK), 1, 1], COLUMN_THREADS, 0) }
    }
}
