//! Operations on flat memory: sums, casts, gathers, fills, norms and AdamW.

use crate::common::*;
use gradtx_kernels::cuda::Cuda;
use gradtx_kernels::ops::{AdamWStep, AdamWUpdate, Elementwise, RandomRows, StridedRows};
use gradtx_kernels::{Backend, Buffer, Real, Result};

/// Sums, differences and casts of `n` elements, `offset` elements into their buffers.
struct Flat {
    n: usize,
    offset: usize,
}

impl Case for Flat {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let all = self.offset + self.n;
        let range = self.offset..all;
        let x = put(d, &inputs.values::<X>("x", all))?;
        let wide = put(d, &inputs.sums::<X::Acc>("wide", all))?;
        let x_view = || x.view(range.clone());
        let mut results = Results::default();
        for (a, b, name) in [(0.7, 0.0, "a·x"), (1.0, 1.0, "x + y"), (-0.3, 1.5, "a·x + b·y")] {
            let old = if b == 0.0 { nan(all) } else { inputs.values::<X>("y", all) };
            let mut y = put(d, &old)?;
            d.axpby(y.view_mut(range.clone()), a, x_view(), b)?;
            let mut part = put(d, &nan::<X>(self.n))?;
            d.copy(part.all_mut(), y.view(range.clone()))?;
            results.take(d, name, &part)?;
        }
        let y = put(d, &inputs.values::<X>("y", self.n))?;
        let mut out = put(d, &nan::<X>(self.n))?;
        d.difference(out.all_mut(), x_view(), y.all())?;
        results.take(d, "x − y", &out)?;
        let mut widened = put(d, &nan::<X::Acc>(self.n))?;
        d.cast(widened.all_mut(), x_view())?;
        results.take(d, "widened", &widened)?;
        d.cast(out.all_mut(), wide.view(range.clone()))?;
        results.take(d, "narrowed", &out)?;
        d.fill(out.all_mut(), X::from_f64(0.75))?;
        results.take(d, "filled", &out)?;
        Ok(results)
    }
}

#[test]
fn sums_differences_and_casts() {
    for (n, offset) in [(1, 0), (5, 3), (123, 1), (4096, 0), (5003, 8)] {
        check(&format!("flat {n} from {offset}"), &Flat { n, offset }, Tolerance::ROUNDING);
    }
}

struct Gather {
    rows: usize,
    cols: usize,
}

impl Case for Gather {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let x = put(d, &inputs.values::<X>("table", 7 * self.cols))?;
        let ids = put(d, &random_ids("ids", self.rows, 7))?;
        let mut out = put(d, &nan::<X>(self.rows * self.cols))?;
        d.gather_rows(out.all_mut(), x.all(), ids.all(), self.cols)?;
        let mut results = Results::default();
        results.take(d, "out", &out)?;
        let row = put(d, &inputs.values::<X>("row", self.cols))?;
        let mut sum = put(d, &inputs.values::<X>("sum", self.rows * self.cols))?;
        d.add_row(sum.all_mut(), row.all())?;
        results.take(d, "sum", &sum)?;
        Ok(results)
    }
}

#[test]
fn gathered_rows() {
    for (rows, cols) in [(1, 1), (5, 123), (12, 64), (3, 2056)] {
        check(&format!("gather {rows}×{cols}"), &Gather { rows, cols }, Tolerance::ROUNDING);
    }
}

/// Rows copied from an offset to an offset.
struct Strided {
    offset: usize,
    dims: StridedRows,
}

impl Case for Strided {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let StridedRows { rows, out_stride, x_stride, .. } = self.dims;
        let x = put(d, &inputs.values::<X>("x", self.offset + rows * x_stride))?;
        // What lies between the rows stays.
        let mut out = put(d, &inputs.values::<X>("out", self.offset + rows * out_stride))?;
        let all = self.offset..self.offset + rows * out_stride;
        let x = x.view(self.offset..self.offset + rows * x_stride);
        Elementwise::<X>::copy_strided(d, out.view_mut(all), x, self.dims)?;
        let mut results = Results::default();
        results.take(d, "out", &out)?;
        Ok(results)
    }
}

#[test]
fn strided_rows() {
    for (rows, cols, out_stride, x_stride, offset) in [
        (1, 1, 1, 1, 0),
        (5, 123, 130, 124, 3),
        (12, 64, 96, 64, 0),
        (3, 2056, 4112, 2064, 8),
        (33, 4099, 4099, 5000, 1),
    ] {
        let dims = StridedRows { rows, cols, out_stride, x_stride };
        check(&format!("{dims:?} from {offset}"), &Strided { offset, dims }, Tolerance::ROUNDING);
    }
}

/// Random numbers in rows, NaN between them.
struct Drawn {
    rows: RandomRows,
}

impl Case for Drawn {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, _: Inputs) -> Result<Results> {
        let RandomRows { rows, cols, stride, .. } = self.rows;
        let mut out = put(d, &nan::<X>(rows * stride))?;
        Elementwise::<X>::random_rows(d, out.all_mut(), self.rows)?;
        let mut results = Results::default();
        results.take_rows(d, "out", &out, cols, stride)?;
        Ok(results)
    }
}

/// The numbers are the same on the CPU and on the device, to the bit in f32, and rounded once in bf16.
#[test]
fn random_numbers() {
    use gradtx_emulator::{SCHEDULE, Variant, configure, device};
    use gradtx_kernels::cpu::Cpu;
    for (rows, cols, stride) in [(1, 1, 1), (1, 4099, 4099), (7, 33, 40), (64, 130, 194)] {
        let rows = RandomRows { rows, cols, stride, key: 0x1234_5678_9abc, std: 0.02 };
        check(&format!("random {rows:?}"), &Drawn { rows }, Tolerance { f32: 1e-12, bf16: 4e-3 });
        configure(SCHEDULE);
        let inputs = Inputs::new(Precision::F32);
        let on_device = Drawn { rows }.run::<Cuda, f32>(&device(Variant::PLAIN), inputs);
        let on_host = Drawn { rows }.run::<Cpu, f32>(&Cpu::new(2), inputs);
        assert_eq!(on_device.expect("memory"), on_host.expect("memory"));
    }
}

/// Norm, clipping and two steps of AdamW.
struct Optimizer {
    rows: usize,
    len: usize,
    max_norm: f64,
}

impl Case for Optimizer {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let (rows, len) = (self.rows, self.len);
        let n = rows * len;
        let g = put(d, &inputs.sums::<X::Acc>("g", n))?;
        let [mut p, mut m] =
            [put(d, &inputs.sums::<X::Acc>("p", n))?, put(d, &inputs.sums::<X::Acc>("m", n))?];
        let squares: Vec<X::Acc> = inputs.sums::<X::Acc>("v", n).into_iter().map(|v| v * v).collect();
        let mut v = put(d, &squares)?;
        let (mut sums, mut scale) = (put(d, &nan::<X::Acc>(rows))?, put(d, &nan::<X::Acc>(rows))?);
        d.sum_squares(sums.all_mut(), g.all(), rows, len)?;
        d.clip_scale(scale.all_mut(), sums.all(), rows, self.max_norm)?;
        let mut y = put(d, &nan::<X>(n))?;
        for step in [1, 2] {
            let step = AdamWStep { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.05, step };
            let (p, m, v) = (p.all_mut(), m.all_mut(), v.all_mut());
            match step.step {
                1 => d.adamw(AdamWUpdate { p, m, v, g: g.all(), scale: scale.all(), rows, len, step })?,
                _ => {
                    let (y, scale) = (y.all_mut(), scale.all());
                    d.adamw_cast(y, AdamWUpdate { p, m, v, g: g.all(), scale, rows, len, step })?;
                }
            }
        }
        let mut results = Results::default();
        // A step that must not happen: one norm is not finite.
        let mut broken = d.to_host(sums.all())?;
        broken[rows - 1] = X::Acc::from_f64(f64::INFINITY);
        let broken = put(d, &broken)?;
        let mut refused = put(d, &nan::<X::Acc>(rows))?;
        d.clip_scale(refused.all_mut(), broken.all(), rows, f64::INFINITY)?;
        assert!(d.to_host(refused.all())?[rows - 1].to_f64().is_nan());
        {
            let (y, refused) = (y.all_mut(), refused.all());
            let (p, m, v) = (p.all_mut(), m.all_mut(), v.all_mut());
            let step =
                AdamWStep { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.05, step: 3 };
            d.adamw_cast(y, AdamWUpdate { p, m, v, g: g.all(), scale: refused, rows, len, step })?;
        }
        for (name, buf) in [("sums", &sums), ("scale", &scale), ("p", &p), ("m", &m), ("v", &v)] {
            results.take(d, name, buf)?;
        }
        // The values in X are the masters, rounded once.
        let rounded: Vec<X> = d.to_host(p.all())?.into_iter().map(|p| X::from_f64(p.to_f64())).collect();
        assert!(d.to_host(y.all())? == rounded, "values are not their masters, rounded");
        Ok(results)
    }
}

#[test]
fn norms_and_steps() {
    for (rows, len, max_norm) in [(1, 1, 1.0), (3, 123, 0.5), (2, 9000, 1e6), (5, 64, 2.0)] {
        let case = Optimizer { rows, len, max_norm };
        check(&format!("adamw {rows}×{len}"), &case, Tolerance { f32: 2e-6, bf16: 2e-6 });
    }
}
