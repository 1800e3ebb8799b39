//! Layer norm.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::{LayerNorm, LayerNormBackward, LayerNormForward, Out, RmsNormDims};

/// Inputs x, w, b; output y.
struct Case {
    dims: RmsNormDims,
    out: Out,
}

impl Case {
    fn new(rows: usize, cols: usize, gap: usize, out: Out) -> Self {
        let (x_stride, y_stride) = (cols + gap, cols + 2 * gap);
        Self { dims: RmsNormDims { x_stride, y_stride, ..RmsNormDims::new(rows, cols, 1e-5) }, out }
    }

    /// Rows whose mean is not near 0.
    fn inputs(&self) -> Vec<Vec<f64>> {
        let x = random("x", self.dims.rows * self.dims.cols).into_iter().map(|x| x + 1.5).collect();
        vec![x, random("w", self.dims.cols), random("b", self.dims.cols)]
    }

    fn x<X: CpuReal>(&self, packed: &[X]) -> Vec<X> {
        spread(packed, self.dims.cols, self.dims.x_stride)
    }

    fn y<X: CpuReal>(&self, packed: &[X]) -> Vec<X> {
        spread(packed, self.dims.cols, self.dims.y_stride)
    }

    /// y, and means and 1/σ.
    fn run<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> (Vec<X>, Vec<X>) {
        let mut y = self.y(&nan::<X>(inputs[0].len()));
        let mut stats = nan(2 * self.dims.rows);
        cpu.layernorm_forward(LayerNormForward {
            y: &mut y,
            stats: &mut stats,
            x: &self.x(&inputs[0]),
            w: &inputs[1],
            b: &inputs[2],
            dims: self.dims,
        })
        .expect("shapes agree");
        (packed(&y, self.dims.cols, self.dims.y_stride), stats)
    }
}

impl OpCase for Case {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        vec![self.run(cpu, inputs).0]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let stats = self.run(cpu, inputs).1;
        let (is_added, cols) = (self.out == Out::Add, self.dims.cols);
        let old = if is_added { before(inputs[0].len()) } else { nan(inputs[0].len()) };
        let (mut dx, mut dw, mut db) = (self.x::<X>(&old), before(cols), before(cols));
        cpu.layernorm_backward(LayerNormBackward {
            dx: &mut dx,
            dw_db: Some([&mut dw, &mut db]),
            dy: &self.y(&d[0]),
            x: &self.x(&inputs[0]),
            stats: &stats,
            w: &inputs[1],
            dims: self.dims,
            out: self.out,
        })
        .expect("shapes agree");
        let dx = packed(&dx, cols, self.dims.x_stride);
        vec![Some(if is_added { added(&dx) } else { dx }), Some(added(&dw)), Some(added(&db))]
    }
}

#[test]
fn gradients() {
    for (rows, cols) in [(1, 2), (1, 5), (5, 123), (123, 5), (3, 128)] {
        for (gap, out) in [(0, Out::Assign), (3, Out::Add), (7, Out::Assign)] {
            let case = Case::new(rows, cols, gap, out);
            check_gradients(&format!("layernorm {rows}×{cols}"), &case, &case.inputs());
        }
    }
}

#[test]
fn f32_and_threads() {
    for (rows, cols, gap, out) in
        [(1, 5, 0, Out::Assign), (123, 896, 0, Out::Assign), (201, 301, 3, Out::Add)]
    {
        let case = Case::new(rows, cols, gap, out);
        check_f32("layernorm", &case, &case.inputs(), 3e-6);
    }
}

#[test]
fn forward_is_the_formula() {
    let case = Case::new(5, 123, 2, Out::Assign);
    let inputs = case.inputs();
    let (y, stats) = case.run(&Cpu::new(1), &inputs);
    let mut expected = Vec::new();
    for (i, row) in inputs[0].chunks(123).enumerate() {
        let mean = row.iter().sum::<f64>() / 123.0;
        let sigma = (row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / 123.0 + 1e-5).sqrt();
        assert_close("mean", &[stats[i]], &[mean], 1e-13);
        assert_close("1/σ", &[stats[5 + i]], &[1.0 / sigma], 1e-13);
        let weights = inputs[1].iter().zip(&inputs[2]);
        expected.extend(row.iter().zip(weights).map(|(x, (w, b))| (x - mean) / sigma * w + b));
    }
    assert_close("y", &y, &expected, 1e-13);
}

/// A row far from 0 compared with its spread: the variance is not a difference of large sums.
#[test]
fn rows_far_from_zero_keep_their_digits() {
    let case = Case::new(1, 512, 0, Out::Assign);
    let mut inputs = case.inputs();
    inputs[0].iter_mut().for_each(|x| *x = (*x + 3000.0) as f32 as f64);
    let single: Vec<Vec<f32>> = inputs.iter().map(|x| to(x)).collect();
    let (found, exact) = (case.run(&Cpu::new(1), &single).0, case.run(&Cpu::new(1), &inputs).0);
    assert_close("y", &found, &exact, 1e-3);
}

#[test]
fn without_dw_and_with_wrong_shapes() {
    let (cpu, dims) = (Cpu::new(2), RmsNormDims::new(2, 5, 1e-5));
    let (x, w) = (random("x", 10), random("w", 5));
    let forward = |y: usize, stats: usize, x: &[f64], w: &[f64], b: &[f64]| {
        let (mut y, mut stats) = (nan::<f64>(y), nan::<f64>(stats));
        cpu.layernorm_forward(LayerNormForward { y: &mut y, stats: &mut stats, x, w, b, dims })
    };
    forward(10, 4, &x, &w, &w).unwrap();
    assert_shape_error(forward(9, 4, &x, &w, &w));
    assert_shape_error(forward(10, 3, &x, &w, &w));
    assert_shape_error(forward(10, 4, &x[1..], &w, &w));
    assert_shape_error(forward(10, 4, &x, &w[1..], &w));
    assert_shape_error(forward(10, 4, &x, &w, &w[1..]));
    let backward = |dx: &mut [f64], dw: usize, db: usize, dy: &[f64], stats: usize| {
        let (mut dw, mut db, stats) = (vec![0.0; dw], vec![0.0; db], vec![0.5; stats]);
        let dw_db = (!dw.is_empty()).then_some([&mut dw[..], &mut db[..]]);
        let (x, stats, out) = (&x[..], &stats[..], Out::Assign);
        cpu.layernorm_backward(LayerNormBackward { dx, dw_db, dy, x, stats, w: &w, dims, out })
    };
    let mut dx = nan::<f64>(10);
    backward(&mut dx, 0, 0, &x, 4).unwrap();
    assert!(dx.iter().all(|x| x.is_finite()));
    assert_shape_error(backward(&mut dx, 4, 5, &x, 4));
    assert_shape_error(backward(&mut dx, 5, 4, &x, 4));
    assert_shape_error(backward(&mut dx, 5, 5, &x[1..], 4));
    assert_shape_error(backward(&mut dx, 5, 5, &x, 3));
    assert_shape_error(backward(&mut dx[1..], 5, 5, &x, 4));
}
