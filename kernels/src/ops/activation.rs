//! Gated activations: `h = act(gate) ⊙ up`, with gate and up side by side in a row.

use crate::{Device, Real, Result};

/// Which activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GatedKind {
    /// SwiGLU: `act(x) = x / (1 + e^−x)`.
    Silu,
    /// Gated GELU in the tanh form: `act(x) = x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`.
    GeluTanh,
}

/// Shapes of a gated activation.
#[derive(Clone, Copy, Debug)]
pub struct GatedDims {
    /// Rows.
    pub rows: usize,
    /// Columns of h; a row of gate_up is `[gate | up]`, twice as long.
    pub cols: usize,
    /// Row stride of h and dh.
    pub h_stride: usize,
    /// The activation.
    pub kind: GatedKind,
}

/// Gated activations.
pub trait GatedActivation<X: Real>: Device {
    /// `h` `=`; `gate_up` `[rows, 2·cols]`.
    fn gated_forward(
        &self,
        h: Self::ViewMut<'_, X>,
        gate_up: Self::View<'_, X>,
        dims: GatedDims,
    ) -> Result<()>;

    /// `d_gate_up` `=`.
    fn gated_backward(
        &self,
        d_gate_up: Self::ViewMut<'_, X>,
        dh: Self::View<'_, X>,
        gate_up: Self::View<'_, X>,
        dims: GatedDims,
    ) -> Result<()>;
}
