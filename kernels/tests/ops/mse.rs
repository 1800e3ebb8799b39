//! Squared error.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::{Mse, MseDims, SquaredError};

/// Input pred; output `factor · Σ (pred − target)²` per row, as the training loss uses it.
struct Case(MseDims);

impl Case {
    fn target<X: CpuReal>(&self) -> Vec<X> {
        to(&random("target", self.0.rows * self.0.cols))
    }
}

impl OpCase for Case {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        let mut sums = nan::<X>(self.0.rows);
        cpu.mse(SquaredError {
            sums: &mut sums,
            d_pred: None,
            pred: &inputs[0],
            target: &self.target::<X>(),
            dims: self.0,
        })
        .expect("shapes agree");
        // The gradient is of the sum over rows.
        vec![vec![sums.into_iter().sum()]]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let dims = MseDims { grad_scale: 2.0 * d[0][0].to_f64(), ..self.0 };
        let (mut sums, mut d_pred) = (nan::<X>(dims.rows), nan(inputs[0].len()));
        cpu.mse(SquaredError {
            sums: &mut sums,
            d_pred: Some(&mut d_pred),
            pred: &inputs[0],
            target: &self.target::<X>(),
            dims,
        })
        .expect("shapes agree");
        vec![Some(d_pred)]
    }
}

#[test]
fn gradients_f32_and_threads() {
    for (rows, cols) in [(1, 1), (5, 123), (123, 5), (123, 301)] {
        let case = Case(MseDims { rows, cols, grad_scale: 1.0 });
        let inputs = [random("pred", rows * cols)];
        check_gradients("mse", &case, &inputs);
        check_f32("mse", &case, &inputs, 1e-6);
    }
}

#[test]
fn sums_are_per_row() {
    let dims = MseDims { rows: 2, cols: 2, grad_scale: 0.5 };
    let (mut sums, mut d) = ([f32::NAN; 2], [f32::NAN; 4]);
    Cpu::new(1)
        .mse(SquaredError {
            sums: &mut sums,
            d_pred: Some(&mut d),
            pred: &[1.0, 2.0, 3.0, 4.0],
            target: &[0.0, 4.0, 3.0, 1.0],
            dims,
        })
        .unwrap();
    assert_eq!(sums, [5.0, 9.0]);
    assert_eq!(d, [0.5, -1.0, 0.0, 1.5]);
}

#[test]
fn wrong_shapes() {
    let cpu = Cpu::new(2);
    let dims = MseDims { rows: 2, cols: 3, grad_scale: 1.0 };
    let (mut sums, x) = ([0.0; 2], random("x", 6));
    let mut d = [0.0; 6];
    assert_shape_error(cpu.mse(SquaredError {
        sums: &mut sums[1..],
        d_pred: None,
        pred: &x,
        target: &x,
        dims,
    }));
    assert_shape_error(cpu.mse(SquaredError {
        sums: &mut sums,
        d_pred: None,
        pred: &x[1..],
        target: &x,
        dims,
    }));
    assert_shape_error(cpu.mse(SquaredError {
        sums: &mut sums,
        d_pred: None,
        pred: &x,
        target: &x[1..],
        dims,
    }));
    assert_shape_error(cpu.mse(SquaredError {
        sums: &mut sums,
        d_pred: Some(&mut d[1..]),
        pred: &x,
        target: &x,
        dims,
    }));
}
