//! Squared error on CUDA: a block per row.

use super::elementwise::threads_for_row;
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::Result;
use crate::error::expect_len;
use crate::ops::{Mse, MseDims};

const MAX_THREADS: usize = 512;

impl<X: CudaReal> Mse<X> for Cuda {
    fn mse(
        &self,
        sums: CudaViewMut<'_, f32>,
        d_pred: Option<CudaViewMut<'_, X>>,
        pred: CudaView<'_, X>,
        target: CudaView<'_, X>,
        dims: MseDims,
    ) -> Result<()> {
        const OP: &str = "mse";
        let MseDims { rows, cols, grad_scale } = dims;
        expect_len(OP, "sums", sums.len(), rows)?;
        expect_len(OP, "pred", pred.len(), rows * cols)?;
        expect_len(OP, "target", target.len(), rows * cols)?;
        if let Some(d_pred) = &d_pred {
            expect_len(OP, "d_pred", d_pred.len(), rows * cols)?;
        }
        let kernel = self.kernel_of::<X>(OP, OP).write(&sums).write_if(&d_pred).read(pred).read(target);
        let kernel = kernel.int(cols).float(grad_scale);
        // SAFETY: the lengths above.
        unsafe { kernel.run([rows, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }
    }
}
