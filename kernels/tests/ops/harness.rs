//! Negative controls: the gradient check and the comparison see what they must see.

use crate::common::*;
use gradtx_kernels::cpu::CpuReal;

/// y = x² w, z = e^x, with a factor on the backward pass: 1 is right.
struct Square {
    factor: f64,
}

impl OpCase for Square {
    fn forward<X: CpuReal>(&self, inputs: &[Vec<X>]) -> Vec<Vec<X>> {
        let [x, w] = inputs else { panic!("two inputs") };
        let y = x.iter().zip(w).map(|(&x, &w)| x * x * w).collect();
        vec![y, x.iter().map(|x| x.exp()).collect()]
    }

    fn backward(&self, inputs: &[Vec<f64>], d: &[Vec<f64>]) -> Vec<Option<Vec<f64>>> {
        let (x, w) = (&inputs[0], &inputs[1]);
        let n = x.len();
        let mut dx: Vec<_> = (0..n).map(|i| 2.0 * x[i] * w[i] * d[0][i] + x[i].exp() * d[1][i]).collect();
        dx[n / 2] *= self.factor;
        vec![Some(dx), Some((0..n).map(|i| x[i] * x[i] * d[0][i]).collect())]
    }
}

#[test]
fn a_right_gradient_passes() {
    for n in [1, 5, 123] {
        let inputs = [random("x", n), random("w", n)];
        check_gradients("square", &Square { factor: 1.0 }, &inputs);
    }
}

#[test]
#[should_panic(expected = "gradient of input 0")]
fn one_slightly_wrong_element_of_many_fails() {
    let inputs = [random("x", 123), random("w", 123)];
    check_gradients("square", &Square { factor: 1.0 + 1e-6 }, &inputs);
}

#[test]
#[should_panic(expected = "gradient of input 0")]
fn nan_fails() {
    let inputs = [random("x", 5), random("w", 5)];
    check_gradients("square", &Square { factor: f64::NAN }, &inputs);
}

#[test]
fn comparison_sees_nan_and_length() {
    assert!(relative_error(&[1.0, 2.0], &[1.0, 2.0]) <= 0.0);
    assert!(relative_error(&[1.0, f64::NAN], &[1.0, 2.0]).is_nan());
    assert!(relative_error(&[1.0], &[1.0, 2.0]).is_infinite());
    assert!(relative_error(&[1.0, 2.001], &[1.0, 2.0]) > 1e-4);
}
