//! Gated activations on CUDA: a block per row.

use super::elementwise::threads_for_row;
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::ops::{
    DropoutDims, GatedActivation, GatedDims, GatedDropoutBackward, GatedDropoutForward, GatedKind,
};
use crate::{Result, View, ViewMut};

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
        h: CudaViewMut<'_, X>,
        gate_up: CudaView<'_, X>,
        dims: GatedDims,
        dropped: Option<(CudaView<'_, u64>, DropoutDims)>,
    ) -> Result<()> {
        let GatedDims { rows, cols, h_stride, kind } = dims;
        let names =
            names(kind, ["silu_forward", "silu_dropout_forward"], ["gelu_forward", "gelu_dropout_forward"]);
        let kernel = self.kernel_of::<X>(MODULE, names[usize::from(dropped.is_some())]);
        let mut kernel = kernel.write(&h).read(gate_up).int(cols).long(h_stride);
        if let Some((keys, drop)) = &dropped {
            kernel = kernel.drop_mask(*keys, drop);
        }
        let blocks = if cols == 0 { 0 } else { rows };
        // SAFETY: the callers have checked lengths and dropout.
        unsafe { kernel.run([blocks, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }
    }

    fn run_gated_backward<X: CudaReal>(
        &self,
        d_gate_up: CudaViewMut<'_, X>,
        dh: CudaView<'_, X>,
        gate_up: CudaView<'_, X>,
        dims: GatedDims,
        dropped: Option<(CudaView<'_, u64>, DropoutDims)>,
    ) -> Result<()> {
        let GatedDims { rows, cols, h_stride, kind } = dims;
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
        // SAFETY: the callers have checked lengths and dropout.
        unsafe { kernel.run([blocks, 1, 1], threads_for_row::<X>(cols, MAX_THREADS), 0) }
    }
}

impl<X: CudaReal> GatedActivation<X> for Cuda {
    fn gated_forward(&self, h: CudaViewMut<'_, X>, gate_up: CudaView<'_, X>, dims: GatedDims) -> Result<()> {
        dims.check_forward("gated_forward", h.len(), gate_up.len())?;
        self.run_gated_forward(h, gate_up, dims, None)
    }

    fn gated_backward(
        &self,
        d_gate_up: CudaViewMut<'_, X>,
        dh: CudaView<'_, X>,
        gate_up: CudaView<'_, X>,
        dims: GatedDims,
    ) -> Result<()> {
        dims.check_backward("gated_backward", d_gate_up.len(), dh.len(), gate_up.len())?;
        self.run_gated_backward(d_gate_up, dh, gate_up, dims, None)
    }

    fn gated_dropout_forward(&self, args: GatedDropoutForward<Self, X>) -> Result<()> {
        args.check()?;
        let GatedDropoutForward { h, gate_up, keys, dims, drop } = args;
        self.run_gated_forward(h, gate_up, dims, Some((keys, drop)))
    }

    fn gated_dropout_backward(&self, args: GatedDropoutBackward<Self, X>) -> Result<()> {
        args.check()?;
        let GatedDropoutBackward { d_gate_up, dh, gate_up, keys, dims, drop } = args;
        self.run_gated_backward(d_gate_up, dh, gate_up, dims, Some((keys, drop)))
    }
}
