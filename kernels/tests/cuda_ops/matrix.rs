//! Matrix products, linear layers and the LM head.

use crate::common::*;
use gradtx_kernels::ops::{
    GemmDims, LinearBackwardInput, LinearBackwardWeight, LinearDims, LinearForward, LmHeadDims, LmHeadLoss,
    LmHeadScratch, Out,
};
use gradtx_kernels::{Backend, Buffer, Real, Result};

/// A product whose result is rounded once; in bf16 the sum before it is in f32.
const PRODUCT: Tolerance = Tolerance { f32: 2e-6, bf16: 4e-3 };

pub struct Product {
    pub dims: GemmDims,
}

impl Product {
    /// Strides `gap` longer than rows.
    pub fn new(m: usize, n: usize, k: usize, how: (bool, bool), gap: usize, out: Out) -> Self {
        let dims = GemmDims::new(m, n, k, how.0, how.1);
        let (a_stride, b_stride, c_stride) = (dims.a_stride + gap, dims.b_stride + gap, dims.c_stride + gap);
        Self { dims: GemmDims { a_stride, b_stride, c_stride, out, alpha: 0.7, ..dims } }
    }
}

impl Case for Product {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let GemmDims { m, n, k, trans_a, trans_b, a_stride, b_stride, c_stride, out, .. } = self.dims;
        let a_cols = if trans_a { m } else { k };
        let b_cols = if trans_b { k } else { n };
        let a = put(d, &spread(&inputs.values::<X>("a", m * k), a_cols, a_stride))?;
        let b = put(d, &spread(&inputs.values::<X>("b", n * k), b_cols, b_stride))?;
        let old = if out == Out::Add { inputs.values::<X>("c", m * n) } else { nan(m * n) };
        let mut c = put(d, &spread(&old, n, c_stride))?;
        d.gemm(c.all_mut(), a.all(), b.all(), self.dims)?;
        let mut results = Results::default();
        results.take_rows(d, "c", &c, n, c_stride)?;
        Ok(results)
    }
}

const WAYS: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

#[test]
fn products_of_odd_shapes() {
    for how in WAYS {
        for (m, n, k, gap, out) in [
            (1, 1, 1, 0, Out::Assign),
            (5, 123, 17, 3, Out::Add),
            (65, 70, 96, 0, Out::Assign),
            (33, 130, 72, 8, Out::Assign),
        ] {
            let (case, name) = (Product::new(m, n, k, how, gap, out), format!("gemm {m}×{n}×{k} {how:?}"));
            check(&name, &case, PRODUCT);
            check_with_library(&name, &case, PRODUCT);
        }
    }
}

/// More large tiles than the stand-in device has multiprocessors.
#[test]
fn products_in_large_tiles() {
    for how in WAYS {
        let case = Product::new(260, 390, 72, how, 0, Out::Add);
        check(&format!("gemm 260×390×72 {how:?}"), &case, PRODUCT);
    }
}

struct Layer {
    dims: LinearDims,
    bias: bool,
    residual: bool,
    out: Out,
}

impl Case for Layer {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let LinearDims { rows, in_dim, out_dim, x_stride } = self.dims;
        let x = put(d, &spread(&inputs.values::<X>("x", rows * in_dim), in_dim, x_stride))?;
        let w = put(d, &inputs.values::<X>("w", out_dim * in_dim))?;
        let bias = put(d, &inputs.values::<X>("bias", out_dim))?;
        let residual = put(d, &inputs.values::<X>("residual", rows * out_dim))?;
        let mut y = put(d, &nan::<X>(rows * out_dim))?;
        let (bias, residual) = (self.bias.then(|| bias.all()), self.residual.then(|| residual.all()));
        d.linear_forward(LinearForward {
            y: y.all_mut(),
            x: x.all(),
            w: w.all(),
            bias,
            residual,
            dims: self.dims,
        })?;

        let dy = put(d, &inputs.values::<X>("dy", rows * out_dim))?;
        let old =
            if self.out == Out::Add { inputs.values::<X>("dx", rows * in_dim) } else { nan(rows * in_dim) };
        let mut dx = put(d, &spread(&old, in_dim, x_stride))?;
        d.linear_backward_input(LinearBackwardInput {
            dx: dx.all_mut(),
            dy: dy.all(),
            w: w.all(),
            dims: self.dims,
            out: self.out,
        })?;
        let old = |name: &str, len: usize| -> Vec<X::Acc> {
            if self.out == Out::Add { inputs.sums(name, len) } else { nan(len) }
        };
        let mut dw = put(d, &old("dw", out_dim * in_dim))?;
        let mut dbias =
            put(d, &if self.bias { old("dbias", out_dim) } else { vec![X::Acc::zero(); out_dim] })?;
        let dbias_view = self.bias.then(|| dbias.all_mut());
        let (dy, x) = (dy.all(), x.all());
        d.linear_backward_weight(LinearBackwardWeight {
            dw: dw.all_mut(),
            dbias: dbias_view,
            dy,
            x,
            dims: self.dims,
            out: self.out,
        })?;
        let mut results = Results::default();
        results.take(d, "y", &y)?;
        results.take_rows(d, "dx", &dx, in_dim, x_stride)?;
        results.take(d, "dw", &dw)?;
        results.take(d, "dbias", &dbias)?;
        Ok(results)
    }
}

#[test]
fn linear_layers() {
    for (rows, in_dim, out_dim, gap, bias, residual) in [
        (1, 5, 3, 0, true, false),
        (5, 123, 40, 3, true, true),
        (70, 64, 96, 8, false, true),
        (9, 32, 8, 0, false, false),
    ] {
        let dims = LinearDims { x_stride: in_dim + gap, ..LinearDims::new(rows, in_dim, out_dim) };
        let out = if gap == 0 { Out::Assign } else { Out::Add };
        let (case, name) = (Layer { dims, bias, residual, out }, format!("linear {dims:?}"));
        check(&name, &case, PRODUCT);
        check_with_library(&name, &case, PRODUCT);
    }
}

struct Head {
    dims: LmHeadDims,
    gradient: bool,
}

impl Case for Head {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let LmHeadDims { tokens, labels, hidden, vocab, chunk } = self.dims;
        let x = put(d, &inputs.values::<X>("x", tokens * hidden))?;
        let w = put(d, &inputs.values::<X>("w", vocab * hidden))?;
        let rows: Vec<u32> = (0..labels).map(|i| (i * tokens / labels) as u32).collect();
        let (rows, targets) = (put(d, &rows)?, put(d, &random_ids("targets", labels, vocab))?);
        let weights = put(d, &inputs.sums::<X::Acc>("weights", labels))?;
        let mut loss = put(d, &nan::<X::Acc>(labels))?;
        let mut dx = put(d, &nan::<X>(tokens * hidden))?;
        let mut dw = put(d, &inputs.sums::<X::Acc>("dw", vocab * hidden))?;
        let mut logits = put(d, &nan::<X>(chunk * vocab))?;
        let [mut gathered, mut d_rows] =
            [put(d, &nan::<X>(chunk * hidden))?, put(d, &nan::<X>(chunk * hidden))?];
        let scratch =
            LmHeadScratch { logits: logits.all_mut(), rows: gathered.all_mut(), d_rows: d_rows.all_mut() };
        let (dx_to, dw_to) = match self.gradient {
            true => (Some(dx.all_mut()), Some(dw.all_mut())),
            false => (None, None),
        };
        let (rows, targets, weights) = (rows.all(), targets.all(), weights.all());
        let (x, w, dims) = (x.all(), w.all(), self.dims);
        let loss_view = loss.all_mut();
        d.lm_head_loss(LmHeadLoss {
            loss: loss_view,
            dx: dx_to,
            dw: dw_to,
            scratch,
            x,
            w,
            rows,
            targets,
            weights,
            dims,
        })?;
        let mut results = Results::default();
        results.take(d, "loss", &loss)?;
        if self.gradient {
            results.take(d, "dx", &dx)?;
            results.take(d, "dw", &dw)?;
        }
        Ok(results)
    }
}

#[test]
fn lm_head() {
    for (tokens, labels, hidden, vocab, chunk, gradient) in [
        (1, 1, 8, 33, 1, true),
        (7, 5, 16, 123, 2, true),
        (9, 9, 24, 1000, 4, false),
        (20, 11, 32, 640, 16, true),
    ] {
        let dims = LmHeadDims { tokens, labels, hidden, vocab, chunk };
        // Logits are rounded to bf16, and with a norm of a few units that shows in the losses.
        let tolerance = Tolerance { f32: 3e-6, bf16: 2e-2 };
        let (case, name) = (Head { dims, gradient }, format!("lm_head {dims:?}"));
        check(&name, &case, tolerance);
        check_with_library(&name, &case, tolerance);
    }
}

struct Largest {
    rows: usize,
    cols: usize,
}

impl Case for Largest {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let mut values = inputs.values::<X>("logits", self.rows * self.cols);
        // Equal largest values, of which the first counts, and NaN, which does not.
        for row in values.chunks_mut(self.cols) {
            if self.cols > 4 {
                row[self.cols / 2] = X::from_f64(50.0);
                row[self.cols - 1] = X::from_f64(50.0);
                row[1] = X::from_f64(f64::NAN);
            }
        }
        let logits = put(d, &values)?;
        let mut ids = put(d, &vec![77u32; self.rows])?;
        d.argmax(ids.all_mut(), logits.all(), self.rows, self.cols)?;
        let mut results = Results::default();
        results.take_ids(d, "ids", &ids)?;
        Ok(results)
    }
}

#[test]
fn argmax() {
    for (rows, cols) in [(1, 1), (5, 123), (3, 4096), (2, 5003)] {
        check(&format!("argmax {rows}×{cols}"), &Largest { rows, cols }, Tolerance::ROUNDING);
    }
}
