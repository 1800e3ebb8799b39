//! Dropout.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::{DROPOUT_STREAM, Dropout, DropoutDims};
use gradtx_kernels::rng::{drop_threshold, philox};

/// Input and output x.
struct Case(DropoutDims);

impl Case {
    fn new(rows: usize, cols: usize, rows_per_key: usize, p: f64) -> Self {
        Self(DropoutDims { rows, cols, rows_per_key, p, site: 9 })
    }

    fn keys(&self) -> Vec<u64> {
        (0..self.0.rows / self.0.rows_per_key).map(|b| 1 + b as u64 * 0x1_0000_0001).collect()
    }

    fn apply<X: CpuReal>(&self, cpu: &Cpu, x: &[X]) -> Vec<X> {
        let mut x = x.to_vec();
        cpu.dropout(&mut x, &self.keys(), self.0).expect("shapes agree");
        x
    }
}

impl OpCase for Case {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        vec![self.apply(cpu, &inputs[0])]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, _: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        vec![Some(self.apply(cpu, &d[0]))]
    }
}

#[test]
fn gradients_f32_and_threads() {
    for (rows, cols, rows_per_key) in [(1, 1, 1), (5, 123, 1), (123, 5, 41), (6, 64, 3), (120, 301, 30)] {
        let case = Case::new(rows, cols, rows_per_key, 0.3);
        let inputs = [random("x", rows * cols)];
        // A single element may well be dropped, and its gradient be zero on both sides.
        check_gradients("dropout", &case, &inputs);
        check_f32("dropout", &case, &inputs, 1e-6);
    }
}

#[test]
fn masks_are_those_of_the_contract() {
    let case = Case::new(6, 123, 3, 0.25);
    let x = random("x", 6 * 123);
    let y = case.apply(&Cpu::new(1), &x);
    let keys = case.keys();
    let mut kept = 0;
    for (i, (&x, &y)) in x.iter().zip(&y).enumerate() {
        let (row, c) = (i / 123, i % 123);
        let counter = [(row % 3) as u32, (c / 4) as u32, 9, DROPOUT_STREAM];
        let keep = philox(keys[row / 3], counter)[c % 4] >= drop_threshold(0.25);
        kept += usize::from(keep);
        assert_eq!(y, if keep { x * (1.0 / 0.75) } else { 0.0 });
    }
    assert!((500..610).contains(&kept), "{kept} of 738 kept");
}

#[test]
fn nothing_dropped_and_wrong_arguments() {
    let cpu = Cpu::new(2);
    let mut x = random("x", 12);
    let dims = Case::new(4, 3, 2, 0.5).0;
    let same = x.clone();
    cpu.dropout(&mut x, &[], DropoutDims { p: 0.0, ..dims }).unwrap();
    assert_eq!(x, same);
    assert_shape_error(cpu.dropout(&mut x[1..], &[1, 2], dims));
    assert_shape_error(cpu.dropout(&mut x, &[1], dims));
    assert!(cpu.dropout(&mut x, &[1, 2], DropoutDims { p: 1.0, ..dims }).is_err());
    assert!(cpu.dropout(&mut x, &[1, 2], DropoutDims { p: f64::NAN, ..dims }).is_err());
    assert!(cpu.dropout(&mut x, &[1, 2], DropoutDims { rows_per_key: 3, ..dims }).is_err());
}
