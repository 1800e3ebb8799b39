//! Gated activations on the CPU: one vectorised pass over each row.

use super::simd::{Level, Task, dispatch};
use super::{Cpu, CpuReal};
use crate::Result;
use crate::error::{expect_len, expect_rows};
use crate::ops::{GatedActivation, GatedDims, GatedKind};

/// √(2/π).
const GELU_SCALE: f64 = 0.797_884_560_802_865_4;
const GELU_CUBIC: f64 = 0.044715;

/// SiLU and its derivative.
#[inline(always)]
fn silu<L: Level, X: CpuReal>(x: X) -> (X, X) {
    let s = x.fast_sigmoid::<L>();
    let value = x * s;
    // s (1 + x (1 − s)) = s + value (1 − s).
    (value, value.madd::<L>(X::one() - s, s))
}

/// GELU in the tanh form and its derivative. With the inner function u, the gate
/// `(1 + tanh u)/2` is the sigmoid of 2u: cheaper, and exact where it is small.
#[inline(always)]
fn gelu<L: Level, X: CpuReal>(x: X) -> (X, X) {
    let square = x * x;
    let twice_u =
        x * square.madd::<L>(X::from_f64(2.0 * GELU_SCALE * GELU_CUBIC), X::from_f64(2.0 * GELU_SCALE));
    let gate = twice_u.fast_sigmoid::<L>();
    let value = x * gate;
    let d_twice_u =
        square.madd::<L>(X::from_f64(6.0 * GELU_SCALE * GELU_CUBIC), X::from_f64(2.0 * GELU_SCALE));
    (value, (value * d_twice_u).madd::<L>(X::one() - gate, gate))
}

/// Some rows; the slices begin at the first of them.
struct Forward<'a, X> {
    h: &'a mut [X],
    gate_up: &'a [X],
    dims: GatedDims,
}

impl<X: CpuReal> Forward<'_, X> {
    #[inline(always)]
    fn rows(self, activation: impl Fn(X) -> (X, X)) {
        let GatedDims { cols, h_stride, .. } = self.dims;
        for (h, gate_up) in self.h.chunks_mut(h_stride).zip(self.gate_up.chunks_exact(2 * cols)) {
            let (gate, up) = gate_up.split_at(cols);
            let (h, up) = (&mut h[..cols], &up[..cols]);
            for c in 0..cols {
                h[c] = activation(gate[c]).0 * up[c];
            }
        }
    }
}

impl<X: CpuReal> Task for Forward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        match self.dims.kind {
            GatedKind::Silu => self.rows(silu::<L, X>),
            GatedKind::GeluTanh => self.rows(gelu::<L, X>),
        }
    }
}

/// Some rows; the slices begin at the first of them.
struct Backward<'a, X> {
    d_gate_up: &'a mut [X],
    dh: &'a [X],
    gate_up: &'a [X],
    dims: GatedDims,
}

impl<X: CpuReal> Backward<'_, X> {
    #[inline(always)]
    fn rows(self, activation: impl Fn(X) -> (X, X)) {
        let GatedDims { cols, h_stride, .. } = self.dims;
        for (i, d_gate_up) in self.d_gate_up.chunks_exact_mut(2 * cols).enumerate() {
            let (d_gate, d_up) = d_gate_up.split_at_mut(cols);
            let d_up = &mut d_up[..cols];
            let gate = &self.gate_up[2 * i * cols..][..cols];
            let up = &self.gate_up[(2 * i + 1) * cols..][..cols];
            let dh = &self.dh[i * h_stride..][..cols];
            for c in 0..cols {
                let (value, slope) = activation(gate[c]);
                d_gate[c] = dh[c] * up[c] * slope;
                d_up[c] = dh[c] * value;
            }
        }
    }
}

impl<X: CpuReal> Task for Backward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        match self.dims.kind {
            GatedKind::Silu => self.rows(silu::<L, X>),
            GatedKind::GeluTanh => self.rows(gelu::<L, X>),
        }
    }
}

impl<X: CpuReal> GatedActivation<X> for Cpu {
    fn gated_forward(&self, h: &mut [X], gate_up: &[X], dims: GatedDims) -> Result<()> {
        let _timed = self.timed("gated_forward");
        const OP: &str = "gated_forward";
        let GatedDims { rows, cols, h_stride, .. } = dims;
        let span = expect_rows(OP, "h", h.len(), rows, cols, h_stride)?;
        expect_len(OP, "gate_up", gate_up.len(), rows * 2 * cols)?;
        if rows * cols == 0 {
            return Ok(());
        }
        let k = self.rows_per_part(rows, 3 * cols);
        let parts = h[..span].chunks_mut(k * h_stride).zip(gate_up.chunks(k * 2 * cols));
        self.for_parts(parts, |(h, gate_up)| dispatch(Forward { h, gate_up, dims }));
        Ok(())
    }

    fn gated_backward(&self, d_gate_up: &mut [X], dh: &[X], gate_up: &[X], dims: GatedDims) -> Result<()> {
        let _timed = self.timed("gated_backward");
        const OP: &str = "gated_backward";
        let GatedDims { rows, cols, h_stride, .. } = dims;
        expect_len(OP, "d_gate_up", d_gate_up.len(), rows * 2 * cols)?;
        expect_rows(OP, "dh", dh.len(), rows, cols, h_stride)?;
        expect_len(OP, "gate_up", gate_up.len(), rows * 2 * cols)?;
        if rows * cols == 0 {
            return Ok(());
        }
        let k = self.rows_per_part(rows, 5 * cols);
        let parts = d_gate_up.chunks_mut(k * 2 * cols).zip(gate_up.chunks(k * 2 * cols)).enumerate();
        self.for_parts(parts, |(i, (d_gate_up, gate_up))| {
            dispatch(Backward { d_gate_up, dh: &dh[i * k * h_stride..], gate_up, dims });
        });
        Ok(())
    }
}
