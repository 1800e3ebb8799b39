//! Gated activations: `h = act(gate) ⊙ up`, with gate and up side by side in a row.

use super::DropoutDims;
use crate::error::expect_len;
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

impl GatedDims {
    /// Fails unless the dropout is of h: as many rows and columns, and a key for every example.
    pub(crate) fn check_drop(&self, op: &'static str, drop: &DropoutDims, keys: usize) -> Result<()> {
        expect_len(op, "rows of the dropout", drop.rows, self.rows)?;
        expect_len(op, "columns of the dropout", drop.cols, self.cols)?;
        drop.check(op, keys)
    }
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

    /// `h = mask ⊙ act(gate) ⊙ up / (1 − p)`: [`Self::gated_forward`] and dropout of h in one pass,
    /// without rounding to X between. `keys` and masks as of [`Dropout`](super::Dropout).
    fn gated_dropout_forward(
        &self,
        h: Self::ViewMut<'_, X>,
        gate_up: Self::View<'_, X>,
        keys: Self::View<'_, u64>,
        dims: GatedDims,
        drop: DropoutDims,
    ) -> Result<()>;

    /// `d_gate_up` `=`, where `dh` is the gradient of h after its dropout.
    fn gated_dropout_backward(
        &self,
        d_gate_up: Self::ViewMut<'_, X>,
        dh: Self::View<'_, X>,
        gate_up: Self::View<'_, X>,
        keys: Self::View<'_, u64>,
        dims: GatedDims,
        drop: DropoutDims,
    ) -> Result<()>;
}
