//! Negative controls: the gradient check and the comparison see what they must see.

use crate::common::*;
use gradtx_kernels::cpu::{Cpu, CpuReal};

/// y = x² w, z = e^x, with a backward pass that can be made wrong.
struct Square {
    /// Factor of one element of dx: 1 is right.
    factor: f64,
    /// Added to dx under three threads: 0 is right.
    thread_error: f64,
}

impl OpCase for Square {
    fn forward<X: CpuReal>(&self, _: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        let [x, w] = inputs else { panic!("two inputs") };
        let y = x.iter().zip(w).map(|(&x, &w)| x * x * w).collect();
        vec![y, x.iter().map(|x| x.exp()).collect()]
    }

    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d: &[Vec<X>]) -> Gradients<X> {
        let (x, w) = (&inputs[0], &inputs[1]);
        let n = x.len();
        let two = X::from_f64(2.0);
        let mut dx: Vec<X> = (0..n).map(|i| two * x[i] * w[i] * d[0][i] + x[i].exp() * d[1][i]).collect();
        dx[n / 2] *= X::from_f64(self.factor);
        if cpu.threads() == 3 {
            dx[0] += X::from_f64(self.thread_error);
        }
        vec![Some(dx), Some((0..n).map(|i| x[i] * x[i] * d[0][i]).collect())]
    }
}

const RIGHT: Square = Square { factor: 1.0, thread_error: 0.0 };

#[test]
fn a_right_gradient_passes() {
    for n in [1, 5, 123] {
        let inputs = [random("x", n), random("w", n)];
        check_gradients("square", &RIGHT, &inputs);
        check_f32("square", &RIGHT, &inputs, 1e-6);
    }
}

#[test]
#[should_panic(expected = "gradient of input 0")]
fn one_slightly_wrong_element_of_many_fails() {
    let inputs = [random("x", 123), random("w", 123)];
    check_gradients("square", &Square { factor: 1.0 + 1e-6, ..RIGHT }, &inputs);
}

#[test]
#[should_panic(expected = "gradient of input 0")]
fn nan_fails() {
    let inputs = [random("x", 5), random("w", 5)];
    check_gradients("square", &Square { factor: f64::NAN, ..RIGHT }, &inputs);
}

#[test]
fn comparison_sees_nan_and_length() {
    assert!(relative_error(&[1.0, 2.0], &[1.0, 2.0]) <= 0.0);
    assert!(relative_error(&[1.0, f64::NAN], &[1.0, 2.0]).is_nan());
    assert!(relative_error(&[1.0], &[1.0, 2.0]).is_infinite());
    assert!(relative_error(&[1.0, 2.001], &[1.0, 2.0]) > 1e-4);
}

#[test]
#[should_panic(expected = "relative error")]
fn wrong_f32_fails() {
    // No f32 is that exact.
    let inputs = [random("x", 5), random("w", 5)];
    check_f32("square", &RIGHT, &inputs, 1e-12);
}

#[test]
#[should_panic(expected = "3 threads differ from one")]
fn results_that_depend_on_threads_fail() {
    let inputs = [random("x", 5), random("w", 5)];
    check_f32("square", &Square { thread_error: 1e-3, ..RIGHT }, &inputs, 1e-6);
}
