//! ReLU.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::{Relu, ReluDims};

/// Input x; output h.
struct Case(ReluDims);

impl Case {
    fn new(rows: usize, cols: usize, gap: usize) -> Self {
        Self(ReluDims { rows, cols, h_stride: cols + gap })
    }

    fn inputs(&self) -> Vec<Vec<f64>> {
        vec![random("x", self.0.rows * self.0.cols)]
    }
}

impl OpCase for Case {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        let ReluDims { cols, h_stride, .. } = self.0;
        let mut h = spread(&nan::<X>(inputs[0].len()), cols, h_stride);
        cpu.relu_forward(&mut h, &inputs[0], self.0).expect("shapes agree");
        vec![packed(&h, cols, h_stride)]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let mut dx = nan(inputs[0].len());
        let dh = spread(&d[0], self.0.cols, self.0.h_stride);
        cpu.relu_backward(&mut dx, &dh, &inputs[0], self.0).expect("shapes agree");
        vec![Some(dx)]
    }
}

#[test]
fn gradients_f32_and_threads() {
    for (rows, cols, gap) in [(1, 1, 0), (5, 1, 2), (5, 123, 3), (123, 301, 0)] {
        let case = Case::new(rows, cols, gap);
        check_gradients(&format!("relu {rows}×{cols}"), &case, &case.inputs());
        check_f32("relu", &case, &case.inputs(), 1e-7);
    }
}

#[test]
fn signs_zero_and_nan() {
    let (cpu, dims) = (Cpu::new(1), Case::new(1, 4, 0).0);
    let x = [-2.0f32, 0.0, 3.0, f32::NAN];
    let (mut h, mut dx) = ([1.0; 4], [1.0; 4]);
    cpu.relu_forward(&mut h, &x, dims).unwrap();
    assert!(h[..3] == [0.0, 0.0, 3.0] && h[3].is_nan(), "{h:?}");
    cpu.relu_backward(&mut dx, &[5.0, 6.0, 7.0, 8.0], &x, dims).unwrap();
    assert_eq!(dx[..3], [0.0, 0.0, 7.0]);
}

#[test]
fn wrong_shapes() {
    let (cpu, dims) = (Cpu::new(1), Case::new(3, 5, 0).0);
    let (mut h, x) = ([0.0; 15], [0.5; 15]);
    assert_shape_error(cpu.relu_forward(&mut h[1..], &x, dims));
    assert_shape_error(cpu.relu_forward(&mut h, &x[1..], dims));
    assert_shape_error(cpu.relu_backward(&mut h, &x[1..], &x, dims));
    assert_shape_error(cpu.relu_backward(&mut h[1..], &x, &x, dims));
    assert_shape_error(cpu.relu_backward(&mut h, &x, &x[1..], dims));
    assert!(cpu.relu_forward(&mut h, &x, ReluDims { h_stride: 4, ..dims }).is_err(), "rows overlap");
}
