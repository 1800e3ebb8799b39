//! ReLU on CUDA: a block per row.

use super::elementwise::threads_for_row;
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::ops::{Relu, ReluDims};
use crate::{Result, View, ViewMut};

const MODULE: &str = "relu";
const MAX_THREADS: usize = 256;

impl<X: CudaReal> Relu<X> for Cuda {
    fn relu_forward(&self, h: CudaViewMut<'_, X>, x: CudaView<'_, X>, dims: ReluDims) -> Result<()> {
        const OP: &str = "relu_forward";
        dims.check(OP, h.len(), &[x.len()])?;
        let ReluDims { rows, cols, h_stride } = dims;
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&h).read(x).int(cols).long(h_stride);
        let blocks = if cols == 0 { 0 } else { rows };
        // SAFETY: the lengths checked above.
        unsafe { kernel.run([blocks, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }
    }

    fn relu_backward(
        &self,
        dx: CudaViewMut<'_, X>,
        dh: CudaView<'_, X>,
        x: CudaView<'_, X>,
        dims: ReluDims,
    ) -> Result<()> {
        const OP: &str = "relu_backward";
        dims.check(OP, dh.len(), &[dx.len(), x.len()])?;
        let ReluDims { rows, cols, h_stride } = dims;
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&dx).read(dh).read(x).int(cols).long(h_stride);
        let blocks = if cols == 0 { 0 } else { rows };
        // SAFETY: the lengths checked above.
        unsafe { kernel.run([blocks, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }
    }
}
