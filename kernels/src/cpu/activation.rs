//! Gated activations on the CPU: one vectorised pass over each row.

use super::dropout::drop_row;
use super::simd::{Level, Task, dispatch};
use super::{Cpu, CpuReal};
use crate::Result;
use crate::error::row_span;
use crate::ops::{
    DropoutDims, GatedActivation, GatedDims, GatedDropoutBackward, GatedDropoutForward, GatedKind,
};

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

/// Dropout of h, if there is any: the examples' keys.
type Dropped<'a> = Option<(&'a [u64], DropoutDims)>;

/// Rows from `first`; the slices begin there.
struct Forward<'a, X> {
    h: &'a mut [X],
    gate_up: &'a [X],
    first: usize,
    dims: GatedDims,
    dropped: Dropped<'a>,
}

impl<X: CpuReal> Forward<'_, X> {
    #[inline(always)]
    fn rows(self, activation: impl Fn(X) -> (X, X)) {
        let GatedDims { cols, h_stride, .. } = self.dims;
        let rows = self.h.chunks_mut(h_stride).zip(self.gate_up.chunks_exact(2 * cols));
        for (i, (h, gate_up)) in rows.enumerate() {
            let (gate, up) = gate_up.split_at(cols);
            let (h, up) = (&mut h[..cols], &up[..cols]);
            for c in 0..cols {
                h[c] = activation(gate[c]).0 * up[c];
            }
            if let Some((keys, drop)) = self.dropped {
                drop_row(h, self.first + i, keys, drop);
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

/// Rows from `first`; the slices begin there.
struct Backward<'a, X> {
    d_gate_up: &'a mut [X],
    dh: &'a [X],
    gate_up: &'a [X],
    first: usize,
    dims: GatedDims,
    dropped: Dropped<'a>,
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
            let Some((keys, drop)) = self.dropped else {
                for c in 0..cols {
                    let (value, slope) = activation(gate[c]);
                    d_gate[c] = dh[c] * up[c] * slope;
                    d_up[c] = dh[c] * value;
                }
                continue;
            };
            // dh after its dropout stands where d_up will.
            d_up.copy_from_slice(dh);
            drop_row(d_up, self.first + i, keys, drop);
            for c in 0..cols {
                let (value, slope) = activation(gate[c]);
                d_gate[c] = d_up[c] * up[c] * slope;
                d_up[c] *= value;
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

impl Cpu {
    fn gated_forward_rows<X: CpuReal>(
        &self,
        h: &mut [X],
        gate_up: &[X],
        dims: GatedDims,
        dropped: Dropped<'_>,
    ) {
        let GatedDims { rows, cols, h_stride, .. } = dims;
        let span = row_span(rows, cols, h_stride);
        if rows * cols == 0 {
            return;
        }
        let k = self.rows_per_part(rows, 3 * cols);
        let parts = h[..span].chunks_mut(k * h_stride).zip(gate_up.chunks(k * 2 * cols)).enumerate();
        self.for_parts(parts, |(i, (h, gate_up))| {
            dispatch(Forward { h, gate_up, first: i * k, dims, dropped });
        });
    }

    fn gated_backward_rows<X: CpuReal>(
        &self,
        d_gate_up: &mut [X],
        dh: &[X],
        gate_up: &[X],
        dims: GatedDims,
        dropped: Dropped<'_>,
    ) {
        let GatedDims { rows, cols, h_stride, .. } = dims;
        if rows * cols == 0 {
            return;
        }
        let k = self.rows_per_part(rows, 5 * cols);
        let parts = d_gate_up.chunks_mut(k * 2 * cols).zip(gate_up.chunks(k * 2 * cols)).enumerate();
        self.for_parts(parts, |(i, (d_gate_up, gate_up))| {
            let dh = &dh[i * k * h_stride..];
            dispatch(Backward { d_gate_up, dh, gate_up, first: i * k, dims, dropped });
        });
    }
}

impl<X: CpuReal> GatedActivation<X> for Cpu {
    fn gated_forward(&self, h: &mut [X], gate_up: &[X], dims: GatedDims) -> Result<()> {
        let _timed = self.timed("gated_forward");
        dims.check_forward("gated_forward", h.len(), gate_up.len())?;
        self.gated_forward_rows(h, gate_up, dims, None);
        Ok(())
    }

    fn gated_backward(&self, d_gate_up: &mut [X], dh: &[X], gate_up: &[X], dims: GatedDims) -> Result<()> {
        let _timed = self.timed("gated_backward");
        dims.check_backward("gated_backward", d_gate_up.len(), dh.len(), gate_up.len())?;
        self.gated_backward_rows(d_gate_up, dh, gate_up, dims, None);
        Ok(())
    }

    fn gated_dropout_forward(&self, args: GatedDropoutForward<Self, X>) -> Result<()> {
        let _timed = self.timed("gated_dropout_forward");
        args.check()?;
        let GatedDropoutForward { h, gate_up, keys, dims, drop } = args;
        self.gated_forward_rows(h, gate_up, dims, Some((keys, drop)));
        Ok(())
    }

    fn gated_dropout_backward(&self, args: GatedDropoutBackward<Self, X>) -> Result<()> {
        let _timed = self.timed("gated_dropout_backward");
        args.check()?;
        let GatedDropoutBackward { d_gate_up, dh, gate_up, keys, dims, drop } = args;
        self.gated_backward_rows(d_gate_up, dh, gate_up, dims, Some((keys, drop)));
        Ok(())
    }
}
