//! QKV bias, rotary embedding and q/k norm on the CPU, one token's row after the other.

use super::rmsnorm::{backward_row, forward_row, weight_row};
use super::simd::{Level, Task, dispatch};
use super::{Cpu, CpuReal};
use crate::error::{Result, expect_below};
use crate::ops::{Out, QkNorm, QkNormBackward, QkNormForward, QkvDims, Rope, RopeBackward, RopeForward};

/// Cosines and sines of all positions, and the position of some tokens.
#[derive(Clone, Copy)]
struct Angles<'a, X> {
    cos: &'a [X],
    sin: &'a [X],
    positions: &'a [u32],
}

impl<'a, X: CpuReal> Angles<'a, X> {
    fn check(&self, op: &'static str, dims: QkvDims) -> Result<()> {
        let rows = self.cos.len() / (dims.head_dim / 2);
        expect_below(op, "positions", self.positions, rows)
    }

    /// Those of tokens `first ..`.
    fn from(self, first: usize) -> Self {
        Self { positions: &self.positions[first..], ..self }
    }

    /// Cosines and sines of a token.
    #[inline(always)]
    fn of(&self, token: usize, half: usize) -> (&'a [X], &'a [X]) {
        let at = self.positions[token] as usize * half;
        (&self.cos[at..][..half], &self.sin[at..][..half])
    }
}

/// Some tokens: add the bias, then rotate q and k.
struct Forward<'a, X> {
    qkv: &'a mut [X],
    bias: Option<&'a [X]>,
    angles: Angles<'a, X>,
    dims: QkvDims,
}

impl<X: CpuReal> Task for Forward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let QkvDims { heads, kv_heads, head_dim, .. } = self.dims;
        let row = self.dims.row();
        for (t, qkv) in self.qkv.chunks_exact_mut(row).enumerate() {
            if let Some(bias) = self.bias {
                let bias = &bias[..row];
                for c in 0..row {
                    qkv[c] += bias[c];
                }
            }
            let (cos, sin) = self.angles.of(t, head_dim / 2);
            for head in qkv[..(heads + kv_heads) * head_dim].chunks_exact_mut(head_dim) {
                let (low, high) = head.split_at_mut(cos.len());
                for i in 0..cos.len() {
                    let (a, b) = (low[i], high[i]);
                    low[i] = a * cos[i] - b * sin[i];
                    high[i] = b * cos[i] + a * sin[i];
                }
            }
        }
    }
}

/// Some tokens: rotate back.
struct Backward<'a, X> {
    dqkv: &'a mut [X],
    angles: Angles<'a, X>,
    dims: QkvDims,
}

impl<X: CpuReal> Task for Backward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let QkvDims { heads, kv_heads, head_dim, .. } = self.dims;
        for (t, dqkv) in self.dqkv.chunks_exact_mut(self.dims.row()).enumerate() {
            let (cos, sin) = self.angles.of(t, head_dim / 2);
            for head in dqkv[..(heads + kv_heads) * head_dim].chunks_exact_mut(head_dim) {
                let (low, high) = head.split_at_mut(cos.len());
                for i in 0..cos.len() {
                    let (a, b) = (low[i], high[i]);
                    low[i] = a * cos[i] + b * sin[i];
                    high[i] = b * cos[i] - a * sin[i];
                }
            }
        }
    }
}

/// All tokens, and the columns from `first` that `dbias` holds.
struct BiasGradient<'a, X> {
    dbias: &'a mut [X],
    first: usize,
    dqkv: &'a [X],
    row: usize,
}

impl<X: CpuReal> Task for BiasGradient<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let cols = self.dbias.len();
        for row in self.dqkv.chunks_exact(self.row) {
            let row = &row[self.first..][..cols];
            for c in 0..cols {
                self.dbias[c] += row[c];
            }
        }
    }
}

impl<X: CpuReal> Rope<X> for Cpu {
    fn rope_forward(&self, args: RopeForward<Self, X>) -> Result<()> {
        let _timed = self.timed("rope_forward");
        args.check()?;
        let RopeForward { qkv, bias, cos, sin, positions, dims } = args;
        const OP: &str = "rope_forward";
        let row = dims.row();
        let angles = Angles { cos, sin, positions };
        angles.check(OP, dims)?;
        if row == 0 {
            return Ok(());
        }
        let k = self.rows_per_part(dims.tokens, row);
        self.for_parts(qkv.chunks_mut(k * row).enumerate(), |(i, qkv)| {
            dispatch(Forward { qkv, bias, angles: angles.from(i * k), dims });
        });
        Ok(())
    }

    fn rope_backward(&self, args: RopeBackward<Self, X>) -> Result<()> {
        let _timed = self.timed("rope_backward");
        args.check()?;
        let RopeBackward { dqkv, dbias, cos, sin, positions, dims } = args;
        const OP: &str = "rope_backward";
        let row = dims.row();
        let angles = Angles { cos, sin, positions };
        angles.check(OP, dims)?;
        if row == 0 {
            return Ok(());
        }
        let k = self.rows_per_part(dims.tokens, row);
        self.for_parts(dqkv.chunks_mut(k * row).enumerate(), |(i, dqkv)| {
            dispatch(Backward { dqkv, angles: angles.from(i * k), dims });
        });
        if let Some(dbias) = dbias {
            let dqkv = &*dqkv;
            self.for_columns(dbias, dims.tokens, |first, dbias| {
                dispatch(BiasGradient { dbias, first, dqkv, row });
            });
        }
        Ok(())
    }
}

/// Some tokens; the slices begin at the first of them.
struct NormForward<'a, X> {
    y: &'a mut [X],
    inv_rms: &'a mut [X],
    qkv: &'a [X],
    w_q: &'a [X],
    w_k: &'a [X],
    dims: QkvDims,
    eps: f64,
}

impl<X: CpuReal> Task for NormForward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let QkvDims { heads, kv_heads, head_dim, .. } = self.dims;
        let (row, normed) = (self.dims.row(), heads + kv_heads);
        let rows = self.y.chunks_exact_mut(row).zip(self.qkv.chunks_exact(row));
        for ((y, x), inv_rms) in rows.zip(self.inv_rms.chunks_exact_mut(normed)) {
            for h in 0..normed {
                let w = if h < heads { self.w_q } else { self.w_k };
                let y = &mut y[h * head_dim..][..head_dim];
                inv_rms[h] = forward_row::<L, X>(y, &x[h * head_dim..][..head_dim], w, self.eps);
            }
            y[normed * head_dim..].copy_from_slice(&x[normed * head_dim..]);
        }
    }
}

/// Some tokens; the slices begin at the first of them.
struct NormBackward<'a, X> {
    dqkv: &'a mut [X],
    dy: &'a [X],
    qkv: &'a [X],
    inv_rms: &'a [X],
    w_q: &'a [X],
    w_k: &'a [X],
    dims: QkvDims,
}

impl<X: CpuReal> Task for NormBackward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let QkvDims { heads, kv_heads, head_dim, .. } = self.dims;
        let (row, normed) = (self.dims.row(), heads + kv_heads);
        for (t, dqkv) in self.dqkv.chunks_exact_mut(row).enumerate() {
            let (dy, x) = (&self.dy[t * row..][..row], &self.qkv[t * row..][..row]);
            for h in 0..normed {
                let w = if h < heads { self.w_q } else { self.w_k };
                let at = h * head_dim..(h + 1) * head_dim;
                let inv = self.inv_rms[t * normed + h];
                backward_row::<L, X>(&mut dqkv[at.clone()], &dy[at.clone()], &x[at], w, inv, Out::Assign);
            }
            dqkv[normed * head_dim..].copy_from_slice(&dy[normed * head_dim..]);
        }
    }
}

/// All tokens, heads `from_head..to_head`, and the columns from `first` that `dw` holds.
struct NormWeight<'a, X> {
    dw: &'a mut [X],
    first: usize,
    from_head: usize,
    to_head: usize,
    dy: &'a [X],
    qkv: &'a [X],
    inv_rms: &'a [X],
    dims: QkvDims,
}

impl<X: CpuReal> Task for NormWeight<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let QkvDims { tokens, heads, kv_heads, head_dim } = self.dims;
        for t in 0..tokens {
            for h in self.from_head..self.to_head {
                let at = t * self.dims.row() + h * head_dim + self.first;
                let inv = self.inv_rms[t * (heads + kv_heads) + h];
                weight_row::<L, X>(self.dw, &self.dy[at..], &self.qkv[at..], inv);
            }
        }
    }
}

impl<X: CpuReal> QkNorm<X> for Cpu {
    fn qk_norm_forward(&self, args: QkNormForward<Self, X>) -> Result<()> {
        let _timed = self.timed("qk_norm_forward");
        args.check()?;
        let QkNormForward { y, inv_rms, qkv, w_q, w_k, dims, eps } = args;
        let (row, normed) = (dims.row(), dims.heads + dims.kv_heads);
        if row == 0 {
            return Ok(());
        }
        let k = self.rows_per_part(dims.tokens, 2 * row);
        let outputs = y.chunks_mut(k * row).zip(inv_rms.chunks_mut(k * normed));
        self.for_parts(outputs.zip(qkv.chunks(k * row)), |((y, inv_rms), qkv)| {
            dispatch(NormForward { y, inv_rms, qkv, w_q, w_k, dims, eps });
        });
        Ok(())
    }

    fn qk_norm_backward(&self, args: QkNormBackward<Self, X>) -> Result<()> {
        let _timed = self.timed("qk_norm_backward");
        args.check()?;
        let QkNormBackward { dqkv, dw, dy, qkv, inv_rms, w_q, w_k, dims } = args;
        let QkvDims { tokens, heads, kv_heads, .. } = dims;
        let (row, normed) = (dims.row(), heads + kv_heads);
        if row == 0 {
            return Ok(());
        }
        let k = self.rows_per_part(tokens, 3 * row);
        self.for_parts(dqkv.chunks_mut(k * row).enumerate(), |(i, dqkv)| {
            let (dy, qkv, inv_rms) = (&dy[i * k * row..], &qkv[i * k * row..], &inv_rms[i * k * normed..]);
            dispatch(NormBackward { dqkv, dy, qkv, inv_rms, w_q, w_k, dims });
        });
        if let Some((dw_q, dw_k)) = dw {
            for (dw, from_head, to_head) in [(dw_q, 0, heads), (dw_k, heads, normed)] {
                self.for_columns(dw, tokens * (to_head - from_head), |first, dw| {
                    dispatch(NormWeight { dw, first, from_head, to_head, dy, qkv, inv_rms, dims });
                });
            }
        }
        Ok(())
    }
}
