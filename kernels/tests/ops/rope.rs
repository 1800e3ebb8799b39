//! QKV bias with rotary embedding, and the q/k norm.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::{QkNorm, QkNormBackward, QkNormForward, QkvDims, Rope, RopeBackward, RopeForward};

const POSITIONS: usize = 17;

/// Tables of cosines and sines, `[POSITIONS, D/2]`.
fn tables(half: usize) -> [Vec<f64>; 2] {
    let angle = |i: usize| (i / half) as f64 * 10_000f64.powf(-((i % half) as f64) / half as f64);
    [f64::cos, f64::sin].map(|f| (0..POSITIONS * half).map(|i| f(angle(i))).collect())
}

/// Inputs qkv and, if there is one, the bias; output qkv.
struct Rotation {
    dims: QkvDims,
    bias: bool,
}

impl Rotation {
    fn inputs(&self) -> Vec<Vec<f64>> {
        let mut inputs = vec![random("qkv", self.dims.tokens * self.dims.row())];
        if self.bias {
            inputs.push(random("bias", self.dims.row()));
        }
        inputs
    }

    fn positions(&self) -> Vec<u32> {
        random_ids("positions", self.dims.tokens, POSITIONS)
    }
}

impl OpCase for Rotation {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        let [cos, sin] = tables(self.dims.head_dim / 2).map(|t| to::<X>(&t));
        let mut qkv = inputs[0].clone();
        let bias = inputs.get(1).map(|b| &b[..]);
        cpu.rope_forward(RopeForward {
            qkv: &mut qkv,
            bias,
            cos: &cos,
            sin: &sin,
            positions: &self.positions(),
            dims: self.dims,
        })
        .expect("shapes agree");
        vec![qkv]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, _: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let [cos, sin] = tables(self.dims.head_dim / 2).map(|t| to::<X>(&t));
        let mut dqkv = d[0].clone();
        let mut dbias = self.bias.then(|| before(self.dims.row()));
        let to_bias = dbias.as_deref_mut();
        cpu.rope_backward(RopeBackward {
            dqkv: &mut dqkv,
            dbias: to_bias,
            cos: &cos,
            sin: &sin,
            positions: &self.positions(),
            dims: self.dims,
        })
        .expect("shapes agree");
        let mut gradients = vec![Some(dqkv)];
        gradients.extend(dbias.map(|d| Some(added(&d))));
        gradients
    }
}

/// Inputs qkv, w_q, w_k; output y.
struct Norm {
    dims: QkvDims,
}

impl Norm {
    fn inputs(&self) -> Vec<Vec<f64>> {
        let d = self.dims.head_dim;
        vec![random("qkv", self.dims.tokens * self.dims.row()), random("w_q", d), random("w_k", d)]
    }

    fn run<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> (Vec<X>, Vec<X>) {
        let mut y = nan(inputs[0].len());
        let mut inv = nan(self.dims.tokens * (self.dims.heads + self.dims.kv_heads));
        let [qkv, w_q, w_k] = inputs else { panic!("three inputs") };
        cpu.qk_norm_forward(QkNormForward {
            y: &mut y,
            inv_rms: &mut inv,
            qkv,
            w_q,
            w_k,
            dims: self.dims,
            eps: 1e-6,
        })
        .expect("shapes agree");
        (y, inv)
    }
}

impl OpCase for Norm {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        vec![self.run(cpu, inputs).0]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let (_, inv) = self.run(cpu, inputs);
        let [qkv, w_q, w_k] = inputs else { panic!("three inputs") };
        let mut dqkv = nan(qkv.len());
        let (mut dw_q, mut dw_k) = (before(w_q.len()), before(w_k.len()));
        let dw = Some((&mut dw_q[..], &mut dw_k[..]));
        cpu.qk_norm_backward(QkNormBackward {
            dqkv: &mut dqkv,
            dw,
            dy: &d[0],
            qkv,
            inv_rms: &inv,
            w_q,
            w_k,
            dims: self.dims,
        })
        .expect("shapes agree");
        vec![Some(dqkv), Some(added(&dw_q)), Some(added(&dw_k))]
    }
}

fn dims(tokens: usize, heads: usize, kv_heads: usize, head_dim: usize) -> QkvDims {
    QkvDims { tokens, heads, kv_heads, head_dim }
}

#[test]
fn gradients() {
    for dims in [dims(1, 1, 1, 2), dims(5, 3, 1, 6), dims(123, 4, 2, 10), dims(3, 2, 2, 64)] {
        for bias in [false, true] {
            let case = Rotation { dims, bias };
            check_gradients(&format!("rope {dims:?}"), &case, &case.inputs());
        }
        let case = Norm { dims };
        check_gradients(&format!("q/k norm {dims:?}"), &case, &case.inputs());
    }
}

#[test]
fn f32_and_threads() {
    let dims = dims(123, 6, 2, 64);
    let case = Rotation { dims, bias: true };
    check_f32("rope", &case, &case.inputs(), 3e-6);
    let case = Norm { dims };
    check_f32("q/k norm", &case, &case.inputs(), 3e-6);
}

#[test]
fn forward_is_the_formula() {
    let case = Rotation { dims: dims(5, 3, 1, 6), bias: true };
    let inputs = case.inputs();
    let (row, half) = (case.dims.row(), 3);
    let [cos, sin] = tables(half);
    let mut expected = Vec::new();
    for (t, position) in case.positions().into_iter().enumerate() {
        let x: Vec<f64> = (0..row).map(|c| inputs[0][t * row + c] + inputs[1][c]).collect();
        for c in 0..row {
            let (head, i) = (c / 6, c % 6);
            let at = position as usize * half + i % half;
            let pair = x[head * 6 + (i + half) % 6];
            expected.push(match (head < 4, i < half) {
                (false, _) => x[c],
                (true, true) => x[c] * cos[at] - pair * sin[at],
                (true, false) => x[c] * cos[at] + pair * sin[at],
            });
        }
    }
    assert_close("rope", &case.forward(&Cpu::new(1), &inputs)[0], &expected, 1e-14);
}

#[test]
fn norm_is_rms_norm_of_every_head() {
    let case = Norm { dims: dims(5, 3, 2, 6) };
    let inputs = case.inputs();
    let (y, inv) = case.run(&Cpu::new(1), &inputs);
    let mut expected = Vec::new();
    let mut expected_inv = Vec::new();
    for (i, head) in inputs[0].chunks(6).enumerate() {
        let rms = (head.iter().map(|x| x * x).sum::<f64>() / 6.0 + 1e-6).sqrt();
        let w = match i % 7 {
            0..3 => &inputs[1],
            3..5 => &inputs[2],
            _ => {
                expected.extend_from_slice(head);
                continue;
            }
        };
        expected_inv.push(1.0 / rms);
        expected.extend(head.iter().zip(w).map(|(x, w)| x / rms * w));
    }
    assert_close("y", &y, &expected, 1e-14);
    assert_close("1/rms", &inv, &expected_inv, 1e-14);
}

#[test]
fn wrong_shapes_and_positions() {
    let cpu = Cpu::new(2);
    let d = dims(2, 1, 1, 4);
    let [cos, sin] = tables(2);
    let (mut qkv, bias) = (random("qkv", 24), random("bias", 12));
    let positions = [3, 16];
    assert_shape_error(cpu.rope_forward(RopeForward {
        qkv: &mut qkv[1..],
        bias: None,
        cos: &cos,
        sin: &sin,
        positions: &positions,
        dims: d,
    }));
    assert_shape_error(cpu.rope_forward(RopeForward {
        qkv: &mut qkv,
        bias: Some(&bias[1..]),
        cos: &cos,
        sin: &sin,
        positions: &positions,
        dims: d,
    }));
    assert_shape_error(cpu.rope_forward(RopeForward {
        qkv: &mut qkv,
        bias: None,
        cos: &cos,
        sin: &sin[2..],
        positions: &positions,
        dims: d,
    }));
    assert_shape_error(cpu.rope_forward(RopeForward {
        qkv: &mut qkv,
        bias: None,
        cos: &cos,
        sin: &sin,
        positions: &positions[1..],
        dims: d,
    }));
    assert_shape_error(cpu.rope_backward(RopeBackward {
        dqkv: &mut qkv,
        dbias: Some(&mut [0.0; 11]),
        cos: &cos,
        sin: &sin,
        positions: &positions,
        dims: d,
    }));
    assert!(
        cpu.rope_forward(RopeForward {
            qkv: &mut qkv,
            bias: None,
            cos: &cos,
            sin: &sin,
            positions: &[3, 17],
            dims: d
        })
        .is_err(),
        "no position 17"
    );
    assert!(
        cpu.rope_forward(RopeForward {
            qkv: &mut qkv,
            bias: None,
            cos: &cos,
            sin: &sin,
            positions: &positions,
            dims: dims(2, 1, 1, 3)
        })
        .is_err(),
        "odd head"
    );

    let (mut y, mut inv, w) = (random("y", 24), random("inv", 4), random("w", 4));
    assert_shape_error(cpu.qk_norm_forward(QkNormForward {
        y: &mut y[1..],
        inv_rms: &mut inv,
        qkv: &qkv,
        w_q: &w,
        w_k: &w,
        dims: d,
        eps: 1e-6,
    }));
    assert_shape_error(cpu.qk_norm_forward(QkNormForward {
        y: &mut y,
        inv_rms: &mut inv[1..],
        qkv: &qkv,
        w_q: &w,
        w_k: &w,
        dims: d,
        eps: 1e-6,
    }));
    assert_shape_error(cpu.qk_norm_forward(QkNormForward {
        y: &mut y,
        inv_rms: &mut inv,
        qkv: &qkv,
        w_q: &w,
        w_k: &w[1..],
        dims: d,
        eps: 1e-6,
    }));
    let mut dw = [[0.0; 4], [0.0; 4]];
    let [dw_q, dw_k] = &mut dw;
    let short = Some((&mut dw_q[1..], &mut dw_k[..]));
    assert_shape_error(cpu.qk_norm_backward(QkNormBackward {
        dqkv: &mut y,
        dw: short,
        dy: &qkv,
        qkv: &qkv,
        inv_rms: &inv,
        w_q: &w,
        w_k: &w,
        dims: d,
    }));
}
