//! Gated activations.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::{
    Dropout, DropoutDims, GatedActivation, GatedDims, GatedDropoutBackward, GatedDropoutForward, GatedKind,
};

/// Input `[gate | up]`; output h.
struct Case(GatedDims);

impl Case {
    fn new(rows: usize, cols: usize, gap: usize, kind: GatedKind) -> Self {
        Self(GatedDims { rows, cols, h_stride: cols + gap, kind })
    }

    fn inputs(&self) -> Vec<Vec<f64>> {
        let wide = random("gate_up", self.0.rows * 2 * self.0.cols);
        vec![wide.into_iter().map(|x| 3.0 * x).collect()]
    }
}

impl OpCase for Case {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        let GatedDims { cols, h_stride, .. } = self.0;
        let mut h = spread(&nan::<X>(self.0.rows * cols), cols, h_stride);
        cpu.gated_forward(&mut h, &inputs[0], self.0).expect("shapes agree");
        vec![packed(&h, cols, h_stride)]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let mut d_gate_up = nan(inputs[0].len());
        let dh = spread(&d[0], self.0.cols, self.0.h_stride);
        cpu.gated_backward(&mut d_gate_up, &dh, &inputs[0], self.0).expect("shapes agree");
        vec![Some(d_gate_up)]
    }
}

const KINDS: [GatedKind; 2] = [GatedKind::Silu, GatedKind::GeluTanh];

#[test]
fn gradients() {
    for kind in KINDS {
        for (rows, cols, gap) in [(1, 1, 0), (5, 1, 2), (1, 5, 0), (5, 123, 3), (123, 5, 0)] {
            let case = Case::new(rows, cols, gap, kind);
            check_gradients(&format!("{kind:?} {rows}×{cols}"), &case, &case.inputs());
        }
    }
}

#[test]
fn f32_and_threads() {
    for kind in KINDS {
        for (rows, cols, gap) in [(1, 5, 0), (123, 301, 3)] {
            let case = Case::new(rows, cols, gap, kind);
            check_f32(&format!("{kind:?}"), &case, &case.inputs(), 1e-6);
        }
    }
}

#[test]
fn forward_is_the_formula() {
    for kind in KINDS {
        let case = Case::new(5, 123, 1, kind);
        let inputs = case.inputs();
        let mut expected = Vec::new();
        for row in inputs[0].chunks(246) {
            for c in 0..123 {
                let x = row[c];
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                let value = match kind {
                    GatedKind::Silu => x / (1.0 + (-x).exp()),
                    GatedKind::GeluTanh => x / 2.0 * (1.0 + inner.tanh()),
                };
                expected.push(value * row[123 + c]);
            }
        }
        assert_close("h", &case.forward(&Cpu::new(1), &inputs)[0], &expected, 1e-14);
    }
}

#[test]
fn large_arguments_stay_finite() {
    for kind in KINDS {
        let case = Case::new(1, 6, 0, kind);
        let mut gate_up = vec![1.0f32; 12];
        gate_up[..6].copy_from_slice(&[1e4, -1e4, 300.0, -300.0, 1e-30, -1e-30]);
        let h = &case.forward(&Cpu::new(1), std::slice::from_ref(&gate_up))[0];
        assert_eq!(h[..4], [1e4, 0.0, 300.0, 0.0]);
        let d = case.backward(&Cpu::new(1), &[gate_up], &[vec![1.0; 6]]);
        let d = d[0].as_ref().unwrap();
        assert_eq!(d[..6], [1.0, 0.0, 1.0, 0.0, 0.5, 0.5], "{kind:?}");
    }
}

#[test]
fn wrong_shapes() {
    let cpu = Cpu::new(2);
    let dims = Case::new(2, 5, 1, GatedKind::Silu).0;
    let (mut h, mut gate_up) = (vec![0.0; 11], random("gate_up", 20));
    let dh = random("dh", 11);
    cpu.gated_forward(&mut h, &gate_up, dims).unwrap();
    assert_shape_error(cpu.gated_forward(&mut h[1..], &gate_up, dims));
    assert_shape_error(cpu.gated_forward(&mut h, &gate_up[1..], dims));
    assert_shape_error(cpu.gated_backward(&mut gate_up[1..], &dh, &random("x", 20), dims));
    assert_shape_error(cpu.gated_backward(&mut gate_up, &dh[1..], &random("x", 20), dims));
    assert!(cpu.gated_forward(&mut h, &gate_up, GatedDims { h_stride: 4, ..dims }).is_err(), "rows overlap");
}

/// The same with dropout of h.
struct Dropped(Case, DropoutDims);

impl Dropped {
    fn new(rows: usize, cols: usize, gap: usize, kind: GatedKind) -> Self {
        let drop = DropoutDims { rows, cols, rows_per_key: 3, p: 0.3, site: 8 };
        Self(Case::new(rows, cols, gap, kind), drop)
    }

    fn keys(&self) -> Vec<u64> {
        (0..self.1.rows as u64 / 3).map(|b| 9 + b * 0x1_0000_0001).collect()
    }
}

impl OpCase for Dropped {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        let GatedDims { rows, cols, h_stride, .. } = self.0.0;
        let mut h = spread(&nan::<X>(rows * cols), cols, h_stride);
        cpu.gated_dropout_forward(GatedDropoutForward {
            h: &mut h,
            gate_up: &inputs[0],
            keys: &self.keys(),
            dims: self.0.0,
            drop: self.1,
        })
        .expect("shapes agree");
        vec![packed(&h, cols, h_stride)]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let mut d_gate_up = nan(inputs[0].len());
        let dh = spread(&d[0], self.0.0.cols, self.0.0.h_stride);
        cpu.gated_dropout_backward(GatedDropoutBackward {
            d_gate_up: &mut d_gate_up,
            dh: &dh,
            gate_up: &inputs[0],
            keys: &self.keys(),
            dims: self.0.0,
            drop: self.1,
        })
        .expect("shapes agree");
        vec![Some(d_gate_up)]
    }
}

#[test]
fn dropout_of_the_result() {
    for kind in KINDS {
        for (rows, cols, gap) in [(3, 5, 0), (6, 123, 3), (123, 301, 0)] {
            let case = Dropped::new(rows, cols, gap, kind);
            check_gradients(&format!("{kind:?} {rows}×{cols}"), &case, &case.0.inputs());
            check_f32(&format!("{kind:?} with dropout"), &case, &case.0.inputs(), 1e-6);
            // To the bit as one after the other.
            let cpu = Cpu::new(2);
            let inputs: Vec<Vec<f32>> = case.0.inputs().iter().map(|x| to(x)).collect();
            let mut h = case.0.forward(&cpu, &inputs).remove(0);
            let plain = h.clone();
            cpu.dropout(&mut h, &case.keys(), case.1).unwrap();
            assert_eq!(case.forward(&cpu, &inputs)[0], h);
            assert_ne!(plain, h, "nothing was dropped");
            let mut dh: Vec<f32> = to(&random("dh", rows * cols));
            let found = case.backward(&cpu, &inputs, &[dh.clone()]);
            cpu.dropout(&mut dh, &case.keys(), case.1).unwrap();
            assert_eq!(found, case.0.backward(&cpu, &inputs, &[dh]));
        }
    }
    let case = Dropped::new(6, 5, 0, GatedKind::Silu);
    let (mut h, gate_up) = ([0.0; 30], [0.5; 60]);
    let cpu = Cpu::new(1);
    let other = DropoutDims { cols: 4, ..case.1 };
    assert_shape_error(cpu.gated_dropout_forward(GatedDropoutForward {
        h: &mut h,
        gate_up: &gate_up,
        keys: &case.keys(),
        dims: case.0.0,
        drop: other,
    }));
    assert_shape_error(cpu.gated_dropout_forward(GatedDropoutForward {
        h: &mut h,
        gate_up: &gate_up,
        keys: &[1],
        dims: case.0.0,
        drop: case.1,
    }));
}
