//! RMS layer norm.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::{Out, RmsNorm, RmsNormBackward, RmsNormDims, RmsNormForward};

/// Inputs x, w; output y.
struct Case {
    dims: RmsNormDims,
    out: Out,
}

impl Case {
    fn new(rows: usize, cols: usize, gap: usize, out: Out) -> Self {
        let dims = RmsNormDims {
            x_stride: cols + gap,
            y_stride: cols + 2 * gap,
            ..RmsNormDims::new(rows, cols, 1e-6)
        };
        Self { dims, out }
    }

    fn inputs(&self) -> Vec<Vec<f64>> {
        vec![random("x", self.dims.rows * self.dims.cols), random("w", self.dims.cols)]
    }

    fn x<X: CpuReal>(&self, packed: &[X]) -> Vec<X> {
        spread(packed, self.dims.cols, self.dims.x_stride)
    }

    fn y<X: CpuReal>(&self, packed: &[X]) -> Vec<X> {
        spread(packed, self.dims.cols, self.dims.y_stride)
    }

    /// y and 1/rms.
    fn run<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> (Vec<X>, Vec<X>) {
        let mut y = self.y(&nan::<X>(inputs[0].len()));
        let mut inv = nan(self.dims.rows);
        cpu.rmsnorm_forward(RmsNormForward {
            y: &mut y,
            inv_rms: &mut inv,
            x: &self.x(&inputs[0]),
            w: &inputs[1],
            dims: self.dims,
        })
        .expect("shapes agree");
        (packed(&y, self.dims.cols, self.dims.y_stride), inv)
    }
}

impl OpCase for Case {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        vec![self.run(cpu, inputs).0]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let (_, inv) = self.run(cpu, inputs);
        let old = if self.out == Out::Add { before(inputs[0].len()) } else { nan(inputs[0].len()) };
        let (mut dx, mut dw) = (self.x::<X>(&old), before(self.dims.cols));
        let (dy, x) = (self.y(&d[0]), self.x(&inputs[0]));
        cpu.rmsnorm_backward(RmsNormBackward {
            dx: &mut dx,
            dw: Some(&mut dw),
            dy: &dy,
            x: &x,
            inv_rms: &inv,
            w: &inputs[1],
            dims: self.dims,
            out: self.out,
        })
        .expect("shapes agree");
        let dx = packed(&dx, self.dims.cols, self.dims.x_stride);
        vec![Some(if self.out == Out::Add { added(&dx) } else { dx }), Some(added(&dw))]
    }
}

#[test]
fn gradients() {
    for (rows, cols) in [(1, 1), (1, 5), (5, 123), (123, 5), (3, 128)] {
        for (gap, out) in [(0, Out::Assign), (3, Out::Add), (7, Out::Assign)] {
            let case = Case::new(rows, cols, gap, out);
            check_gradients(&format!("rmsnorm {rows}×{cols}"), &case, &case.inputs());
        }
    }
}

#[test]
fn f32_and_threads() {
    for (rows, cols, gap, out) in
        [(1, 5, 0, Out::Assign), (123, 896, 0, Out::Assign), (201, 301, 3, Out::Add)]
    {
        let case = Case::new(rows, cols, gap, out);
        check_f32("rmsnorm", &case, &case.inputs(), 3e-6);
    }
}

#[test]
fn forward_is_the_formula() {
    let case = Case::new(5, 123, 2, Out::Assign);
    let inputs = case.inputs();
    let (y, inv) = case.run(&Cpu::new(1), &inputs);
    let mut expected = Vec::new();
    for (row, &inv) in inputs[0].chunks(123).zip(&inv) {
        let rms = (row.iter().map(|x| x * x).sum::<f64>() / 123.0 + 1e-6).sqrt();
        assert_close("1/rms", &[inv], &[1.0 / rms], 1e-14);
        expected.extend(row.iter().zip(&inputs[1]).map(|(x, w)| x / rms * w));
    }
    assert_close("y", &y, &expected, 1e-14);
}

#[test]
fn without_dw_and_with_wrong_shapes() {
    let cpu = Cpu::new(2);
    let dims = RmsNormDims::new(2, 5, 1e-6);
    let (x, w) = (random("x", 10), random("w", 5));
    let (mut y, mut inv) = (nan::<f64>(10), nan::<f64>(2));
    cpu.rmsnorm_forward(RmsNormForward { y: &mut y, inv_rms: &mut inv, x: &x, w: &w, dims }).unwrap();
    let mut dx = nan::<f64>(10);
    cpu.rmsnorm_backward(RmsNormBackward {
        dx: &mut dx,
        dw: None,
        dy: &x,
        x: &x,
        inv_rms: &inv,
        w: &w,
        dims,
        out: Out::Assign,
    })
    .unwrap();
    assert!(dx.iter().all(|x| x.is_finite()));

    assert_shape_error(cpu.rmsnorm_forward(RmsNormForward {
        y: &mut y[1..],
        inv_rms: &mut inv,
        x: &x,
        w: &w,
        dims,
    }));
    assert_shape_error(cpu.rmsnorm_forward(RmsNormForward {
        y: &mut y,
        inv_rms: &mut inv[1..],
        x: &x,
        w: &w,
        dims,
    }));
    assert_shape_error(cpu.rmsnorm_forward(RmsNormForward {
        y: &mut y,
        inv_rms: &mut inv,
        x: &x[1..],
        w: &w,
        dims,
    }));
    assert_shape_error(cpu.rmsnorm_forward(RmsNormForward {
        y: &mut y,
        inv_rms: &mut inv,
        x: &x,
        w: &w[1..],
        dims,
    }));
    let mut dw = [0.0; 4];
    assert_shape_error(cpu.rmsnorm_backward(RmsNormBackward {
        dx: &mut dx,
        dw: Some(&mut dw),
        dy: &x,
        x: &x,
        inv_rms: &inv,
        w: &w,
        dims,
        out: Out::Add,
    }));
    assert_shape_error(cpu.rmsnorm_backward(RmsNormBackward {
        dx: &mut dx[1..],
        dw: None,
        dy: &x,
        x: &x,
        inv_rms: &inv,
        w: &w,
        dims,
        out: Out::Add,
    }));
    assert_shape_error(cpu.rmsnorm_backward(RmsNormBackward {
        dx: &mut dx,
        dw: None,
        dy: &x[1..],
        x: &x,
        inv_rms: &inv,
        w: &w,
        dims,
        out: Out::Add,
    }));
}
