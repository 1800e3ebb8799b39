//! Sums, gathers and conversions.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::{Cast, Elementwise, StridedRows};
use gradtx_kernels::{Complex64, bf16, f16};

/// Inputs x, y; outputs `2x − 3y`, `x − y`, gathered rows of x, and x with the first row of y in every row.
struct Case {
    rows: usize,
    cols: usize,
}

impl Case {
    fn ids(&self) -> Vec<u32> {
        // Each row once, so that the gradient is a gather of the inverse order.
        (0..self.rows as u32).rev().collect()
    }
}

impl OpCase for Case {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        let [x, y] = inputs else { panic!("two inputs") };
        let (mut sum, mut difference, mut rows) = (y.clone(), nan(y.len()), nan(y.len()));
        cpu.axpby(&mut sum, 2.0, x, -3.0).expect("shapes agree");
        cpu.difference(&mut difference, x, y).expect("shapes agree");
        cpu.gather_rows(&mut rows, x, &self.ids(), self.cols).expect("shapes agree");
        let mut with_row = x.clone();
        cpu.add_row(&mut with_row, &y[..self.cols]).expect("shapes agree");
        vec![sum, difference, rows, with_row]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, _: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        // The adjoints, with the same operations.
        let mut dx = nan(d[0].len());
        cpu.gather_rows(&mut dx, &d[2], &self.ids(), self.cols).expect("shapes agree");
        cpu.axpby(&mut dx, 2.0, &d[0], 1.0).expect("shapes agree");
        cpu.axpby(&mut dx, 1.0, &d[1], 1.0).expect("shapes agree");
        cpu.axpby(&mut dx, 1.0, &d[3], 1.0).expect("shapes agree");
        let mut dy = nan(d[0].len());
        cpu.axpby(&mut dy, -3.0, &d[0], 0.0).expect("shapes agree");
        cpu.axpby(&mut dy, -1.0, &d[1], 1.0).expect("shapes agree");
        for row in d[3].chunks(self.cols) {
            cpu.axpby(&mut dy[..self.cols], 1.0, row, 1.0).expect("shapes agree");
        }
        vec![Some(dx), Some(dy)]
    }
}

#[test]
fn linear_maps_and_their_adjoints() {
    for (rows, cols) in [(1, 1), (5, 123), (123, 301)] {
        let inputs = [random("x", rows * cols), random("y", rows * cols)];
        check_gradients("elementwise", &Case { rows, cols }, &inputs);
        check_f32("elementwise", &Case { rows, cols }, &inputs, 1e-6);
    }
}

/// Rows apart from each other, on one thread and on three, against single elements.
#[test]
fn strided_rows() {
    for (rows, cols, out_stride, x_stride) in
        [(1, 1, 1, 1), (3, 5, 5, 9), (7, 40_001, 40_003, 40_001), (50, 123, 130, 124)]
    {
        let dims = StridedRows { rows, cols, out_stride, x_stride };
        let x: Vec<f32> = (0..(rows - 1) * x_stride + cols).map(|i| i as f32).collect();
        let mut wanted = vec![-1.0; (rows - 1) * out_stride + cols];
        for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
            wanted[r * out_stride + c] = x[r * x_stride + c];
        }
        for threads in [1, 3] {
            let mut out = vec![-1.0; wanted.len()];
            Cpu::new(threads).copy_strided(&mut out, &x, dims).unwrap();
            assert!(out == wanted, "{dims:?} on {threads} threads");
        }
        let cpu = Cpu::new(1);
        let short = wanted.len() - 1;
        assert_shape_error(cpu.copy_strided(&mut vec![0.0; short], &x, dims));
        assert!(cpu.copy_strided(&mut wanted, &x, StridedRows { x_stride: cols - 1, ..dims }).is_err());
    }
    Cpu::new(2)
        .copy_strided(&mut [0.0f32; 2], &[], StridedRows { rows: 0, cols: 2, out_stride: 2, x_stride: 2 })
        .unwrap();
}

#[test]
fn values() {
    let cpu = Cpu::new(1);
    let mut y = [f32::NAN, f32::NAN];
    cpu.axpby(&mut y, 2.0, &[1.0, 3.0], 0.0).unwrap();
    assert_eq!(y, [2.0, 6.0]);
    cpu.axpby(&mut y, 0.5, &[4.0, 8.0], 10.0).unwrap();
    assert_eq!(y, [22.0, 64.0]);
    let mut out = [0.0f32; 4];
    cpu.gather_rows(&mut out, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 2], 2).unwrap();
    assert_eq!(out, [5.0, 6.0, 5.0, 6.0]);
    cpu.add_row(&mut out, &[1.0, -1.0]).unwrap();
    assert_eq!(out, [6.0, 5.0, 6.0, 5.0]);
}

/// Every finite bfloat16 and half value, and what lies between.
fn interesting() -> Vec<f32> {
    let mut values = Vec::new();
    for bits in 0..=u16::MAX {
        let low = f32::from_bits((bits as u32) << 16);
        values.extend([low, f16::from_bits(bits).to_f32()]);
        // Exact ties, and the neighbours of ties.
        values.extend([0x7FFF, 0x8000, 0x8001].map(|rest| f32::from_bits((bits as u32) << 16 | rest)));
    }
    values.extend(random("casts", 1000).iter().map(|&x| x as f32));
    values
}

#[test]
fn sixteen_bits_round_to_the_nearest_and_keep_nan() {
    let values = interesting();
    for threads in [1, 3] {
        let cpu = Cpu::new(threads);
        let (mut b, mut h) = (vec![bf16::ZERO; values.len()], vec![f16::ZERO; values.len()]);
        cpu.cast(&mut b, &values).unwrap();
        cpu.cast(&mut h, &values).unwrap();
        let (mut wide_b, mut wide_h) = (nan::<f32>(values.len()), nan::<f32>(values.len()));
        cpu.cast(&mut wide_b, &b).unwrap();
        cpu.cast(&mut wide_h, &h).unwrap();
        for (i, &x) in values.iter().enumerate() {
            if x.is_nan() {
                assert!(b[i].is_nan() && h[i].is_nan() && wide_b[i].is_nan() && wide_h[i].is_nan());
                continue;
            }
            assert_eq!(b[i].to_bits(), bf16::from_f32(x).to_bits(), "{x} to bfloat16");
            assert_eq!(h[i].to_bits(), f16::from_f32(x).to_bits(), "{x} to half");
            assert_eq!(wide_b[i].to_bits(), b[i].to_f32().to_bits());
            assert_eq!(wide_h[i].to_bits(), h[i].to_f32().to_bits());
        }
    }
}

#[test]
fn wide_types_and_wrong_shapes() {
    let cpu = Cpu::new(2);
    let x = random("x", 5);
    let (mut single, mut same, mut back) = (nan::<f32>(5), nan::<f64>(5), nan::<f64>(5));
    cpu.cast(&mut single, &x).unwrap();
    assert_eq!(single, to::<f32>(&x));
    cpu.cast(&mut same, &x).unwrap();
    assert_eq!(same, x);
    cpu.cast(&mut back, &single).unwrap();
    assert_eq!(back, to_f64(&single));
    let (z, mut copy) = (to::<Complex64>(&x), nan::<Complex64>(5));
    cpu.cast(&mut copy, &z).unwrap();
    assert_eq!(copy, z);
    let (s, mut copy) = (single.clone(), nan::<f32>(5));
    cpu.cast(&mut copy, &s).unwrap();
    assert_eq!(copy, s);

    assert_shape_error(cpu.cast(&mut single[1..], &x));
    assert_shape_error(cpu.cast(&mut [f16::ZERO; 4], &s));
    assert_shape_error(cpu.axpby(&mut same[1..], 1.0, &x, 1.0));
    assert_shape_error(cpu.difference(&mut same, &x[1..], &x));
    assert_shape_error(cpu.difference(&mut same, &x, &x[1..]));
    assert_shape_error(cpu.add_row(&mut same, &x[..2]));
    assert!(cpu.add_row(&mut same, &[]).is_err(), "a row without columns");
    assert_shape_error(cpu.gather_rows(&mut same, &x, &[0], 4));
    assert!(cpu.gather_rows(&mut same[..2], &x[..4], &[2], 2).is_err(), "row beyond the matrix");
}
