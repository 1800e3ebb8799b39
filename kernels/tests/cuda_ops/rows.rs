//! Operations on rows: activations, dropout, embedding, squared error, rotary embedding, q/k norm.

use crate::common::*;
use gradtx_kernels::ops::{
    DropoutDims, GatedDims, GatedDropoutBackward, GatedDropoutForward, GatedKind, MseDims, QkNormBackward,
    QkNormForward, QkvDims, ReluDims, RopeBackward, RopeForward, SquaredError,
};
use gradtx_kernels::{Backend, Buffer, Real, Result};

struct Gated {
    rows: usize,
    cols: usize,
    gap: usize,
    kind: GatedKind,
}

impl Case for Gated {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let (rows, cols, h_stride) = (self.rows, self.cols, self.cols + self.gap);
        let dims = GatedDims { rows, cols, h_stride, kind: self.kind };
        // Some gates far out, where e^x is very small or large.
        let mut values = inputs.values::<X>("gate_up", 2 * rows * cols);
        for (i, value) in values.iter_mut().enumerate().skip(7).step_by(7) {
            *value = X::from_f64([-88.0, 25.0, -12.0, 64.0][i / 7 % 4]);
        }
        let gate_up = put(d, &values)?;
        let mut h = put(d, &spread(&nan::<X>(rows * cols), cols, h_stride))?;
        d.gated_forward(h.all_mut(), gate_up.all(), dims)?;
        let dh = put(d, &spread(&inputs.values::<X>("dh", rows * cols), cols, h_stride))?;
        let mut d_gate_up = put(d, &nan::<X>(2 * rows * cols))?;
        d.gated_backward(d_gate_up.all_mut(), dh.all(), gate_up.all(), dims)?;
        let mut results = Results::default();
        results.take_rows(d, "h", &h, cols, h_stride)?;
        results.take(d, "d_gate_up", &d_gate_up)?;
        Ok(results)
    }
}

#[test]
fn gated_activations() {
    for kind in [GatedKind::Silu, GatedKind::GeluTanh] {
        for (rows, cols, gap) in [(1, 1, 0), (5, 123, 5), (3, 64, 8), (2, 2056, 0)] {
            let case = Gated { rows, cols, gap, kind };
            check(&format!("{kind:?} {rows}×{cols}"), &case, Tolerance::ROUNDING);
        }
    }
}

struct Rectified {
    rows: usize,
    cols: usize,
    gap: usize,
}

impl Case for Rectified {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let (rows, cols, h_stride) = (self.rows, self.cols, self.cols + self.gap);
        let dims = ReluDims { rows, cols, h_stride };
        let x = put(d, &inputs.values::<X>("x", rows * cols))?;
        let mut h = put(d, &spread(&nan::<X>(rows * cols), cols, h_stride))?;
        d.relu_forward(h.all_mut(), x.all(), dims)?;
        let dh = put(d, &spread(&inputs.values::<X>("dh", rows * cols), cols, h_stride))?;
        let mut dx = put(d, &nan::<X>(rows * cols))?;
        d.relu_backward(dx.all_mut(), dh.all(), x.all(), dims)?;
        let mut results = Results::default();
        results.take_rows(d, "h", &h, cols, h_stride)?;
        results.take(d, "dx", &dx)?;
        Ok(results)
    }
}

#[test]
fn relu() {
    for (rows, cols, gap) in [(1, 3, 0), (5, 123, 5), (3, 64, 8), (2, 2056, 0)] {
        let case = Rectified { rows, cols, gap };
        check(&format!("relu {rows}×{cols}"), &case, Tolerance::ROUNDING);
    }
}

struct GatedDrop(Gated);

impl Case for GatedDrop {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let Gated { rows, cols, gap, kind } = self.0;
        let h_stride = cols + gap;
        let dims = GatedDims { rows, cols, h_stride, kind };
        let drop = DropoutDims { rows, cols, rows_per_key: 2, p: 0.3, site: 12 };
        let keys: Vec<u64> = (0..rows as u64 / 2).map(|b| b << 40 | (b * 77 + 5)).collect();
        let keys = put(d, &keys)?;
        let gate_up = put(d, &inputs.values::<X>("gate_up", 2 * rows * cols))?;
        let mut h = put(d, &spread(&nan::<X>(rows * cols), cols, h_stride))?;
        d.gated_dropout_forward(GatedDropoutForward {
            h: h.all_mut(),
            gate_up: gate_up.all(),
            keys: keys.all(),
            dims,
            drop,
        })?;
        let dh = put(d, &spread(&inputs.values::<X>("dh", rows * cols), cols, h_stride))?;
        let mut d_gate_up = put(d, &nan::<X>(2 * rows * cols))?;
        let to = d_gate_up.all_mut();
        d.gated_dropout_backward(GatedDropoutBackward {
            d_gate_up: to,
            dh: dh.all(),
            gate_up: gate_up.all(),
            keys: keys.all(),
            dims,
            drop,
        })?;
        let mut results = Results::default();
        results.take_rows(d, "h", &h, cols, h_stride)?;
        results.take(d, "d_gate_up", &d_gate_up)?;
        Ok(results)
    }
}

#[test]
fn gated_activations_with_dropout() {
    for kind in [GatedKind::Silu, GatedKind::GeluTanh] {
        for (rows, cols, gap) in [(2, 1, 0), (6, 123, 5), (4, 64, 8), (2, 2056, 0)] {
            let case = GatedDrop(Gated { rows, cols, gap, kind });
            check(&format!("{kind:?} with dropout {rows}×{cols}"), &case, Tolerance::ROUNDING);
        }
    }
}

struct Drop {
    rows_per_key: usize,
    examples: usize,
    cols: usize,
}

impl Case for Drop {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let (rows, cols) = (self.rows_per_key * self.examples, self.cols);
        let mut values = inputs.values::<X>("x", rows * cols);
        values.iter_mut().step_by(3).for_each(|x| *x += X::one());
        let mut x = put(d, &values)?;
        let keys: Vec<u64> = (0..self.examples as u64).map(|b| b << 40 | (b * 77 + 5)).collect();
        let keys = put(d, &keys)?;
        let dims = DropoutDims { rows, cols, rows_per_key: self.rows_per_key, p: 0.3, site: 11 };
        d.dropout(x.all_mut(), keys.all(), dims)?;
        let mut results = Results::default();
        results.take(d, "x", &x)?;
        Ok(results)
    }
}

#[test]
fn dropout() {
    for (rows_per_key, examples, cols) in [(1, 1, 1), (3, 2, 123), (5, 3, 64), (2, 2, 1032)] {
        let case = Drop { rows_per_key, examples, cols };
        check(&format!("dropout of {cols} columns"), &case, Tolerance::ROUNDING);
    }
}

struct Tokens {
    tokens: usize,
    dim: usize,
}

impl Case for Tokens {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let (n, dim, vocab) = (self.tokens, self.dim, 9);
        let table = put(d, &inputs.values::<X>("table", vocab * dim))?;
        let ids = put(d, &random_ids("ids", n, vocab))?;
        let mut x = put(d, &nan::<X>(n * dim))?;
        d.embedding_forward(x.all_mut(), table.all(), ids.all(), dim)?;
        let dx = put(d, &inputs.values::<X>("dx", n * dim))?;
        let mut d_table = put(d, &inputs.sums::<X::Acc>("d_table", vocab * dim))?;
        d.embedding_backward(d_table.all_mut(), dx.all(), ids.all(), dim)?;
        let mut results = Results::default();
        results.take(d, "x", &x)?;
        results.take(d, "d_table", &d_table)?;
        let positions = put(d, &random_ids("positions", n, vocab))?;
        let mut sum = put(d, &inputs.values::<X>("sum", n * dim))?;
        d.embedding_add(sum.all_mut(), table.all(), positions.all(), dim)?;
        results.take(d, "x and a second row", &sum)?;
        Ok(results)
    }
}

#[test]
fn embedding() {
    for (tokens, dim) in [(1, 1), (5, 123), (200, 64), (33, 1032)] {
        check(&format!("embedding {tokens}×{dim}"), &Tokens { tokens, dim }, Tolerance::ROUNDING);
    }
}

struct Squares {
    rows: usize,
    cols: usize,
    gradient: bool,
}

impl Case for Squares {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let (rows, cols) = (self.rows, self.cols);
        let pred = put(d, &inputs.values::<X>("pred", rows * cols))?;
        let target = put(d, &inputs.values::<X>("target", rows * cols))?;
        let mut sums = put(d, &nan::<X::Acc>(rows))?;
        let mut d_pred = put(d, &nan::<X>(rows * cols))?;
        let dims = MseDims { rows, cols, grad_scale: 0.37 };
        let gradient = self.gradient.then(|| d_pred.all_mut());
        d.mse(SquaredError {
            sums: sums.all_mut(),
            d_pred: gradient,
            pred: pred.all(),
            target: target.all(),
            dims,
        })?;
        let mut results = Results::default();
        results.take(d, "sums", &sums)?;
        if self.gradient {
            results.take(d, "d_pred", &d_pred)?;
        }
        Ok(results)
    }
}

#[test]
fn squared_error() {
    for (rows, cols, gradient) in [(1, 1, true), (5, 123, true), (3, 64, false), (2, 4104, true)] {
        let case = Squares { rows, cols, gradient };
        check(&format!("mse {rows}×{cols}"), &case, Tolerance::ROUNDING);
    }
}

struct Rotary {
    dims: QkvDims,
    bias: bool,
}

impl Case for Rotary {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let QkvDims { tokens, head_dim, .. } = self.dims;
        let (row, half, max_positions) = (self.dims.row(), head_dim / 2, 17);
        let angles = random("angles", max_positions * half);
        let table = |f: fn(f64) -> f64| -> Vec<X::Acc> {
            angles.iter().map(|&a| X::Acc::from_f64(f(a) as f32 as f64)).collect()
        };
        let (cos, sin) = (put(d, &table(f64::cos))?, put(d, &table(f64::sin))?);
        let positions = put(d, &random_ids("positions", tokens, max_positions))?;
        let bias = put(d, &inputs.values::<X>("bias", row))?;
        let mut qkv = put(d, &inputs.values::<X>("qkv", tokens * row))?;
        let bias_view = self.bias.then(|| bias.all());
        let positions = positions.all();
        d.rope_forward(RopeForward {
            qkv: qkv.all_mut(),
            bias: bias_view,
            cos: cos.all(),
            sin: sin.all(),
            positions,
            dims: self.dims,
        })?;
        let mut dqkv = put(d, &inputs.values::<X>("dqkv", tokens * row))?;
        let mut dbias = put(d, &inputs.sums::<X::Acc>("dbias", row))?;
        let dbias_view = self.bias.then(|| dbias.all_mut());
        d.rope_backward(RopeBackward {
            dqkv: dqkv.all_mut(),
            dbias: dbias_view,
            cos: cos.all(),
            sin: sin.all(),
            positions,
            dims: self.dims,
        })?;
        let mut results = Results::default();
        results.take(d, "qkv", &qkv)?;
        results.take(d, "dqkv", &dqkv)?;
        results.take(d, "dbias", &dbias)?;
        Ok(results)
    }
}

#[test]
fn rotary_embedding() {
    for (tokens, heads, kv_heads, head_dim, bias) in
        [(1, 1, 1, 2, true), (5, 3, 1, 6, false), (7, 4, 2, 64, true), (3, 6, 3, 128, true)]
    {
        let dims = QkvDims { tokens, heads, kv_heads, head_dim };
        // The bias of the backward pass is a sum of values that were rounded to bf16 before.
        check(&format!("rope {dims:?}"), &Rotary { dims, bias }, Tolerance::ROUNDING);
    }
}

struct HeadNorm {
    dims: QkvDims,
}

impl Case for HeadNorm {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let QkvDims { tokens, heads, kv_heads, head_dim } = self.dims;
        let (n, normed) = (tokens * self.dims.row(), tokens * (heads + kv_heads));
        let qkv = put(d, &inputs.values::<X>("qkv", n))?;
        let w_q = put(d, &inputs.values::<X>("w_q", head_dim))?;
        let w_k = put(d, &inputs.values::<X>("w_k", head_dim))?;
        let (mut y, mut inv) = (put(d, &nan::<X>(n))?, put(d, &nan::<X::Acc>(normed))?);
        let weights = (w_q.all(), w_k.all());
        let (to, inv_to) = (y.all_mut(), inv.all_mut());
        d.qk_norm_forward(QkNormForward {
            y: to,
            inv_rms: inv_to,
            qkv: qkv.all(),
            w_q: weights.0,
            w_k: weights.1,
            dims: self.dims,
            eps: 1e-6,
        })?;
        let dy = put(d, &inputs.values::<X>("dy", n))?;
        let mut dqkv = put(d, &nan::<X>(n))?;
        let mut dw_q = put(d, &inputs.sums::<X::Acc>("dw_q", head_dim))?;
        let mut dw_k = put(d, &inputs.sums::<X::Acc>("dw_k", head_dim))?;
        let dw = Some((dw_q.all_mut(), dw_k.all_mut()));
        let (dy, inv_view) = (dy.all(), inv.all());
        d.qk_norm_backward(QkNormBackward {
            dqkv: dqkv.all_mut(),
            dw,
            dy,
            qkv: qkv.all(),
            inv_rms: inv_view,
            w_q: weights.0,
            w_k: weights.1,
            dims: self.dims,
        })?;
        let mut results = Results::default();
        results.take(d, "y", &y)?;
        results.take(d, "dqkv", &dqkv)?;
        for (name, buf) in [("inv_rms", &inv), ("dw_q", &dw_q), ("dw_k", &dw_k)] {
            results.take(d, name, buf)?;
        }
        Ok(results)
    }
}

#[test]
fn norm_of_heads() {
    for (tokens, heads, kv_heads, head_dim) in [(1, 1, 1, 2), (5, 3, 1, 10), (37, 4, 2, 64)] {
        let dims = QkvDims { tokens, heads, kv_heads, head_dim };
        check(
            &format!("qk_norm {dims:?}"),
            &HeadNorm { dims },
            Tolerance { f32: 3e-6, ..Tolerance::ROUNDING },
        );
    }
}
