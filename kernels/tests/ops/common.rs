//! What the tests of operations share: random inputs, comparisons that fail on NaN,
//! and the complex-step gradient check.
//!
//! The check needs a forward pass generic over the number type. For the loss
//! `L = Σ c ⊙ outputs` with random `c`, and inputs `x + i·h·v`, `Im L / h` is the
//! derivative of L along v without cancellation: h is so small that its square
//! vanishes. It must equal `Σ gradient · v` of the backward pass to rounding.

use gradtx_kernels::cpu::CpuReal;
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_kernels::{Complex64, Error, Real, Result};

/// Largest relative error of a gradient in f64.
pub const GRADIENT_TOLERANCE: f64 = 1e-9;

/// `len` normal random numbers, others for every name.
pub fn random(name: &str, len: usize) -> Vec<f64> {
    let mut stream = Stream::new(derive_named(2026, name));
    (0..len).map(|_| stream.normal()).collect()
}

/// `len` random integers below `n`.
pub fn random_ids(name: &str, len: usize, n: usize) -> Vec<u32> {
    let mut stream = Stream::new(derive_named(2027, name));
    (0..len).map(|_| stream.below(n) as u32).collect()
}

/// Conversion to the type under test, to the nearest value.
pub fn to<X: Real>(values: &[f64]) -> Vec<X> {
    values.iter().map(|&x| X::from_f64(x)).collect()
}

/// Real parts.
pub fn to_f64<X: Real>(values: &[X]) -> Vec<f64> {
    values.iter().map(|x| x.to_f64()).collect()
}

/// `‖found − expected‖ / ‖expected‖`; NaN if any element is, infinite if lengths differ.
pub fn relative_error(found: &[f64], expected: &[f64]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
    let diff = found.iter().zip(expected).map(|(f, e)| (f - e) * (f - e)).sum::<f64>().sqrt();
    if diff == 0.0 { 0.0 } else { diff / norm }
}

/// Fails unless the relative error (of norms) is at most `tolerance`; NaN fails.
pub fn assert_close<X: Real, Y: Real>(what: &str, found: &[X], expected: &[Y], tolerance: f64) {
    let error = relative_error(&to_f64(found), &to_f64(expected));
    assert!(error <= tolerance, "{what}: relative error {error:e} above {tolerance:e}");
}

/// Fails unless an operation refused a wrong shape.
pub fn assert_shape_error(result: Result<()>) {
    match result {
        Err(Error::Shape { .. }) => {}
        other => panic!("expected a shape error, found {other:?}"),
    }
}

/// One operation as the gradient check sees it.
pub trait OpCase {
    /// The outputs for these inputs.
    fn forward<X: CpuReal>(&self, inputs: &[Vec<X>]) -> Vec<Vec<X>>;

    /// The gradient of every input for these gradients of the outputs; none where the
    /// operation has none.
    fn backward(&self, inputs: &[Vec<f64>], d_outputs: &[Vec<f64>]) -> Vec<Option<Vec<f64>>>;
}

/// Derivative of `Σ c ⊙ outputs` when input `k` moves along `v`.
fn derivative(case: &impl OpCase, inputs: &[Vec<f64>], c: &[Vec<f64>], k: usize, v: &[f64]) -> f64 {
    const STEP: f64 = 1e-30;
    let mut moved: Vec<Vec<Complex64>> = inputs.iter().map(|x| to(x)).collect();
    for (x, v) in moved[k].iter_mut().zip(v) {
        x.im = STEP * v;
    }
    let outputs = case.forward(&moved);
    assert_eq!(outputs.len(), c.len());
    let mut sum = 0.0;
    for (output, c) in outputs.iter().zip(c) {
        assert_eq!(output.len(), c.len());
        sum += output.iter().zip(c).map(|(y, c)| y.im / STEP * c).sum::<f64>();
    }
    sum
}

/// Relative error of the gradient of every input that has one: the worst of several
/// random directions, and of every single element where there are few.
pub fn gradient_errors(case: &impl OpCase, inputs: &[Vec<f64>]) -> Vec<(usize, f64)> {
    let outputs = case.forward(inputs);
    let c: Vec<_> = outputs.iter().enumerate().map(|(i, y)| random(&format!("c{i}"), y.len())).collect();
    let gradients = case.backward(inputs, &c);
    assert_eq!(gradients.len(), inputs.len());
    let mut errors = Vec::new();
    for (k, gradient) in gradients.iter().enumerate() {
        let Some(g) = gradient else { continue };
        assert_eq!(g.len(), inputs[k].len(), "length of the gradient of input {k}");
        let mut found = Vec::new();
        let mut exact = Vec::new();
        for direction in 0..4 {
            let v = random(&format!("v{k}.{direction}"), g.len());
            found.push(g.iter().zip(&v).map(|(g, v)| g * v).sum::<f64>());
            exact.push(derivative(case, inputs, &c, k, &v));
        }
        let mut error = relative_error(&found, &exact);
        if g.len() <= 64 {
            let unit = |j: usize| (0..g.len()).map(|i| if i == j { 1.0 } else { 0.0 }).collect::<Vec<_>>();
            let exact: Vec<_> = (0..g.len()).map(|j| derivative(case, inputs, &c, k, &unit(j))).collect();
            let single = relative_error(g, &exact);
            // Not f64::max, which would lose a NaN.
            if single.is_nan() || single > error {
                error = single;
            }
        }
        errors.push((k, error));
    }
    assert!(!errors.is_empty(), "no gradient was checked");
    errors
}

/// Fails unless every gradient agrees with the complex-step derivative.
pub fn check_gradients(what: &str, case: &impl OpCase, inputs: &[Vec<f64>]) {
    for (k, error) in gradient_errors(case, inputs) {
        assert!(error <= GRADIENT_TOLERANCE, "{what}: gradient of input {k} is off by {error:e}");
    }
}
