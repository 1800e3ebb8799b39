//! Gated activations on CUDA: a block per row.

use super::elementwise::threads_for_row;
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::Result;
use crate::error::{expect_len, expect_rows};
use crate::ops::{DropoutDims, GatedActivation, GatedDims, GatedKind};

const MODULE: &str = "activation";
const MAX_THREADS: usize = 256;

/// Names of the kernels without and with dropout of h.
fn names(kind: GatedKind, silu: [&'static str; 2], gelu: [&'static str; 2]) -> [&'static str; 2] {
    match kind {
        GatedKind::Silu => silu,
        GatedKind::GeluTanh => gelu,
    }
}

impl Cuda {
    fn run_gated_forward<X: CudaReal>(
        &self,
        op: &'static str,
        h: CudaViewMut<'_, X>,
        gate_up: CudaView<'_, X>,
        dims: GatedDims,
        dropped: Option<(CudaView<'_, u64>, DropoutDims)>,
    ) -> Result<()> {
        let GatedDims { rows, cols, h_stride, kind } = dims;
        expect_rows(op, "h", h.len(), rows, cols, h_stride)?;
        expect_len(op, "gate_up", gate_up.len(), rows * 2 * cols)?;
        let names =
            names(kind, ["silu_forward", "silu_dropout_forward"], ["gelu_forward", "gelu_dropout_forward"]);
        let kernel = self.kernel_of::<X>(MODULE, names[usize::from(dropped.is_some())]);
        let mut kernel = kernel.write(&h).read(gate_up).int(cols).long(h_stride);
        if let Some((keys, drop)) = &dropped {
            kernel = kernel.drop_mask(*keys, drop);
        }
        let blocks = if cols == 0 { 0 } else { rows };
        // SAFETY: the lengths above; the callers have checked the dropout.
        unsafe { kernel.run([blocks, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }
    }

    fn run_gated_backward<X: CudaReal>(
        &self,
        op: &'static str,
        d_gate_up: CudaViewMut<'_, X>,
        dh: CudaView<'_, X>,
        gate_up: CudaView<'_, X>,
        dims: GatedDims,
        dropped: Option<(CudaView<'_, u64>, DropoutDims)>,
    ) -> Result<()> {
        let GatedDims { rows, cols, h_stride, kind } = dims;
        expect_len(op, "d_gate_up", d_gate_up.len(), rows * 2 * cols)?;
        expect_rows(op, "dh", dh.len(), rows, cols, h_stride)?;
        expect_len(op, "gate_up", gate_up.len(), rows * 2 * cols)?;
        let names = names(
            kind,
            ["silu_backward", "silu_dropout_backward"],
            ["gelu_backward", "gelu_dropout_backward"],
        );
        let kernel = self.kernel_of::<X>(MODULE, names[usize::from(dropped.is_some())]);
        let mut kernel = kernel.write(&d_gate_up).read(dh).read(gate_up).int(cols).long(h_stride);
        if let Some((keys, drop)) = &dropped {
            kernel = kernel.drop_mask(*keys, drop);
        }
        let blocks = if cols == 0 { 0 } else { rows };
        // SAFETY: the lengths above; the callers have checked the dropout.
        unsafe { kernel.run([blocks, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }
    }
}

impl<X: CudaReal> GatedActivation<X> for Cuda {
    fn gated_forward(&self, h: CudaViewMut<'_, X>, gate_up: CudaView<'_, X>, dims: GatedDims) -> Result<()> {
        self.run_gated_forward("gated_forward", h, gate_up, dims, None)
    }

    fn gated_backward(
        &self,
        d_gate_up: CudaViewMut<'_, X>,
        dh: CudaView<'_, X>,
        gate_up: CudaView<'_, X>,
        dims: GatedDims,
    ) -> Result<()> {
        self.run_gated_backward("gated_backward", d_gate_up, dh, gate_up, dims, None)
    }

    fn gated_dropout_forward(
        &self,
        h: CudaViewMut<'_, X>,
        gate_up: CudaView<'_, X>,
        keys: CudaView<'_, u64>,
        dims: GatedDims,
        drop: DropoutDims,
    ) -> Result<()> {
        const OP: &str = "gated_dropout_forward";
        dims.check_drop(OP, &drop, keys.len())?;
        self.run_gated_forward(OP, h, gate_up, dims, Some((keys, drop)))
    }

    fn gated_dropout_backward(
        &self,
        d_gate_up: CudaViewMut<'_, X>,
        dh: CudaView<'_, X>,
        gate_up: CudaView<'_, X>,
        keys: CudaView<'_, u64>,
        dims: GatedDims,
        drop: DropoutDims,
    ) -> Result<()> {
        const OP: &str = "gated_dropout_backward";
        dims.check_drop(OP, &drop, keys.len())?;
        self.run_gated_backward(OP, d_gate_up, dh, gate_up, dims, Some((keys, drop)))
    }
}
