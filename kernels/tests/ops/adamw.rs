//! AdamW and clipping against a plain reference.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};
use gradtx_kernels::ops::{AdamW, AdamWStep, AdamWUpdate};

const STEP: AdamWStep =
    AdamWStep { lr: 3e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: 1 };

/// p, m, v after some steps with clipping, each row on its own.
fn train<A: CpuReal>(cpu: &Cpu, rows: usize, len: usize, steps: u32, max_norm: f64) -> [Vec<A>; 3] {
    let mut p = to::<A>(&random("p", rows * len));
    let (mut m, mut v) = (to::<A>(&vec![0.0; rows * len]), to::<A>(&vec![0.0; rows * len]));
    let (mut sums, mut scale) = (nan::<A>(rows), nan::<A>(rows));
    for step in 1..=steps {
        let g = to::<A>(&random(&format!("g{step}"), rows * len));
        cpu.sum_squares(&mut sums, &g, rows, len).expect("shapes agree");
        cpu.clip_scale(&mut scale, &sums, rows, max_norm).expect("shapes agree");
        cpu.adamw(AdamWUpdate {
            p: &mut p,
            m: &mut m,
            v: &mut v,
            g: &g,
            scale: &scale,
            rows,
            len,
            step: AdamWStep { step, ..STEP },
        })
        .expect("shapes agree");
    }
    [p, m, v]
}

/// The same, one scalar after the other, as the formula stands.
fn reference(rows: usize, len: usize, steps: u32, max_norm: f64) -> [Vec<f64>; 3] {
    let mut p = random("p", rows * len);
    let (mut m, mut v) = (vec![0.0; rows * len], vec![0.0; rows * len]);
    for t in 1..=steps as i32 {
        let g = random(&format!("g{t}"), rows * len);
        for row in 0..rows {
            let all = row * len..(row + 1) * len;
            let norm = g[all.clone()].iter().map(|g| g * g).sum::<f64>().sqrt();
            let clip = (max_norm / (norm + 1e-6)).min(1.0);
            for i in all {
                let g = clip * g[i];
                m[i] = STEP.beta1 * m[i] + (1.0 - STEP.beta1) * g;
                v[i] = STEP.beta2 * v[i] + (1.0 - STEP.beta2) * g * g;
                let m_hat = m[i] / (1.0 - STEP.beta1.powi(t));
                let v_hat: f64 = v[i] / (1.0 - STEP.beta2.powi(t));
                p[i] =
                    p[i] * (1.0 - STEP.lr * STEP.weight_decay) - STEP.lr * m_hat / (v_hat.sqrt() + STEP.eps);
            }
        }
    }
    [p, m, v]
}

#[test]
fn equals_the_reference() {
    // With norms of about √len, the limits clip every row, none, and some.
    for (rows, len, max_norm) in
        [(1, 1, 0.5), (5, 123, 1.0), (3, 5, 1e9), (7, 5, 2.0), (1, 40_000, 1.0), (2, 30_011, 1.0)]
    {
        let exact = reference(rows, len, 5, max_norm);
        let wide = train::<f64>(&Cpu::new(1), rows, len, 5, max_norm);
        let single = train::<f32>(&Cpu::new(1), rows, len, 5, max_norm);
        for (i, name) in ["p", "m", "v"].iter().enumerate() {
            assert_close(name, &wide[i], &exact[i], 1e-13);
            assert_close(name, &single[i], &exact[i], 2e-6);
        }
        for threads in [2, 3] {
            assert_eq!(train::<f32>(&Cpu::new(threads), rows, len, 5, max_norm), single, "{threads} threads");
        }
    }
}

#[test]
fn norms_of_long_rows_are_accurate_on_all_threads() {
    let len = 700_001;
    let g = random("g", len);
    let exact: f64 = g.iter().map(|g| g * g).sum();
    let g = to::<f32>(&g);
    let sums = [1, 2, 3].map(|threads| {
        let mut sum = [f32::NAN];
        Cpu::new(threads).sum_squares(&mut sum, &g, 1, len).unwrap();
        sum[0]
    });
    assert_close("sum of squares", &sums[..1], &[exact], 1e-6);
    assert_eq!(sums[0].to_bits(), sums[1].to_bits());
    assert_eq!(sums[0].to_bits(), sums[2].to_bits());
}

#[test]
fn clip_scale_keeps_small_gradients_and_shows_nan() {
    let mut scale = [0.0f64; 4];
    Cpu::new(1).clip_scale(&mut scale, &[0.25, 16.0, 0.0, f64::NAN], 4, 1.0).unwrap();
    assert_eq!(scale[..3], [1.0, 1.0 / (4.0 + 1e-6), 1.0]);
    assert!(scale[3].is_nan());
}

#[test]
fn wrong_shapes_and_step() {
    let cpu = Cpu::new(2);
    let x = random("x", 6);
    let [mut p, mut m, mut v] = [x.clone(), x.clone(), x.clone()];
    let mut scale = [1.0; 2];
    assert_shape_error(cpu.sum_squares(&mut scale[1..], &x, 2, 3));
    assert_shape_error(cpu.sum_squares(&mut scale, &x[1..], 2, 3));
    assert_shape_error(cpu.clip_scale(&mut scale, &x, 2, 1.0));
    assert_shape_error(cpu.adamw(AdamWUpdate {
        p: &mut p[1..],
        m: &mut m,
        v: &mut v,
        g: &x,
        scale: &scale,
        rows: 2,
        len: 3,
        step: STEP,
    }));
    assert_shape_error(cpu.adamw(AdamWUpdate {
        p: &mut p,
        m: &mut m[1..],
        v: &mut v,
        g: &x,
        scale: &scale,
        rows: 2,
        len: 3,
        step: STEP,
    }));
    assert_shape_error(cpu.adamw(AdamWUpdate {
        p: &mut p,
        m: &mut m,
        v: &mut v[1..],
        g: &x,
        scale: &scale,
        rows: 2,
        len: 3,
        step: STEP,
    }));
    assert_shape_error(cpu.adamw(AdamWUpdate {
        p: &mut p,
        m: &mut m,
        v: &mut v,
        g: &x[1..],
        scale: &scale,
        rows: 2,
        len: 3,
        step: STEP,
    }));
    assert_shape_error(cpu.adamw(AdamWUpdate {
        p: &mut p,
        m: &mut m,
        v: &mut v,
        g: &x,
        scale: &scale[1..],
        rows: 2,
        len: 3,
        step: STEP,
    }));
    let zero = AdamWStep { step: 0, ..STEP };
    assert!(
        cpu.adamw(AdamWUpdate {
            p: &mut p,
            m: &mut m,
            v: &mut v,
            g: &x,
            scale: &scale,
            rows: 2,
            len: 3,
            step: zero
        })
        .is_err()
    );
}
