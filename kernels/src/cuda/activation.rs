//! Gated activations on CUDA: a block per row.

use super::elementwise::threads_for_row;
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::Result;
use crate::error::{expect_len, expect_rows};
use crate::ops::{GatedActivation, GatedDims, GatedKind};

const MODULE: &str = "activation";
const MOST_THREADS: usize = 256;

impl<X: CudaReal> GatedActivation<X> for Cuda {
    fn gated_forward(&self, h: CudaViewMut<'_, X>, gate_up: CudaView<'_, X>, dims: GatedDims) -> Result<()> {
        const OP: &str = "gated_forward";
        let GatedDims { rows, cols, h_stride, kind } = dims;
        expect_rows(OP, "h", h.len(), rows, cols, h_stride)?;
        expect_len(OP, "gate_up", gate_up.len(), rows * 2 * cols)?;
        let name = match kind {
            GatedKind::Silu => "silu_forward",
            GatedKind::GeluTanh => "gelu_forward",
        };
        let kernel = self.kernel_of::<X>(MODULE, name).write(&h).read(gate_up).int(cols).long(h_stride);
        // SAFETY: the lengths above.
        unsafe { kernel.run([rows, 1, 1], threads_for_row::<X>(cols, MOST_THREADS), 0) }
    }

    fn gated_backward(
        &self,
        d_gate_up: CudaViewMut<'_, X>,
        dh: CudaView<'_, X>,
        gate_up: CudaView<'_, X>,
        dims: GatedDims,
    ) -> Result<()> {
        const OP: &str = "gated_backward";
        let GatedDims { rows, cols, h_stride, kind } = dims;
        expect_len(OP, "d_gate_up", d_gate_up.len(), rows * 2 * cols)?;
        expect_rows(OP, "dh", dh.len(), rows, cols, h_stride)?;
        expect_len(OP, "gate_up", gate_up.len(), rows * 2 * cols)?;
        let name = match kind {
            GatedKind::Silu => "silu_backward",
            GatedKind::GeluTanh => "gelu_backward",
        };
        let kernel = self.kernel_of::<X>(MODULE, name).write(&d_gate_up).read(dh).read(gate_up);
        let kernel = kernel.int(cols).long(h_stride);
        // SAFETY: the lengths above.
        unsafe { kernel.run([rows, 1, 1], threads_for_row::<X>(cols, MOST_THREADS), 0) }
    }
}
