//! Gated activations: `h = act(gate) ⊙ up`, with gate and up side by side in a row.

use super::DropoutDims;
use crate::error::{expect_len, expect_rows};
use crate::{Device, Real, Result, View, ViewMut};

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
    fn check_drop(&self, op: &'static str, drop: &DropoutDims, keys: usize) -> Result<()> {
        expect_len(op, "rows of the dropout", drop.rows, self.rows)?;
        expect_len(op, "columns of the dropout", drop.cols, self.cols)?;
        drop.check(op, keys)
    }

    /// Fails unless the views of the forward pass have these lengths.
    pub(crate) fn check_forward(&self, op: &'static str, h: usize, gate_up: usize) -> Result<()> {
        expect_rows(op, "h", h, self.rows, self.cols, self.h_stride)?;
        expect_len(op, "gate_up", gate_up, self.rows * 2 * self.cols)
    }

    /// Fails unless the views of the backward pass have these lengths.
    pub(crate) fn check_backward(
        &self,
        op: &'static str,
        d_gate_up: usize,
        dh: usize,
        gate_up: usize,
    ) -> Result<()> {
        expect_len(op, "d_gate_up", d_gate_up, self.rows * 2 * self.cols)?;
        expect_rows(op, "dh", dh, self.rows, self.cols, self.h_stride)?;
        expect_len(op, "gate_up", gate_up, self.rows * 2 * self.cols)
    }
}

/// Arguments of [`GatedActivation::gated_dropout_forward`].
pub struct GatedDropoutForward<'h, 'gate_up, 'keys, D: Device, X: Real> {
    /// `[rows, cols]` at `dims.h_stride`, `=`.
    pub h: D::ViewMut<'h, X>,
    /// `[rows, 2·cols]`.
    pub gate_up: D::View<'gate_up, X>,
    /// A key for every example, as of dropout.
    pub keys: D::View<'keys, u64>,
    /// Shapes, and the activation.
    pub dims: GatedDims,
    /// Dropout of h.
    pub drop: DropoutDims,
}

impl<D: Device, X: Real> GatedDropoutForward<'_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "gated_dropout_forward";
        self.dims.check_drop(OP, &self.drop, self.keys.len())?;
        self.dims.check_forward(OP, self.h.len(), self.gate_up.len())
    }
}

/// Arguments of [`GatedActivation::gated_dropout_backward`].
pub struct GatedDropoutBackward<'d_gate_up, 'dh, 'gate_up, 'keys, D: Device, X: Real> {
    /// `[rows, 2·cols]` `=`.
    pub d_gate_up: D::ViewMut<'d_gate_up, X>,
    /// `[rows, cols]` at `dims.h_stride`: the gradient of h after its dropout.
    pub dh: D::View<'dh, X>,
    /// `[rows, 2·cols]`.
    pub gate_up: D::View<'gate_up, X>,
    /// A key for every example, as of dropout.
    pub keys: D::View<'keys, u64>,
    /// Shapes, and the activation.
    pub dims: GatedDims,
    /// Dropout of h.
    pub drop: DropoutDims,
}

impl<D: Device, X: Real> GatedDropoutBackward<'_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "gated_dropout_backward";
        self.dims.check_drop(OP, &self.drop, self.keys.len())?;
        self.dims.check_backward(OP, self.d_gate_up.len(), self.dh.len(), self.gate_up.len())
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
    fn gated_dropout_forward(&self, args: GatedDropoutForward<Self, X>) -> Result<()>;

    /// `d_gate_up` `=`, where `dh` is the gradient of h after its dropout.
    fn gated_dropout_backward(&self, args: GatedDropoutBackward<Self, X>) -> Result<()>;
}
