//! Linear layers.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::{
    Linear, LinearBackwardInput, LinearBackwardWeight, LinearDims, LinearForward, Out,
};

/// Strided x, with or without bias and residual.
struct Case {
    dims: LinearDims,
    extras: bool,
}

impl OpCase for Case {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        let [x, w, bias, residual] = inputs else { panic!("four inputs") };
        let mut y = nan(self.dims.rows * self.dims.out_dim);
        let (bias, residual) = (self.extras.then_some(&bias[..]), self.extras.then_some(&residual[..]));
        cpu.linear_forward(LinearForward { y: &mut y, x, w, bias, residual, dims: self.dims })
            .expect("the shapes fit");
        vec![y]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let mut grads: Vec<Vec<X>> = inputs.iter().map(|x| vec![X::zero(); x.len()]).collect();
        let [dx, dw, dbias, residual] = &mut grads[..] else { panic!("four inputs") };
        cpu.linear_backward_input(LinearBackwardInput {
            dx,
            dy: &d[0],
            w: &inputs[1],
            dims: self.dims,
            out: Out::Add,
        })
        .expect("the shapes fit");
        let dbias = self.extras.then_some(&mut dbias[..]);
        cpu.linear_backward_weight(LinearBackwardWeight {
            dw,
            dbias,
            dy: &d[0],
            x: &inputs[0],
            dims: self.dims,
            out: Out::Add,
        })
        .expect("the shapes fit");
        if self.extras {
            residual.copy_from_slice(&d[0]);
        }
        grads.into_iter().map(Some).collect()
    }
}

#[test]
fn gradients() {
    for (rows, in_dim, out_dim, gap) in [(1, 3, 2, 0), (5, 7, 123, 2), (123, 5, 1, 1), (9, 16, 33, 0)] {
        for extras in [true, false] {
            let dims = LinearDims { x_stride: in_dim + gap, ..LinearDims::new(rows, in_dim, out_dim) };
            let x = random("x", rows * dims.x_stride);
            let inputs =
                [x, random("w", in_dim * out_dim), random("b", out_dim), random("r", rows * out_dim)];
            let used = if extras { &inputs[..] } else { &inputs[..2] };
            let case = Case { dims, extras };
            if extras {
                check_gradients("linear", &case, used);
            } else {
                check_gradients("linear", &Bare(case), used);
            }
        }
    }
}

/// The same without bias and residual.
struct Bare(Case);

impl OpCase for Bare {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        self.0.forward(cpu, &[inputs[0].clone(), inputs[1].clone(), vec![], vec![]])
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let mut grads = self.0.backward(cpu, &[inputs[0].clone(), inputs[1].clone(), vec![], vec![]], d);
        grads.truncate(2);
        grads
    }
}

#[test]
fn outputs_are_assigned_or_added_to() {
    let dims = LinearDims::new(3, 4, 5);
    let (dy, w) = (random("dy", 15), random("w", 20));
    let cpu = Cpu::new(1);
    let mut assigned = vec![f64::NAN; 12];
    cpu.linear_backward_input(LinearBackwardInput {
        dx: &mut assigned,
        dy: &dy,
        w: &w,
        dims,
        out: Out::Assign,
    })
    .expect("the shapes fit");
    let mut added = vec![1.0; 12];
    cpu.linear_backward_input(LinearBackwardInput { dx: &mut added, dy: &dy, w: &w, dims, out: Out::Add })
        .expect("the shapes fit");
    let expected: Vec<_> = assigned.iter().map(|x| x + 1.0).collect();
    assert_close("dx", &added, &expected, 1e-14);

    let x = random("x", 12);
    let (mut dw, mut dbias) = (vec![f64::NAN; 20], vec![f64::NAN; 5]);
    cpu.linear_backward_weight(LinearBackwardWeight {
        dw: &mut dw,
        dbias: Some(&mut dbias),
        dy: &dy,
        x: &x,
        dims,
        out: Out::Assign,
    })
    .expect("the shapes fit");
    let (mut more, mut more_bias) = (vec![1.0; 20], vec![1.0; 5]);
    cpu.linear_backward_weight(LinearBackwardWeight {
        dw: &mut more,
        dbias: Some(&mut more_bias),
        dy: &dy,
        x: &x,
        dims,
        out: Out::Add,
    })
    .expect("the shapes fit");
    let plus_one = |x: &[f64]| -> Vec<f64> { x.iter().map(|x| x + 1.0).collect() };
    assert_close("dw", &more, &plus_one(&dw), 1e-14);
    assert_close("dbias", &more_bias, &plus_one(&dbias), 1e-14);
}

#[test]
fn f32_and_threads() {
    let (rows, in_dim, out_dim) = (300, 70, 130);
    let dims = LinearDims { x_stride: 73, ..LinearDims::new(rows, in_dim, out_dim) };
    let x = random("x", rows * dims.x_stride);
    let inputs = [x, random("w", in_dim * out_dim), random("b", out_dim), random("r", rows * out_dim)];
    check_f32("linear", &Case { dims, extras: true }, &inputs, 2e-6);
}

#[test]
fn wrong_shapes_are_errors() {
    let cpu = Cpu::new(1);
    let dims = LinearDims::new(2, 3, 4);
    let (mut y, x, w, b) = (vec![0.0; 8], vec![0.0; 6], vec![0.0; 12], vec![0.0; 4]);
    assert_shape_error(cpu.linear_forward(LinearForward {
        y: &mut y[1..],
        x: &x,
        w: &w,
        bias: None,
        residual: None,
        dims,
    }));
    assert_shape_error(cpu.linear_forward(LinearForward {
        y: &mut y,
        x: &x[1..],
        w: &w,
        bias: None,
        residual: None,
        dims,
    }));
    assert_shape_error(cpu.linear_forward(LinearForward {
        y: &mut y,
        x: &x,
        w: &w[1..],
        bias: None,
        residual: None,
        dims,
    }));
    assert_shape_error(cpu.linear_forward(LinearForward {
        y: &mut y,
        x: &x,
        w: &w,
        bias: Some(&b[1..]),
        residual: None,
        dims,
    }));
    assert_shape_error(cpu.linear_forward(LinearForward {
        y: &mut y,
        x: &x,
        w: &w,
        bias: None,
        residual: Some(&b),
        dims,
    }));
    assert_shape_error(cpu.linear_backward_weight(LinearBackwardWeight {
        dw: &mut y,
        dbias: None,
        dy: &[0.0; 8],
        x: &x,
        dims,
        out: Out::Add,
    }));
}
