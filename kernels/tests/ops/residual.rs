//! Residual sum with dropout, and the norm after it.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::{
    Dropout, DropoutDims, Elementwise, Out, ResidualNorm, ResidualNormBackward, ResidualNormDims,
    ResidualNormForward, RmsNorm, RmsNormBackward, RmsNormBackwardWeight, RmsNormDims, RmsNormForward,
};

/// Inputs branch, residual, w; outputs sum, y.
struct Case(ResidualNormDims);

impl Case {
    fn new(rows: usize, cols: usize, rows_per_key: usize, p: f64) -> Self {
        Self(ResidualNormDims { drop: DropoutDims { rows, cols, rows_per_key, p, site: 5 }, eps: 1e-6 })
    }

    fn size(&self) -> usize {
        self.0.drop.rows * self.0.drop.cols
    }

    fn norm(&self) -> RmsNormDims {
        RmsNormDims::new(self.0.drop.rows, self.0.drop.cols, self.0.eps)
    }

    fn keys(&self) -> Vec<u64> {
        (0..self.0.drop.rows / self.0.drop.rows_per_key).map(|b| 3 + b as u64 * 0x1_0000_0001).collect()
    }

    fn inputs(&self) -> Vec<Vec<f64>> {
        let n = self.size();
        vec![random("branch", n), random("residual", n), random("w", self.0.drop.cols)]
    }

    /// sum, y and 1/rms.
    fn run<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> [Vec<X>; 3] {
        let [branch, residual, w] = inputs else { panic!("three inputs") };
        let (mut sum, mut y, mut inv) = (branch.clone(), nan(self.size()), nan(self.0.drop.rows));
        cpu.residual_norm_forward(ResidualNormForward {
            sum: &mut sum,
            y: &mut y,
            inv_rms: &mut inv,
            residual,
            w,
            keys: &self.keys(),
            dims: self.0,
        })
        .expect("shapes agree");
        [sum, y, inv]
    }

    /// The same by separate operations.
    fn run_apart<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> [Vec<X>; 3] {
        let [branch, residual, w] = inputs else { panic!("three inputs") };
        let (mut sum, mut y, mut inv) = (branch.clone(), nan(self.size()), nan(self.0.drop.rows));
        cpu.dropout(&mut sum, &self.keys(), self.0.drop).expect("shapes agree");
        cpu.axpby(&mut sum, 1.0, residual, 1.0).expect("shapes agree");
        cpu.rmsnorm_forward(RmsNormForward { y: &mut y, inv_rms: &mut inv, x: &sum, w, dims: self.norm() })
            .expect("shapes agree");
        [sum, y, inv]
    }
}

impl OpCase for Case {
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        let [sum, y, _] = self.run(cpu, inputs);
        vec![sum, y]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let [sum, _, inv] = self.run(cpu, inputs);
        let (mut dx, mut d_branch, mut dw) = (d[0].clone(), nan(self.size()), nan(inputs[2].len()));
        let (w, keys) = (&inputs[2], self.keys());
        cpu.residual_norm_backward(ResidualNormBackward {
            dx: &mut dx,
            d_branch: &mut d_branch,
            dy: &d[1],
            x: &sum,
            inv_rms: &inv,
            w,
            keys: &keys,
            dims: self.0,
            out: Out::Add,
        })
        .expect("shapes agree");
        cpu.rmsnorm_backward_weight(RmsNormBackwardWeight {
            dw: &mut dw,
            dy: &d[1],
            x: &sum,
            inv_rms: &inv,
            dims: self.norm(),
            out: Out::Assign,
        })
        .expect("shapes agree");
        vec![Some(d_branch), Some(dx), Some(dw)]
    }
}

const SHAPES: [(usize, usize, usize); 5] = [(1, 3, 1), (5, 123, 1), (124, 5, 31), (6, 64, 3), (60, 301, 30)];

#[test]
fn gradients_f32_and_threads() {
    for (rows, cols, rows_per_key) in SHAPES {
        for p in [0.0, 0.3] {
            let case = Case::new(rows, cols, rows_per_key, p);
            check_gradients(&format!("residual {rows}×{cols}"), &case, &case.inputs());
            check_f32("residual", &case, &case.inputs(), 3e-6);
        }
    }
}

#[test]
fn together_as_one_after_the_other() {
    let bits = |x: &[f32]| -> Vec<u32> { x.iter().map(|x| x.to_bits()).collect() };
    for (rows, cols, rows_per_key) in SHAPES {
        let case = Case::new(rows, cols, rows_per_key, 0.3);
        let cpu = Cpu::new(2);
        let inputs: Vec<Vec<f32>> = case.inputs().iter().map(|x| to(x)).collect();
        let (found, expected) = (case.run(&cpu, &inputs), case.run_apart(&cpu, &inputs));
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(bits(found), bits(expected), "forward {rows}×{cols}");
        }
        let other = Case::new(rows, cols, rows_per_key, 0.6).run_apart(&cpu, &inputs);
        assert!(rows * cols < 10 || bits(&found[1]) != bits(&other[1]), "the comparison sees no mask");

        let [sum, _, inv] = &found;
        let (w, keys, n) = (&inputs[2], case.keys(), case.size());
        let dy: Vec<f32> = to(&random("dy", n));
        for out in [Out::Add, Out::Assign] {
            let old: Vec<f32> = if out == Out::Add { to(&random("dx", n)) } else { nan(n) };
            let (mut dx, mut d_branch) = (old.clone(), nan::<f32>(n));
            cpu.residual_norm_backward(ResidualNormBackward {
                dx: &mut dx,
                d_branch: &mut d_branch,
                dy: &dy,
                x: sum,
                inv_rms: inv,
                w,
                keys: &keys,
                dims: case.0,
                out,
            })
            .unwrap();
            let mut expected = old;
            cpu.rmsnorm_backward(RmsNormBackward {
                dx: &mut expected,
                dw: None,
                dy: &dy,
                x: sum,
                inv_rms: inv,
                w,
                dims: case.norm(),
                out,
            })
            .unwrap();
            assert_eq!(bits(&dx), bits(&expected), "dx {rows}×{cols}");
            cpu.dropout(&mut expected, &keys, case.0.drop).unwrap();
            assert_eq!(bits(&d_branch), bits(&expected), "d_branch {rows}×{cols}");
        }
    }
}

#[test]
fn wrong_arguments() {
    let cpu = Cpu::new(1);
    let case = Case::new(4, 3, 2, 0.5);
    let (x, w, inv, keys) = ([0.5f64; 12], [1.0; 3], [1.0; 4], case.keys());
    let (mut sum, mut y, mut inv_rms) = (vec![0.0; 12], vec![0.0; 12], vec![0.0; 4]);
    let forward = |sum: &mut [f64], y: &mut [f64], inv: &mut [f64], w: &[f64], keys: &[u64], dims| {
        cpu.residual_norm_forward(ResidualNormForward { sum, y, inv_rms: inv, residual: &x, w, keys, dims })
    };
    assert_shape_error(forward(&mut sum[1..], &mut y, &mut inv_rms, &w, &keys, case.0));
    assert_shape_error(forward(&mut sum, &mut y[1..], &mut inv_rms, &w, &keys, case.0));
    assert_shape_error(forward(&mut sum, &mut y, &mut inv_rms[1..], &w, &keys, case.0));
    assert_shape_error(forward(&mut sum, &mut y, &mut inv_rms, &w[1..], &keys, case.0));
    assert_shape_error(forward(&mut sum, &mut y, &mut inv_rms, &w, &keys[1..], case.0));
    let odd = ResidualNormDims { drop: DropoutDims { rows_per_key: 3, ..case.0.drop }, ..case.0 };
    assert!(forward(&mut sum, &mut y, &mut inv_rms, &w, &keys, odd).is_err());
    let (mut dx, mut short) = (vec![0.0; 12], vec![0.0; 11]);
    assert_shape_error(cpu.residual_norm_backward(ResidualNormBackward {
        dx: &mut dx,
        d_branch: &mut short,
        dy: &x,
        x: &x,
        inv_rms: &inv,
        w: &w,
        keys: &keys,
        dims: case.0,
        out: Out::Assign,
    }));
}
