//! What the tests of operations share: random inputs, comparisons that fail on NaN,
//! and the complex-step gradient check.
//!
//! The check needs a forward pass generic over the number type. For the loss
//! `L = Σ c ⊙ outputs` with random `c`, and inputs `x + i·h·v`, `Im L / h` is the
//! derivative of L along v without cancellation: h is so small that its square
//! vanishes. It must equal `Σ gradient · v` of the backward pass to rounding.
//! The same [`OpCase`] then says whether `f32` agrees with `f64`, and whether the
//! number of threads changes a bit.

use gradtx_kernels::cpu::{Cpu, CpuReal};
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

/// What an output that is assigned holds before.
pub fn nan<X: Real>(len: usize) -> Vec<X> {
    vec![X::from_f64(f64::NAN); len]
}

/// What an output that is added to holds before.
pub fn before<X: Real>(len: usize) -> Vec<X> {
    to(&random("before", len))
}

/// What was added to [`before`].
pub fn added<X: Real>(after: &[X]) -> Vec<X> {
    after.iter().zip(before::<X>(after.len())).map(|(&x, old)| x - old).collect()
}

/// Contiguous rows at a stride, with NaN between them; the last row ends at its last value.
pub fn spread<X: Real>(packed: &[X], cols: usize, stride: usize) -> Vec<X> {
    let mut out = nan(packed.len() / cols * stride + cols - stride);
    for (i, row) in packed.chunks(cols).enumerate() {
        out[i * stride..][..cols].copy_from_slice(row);
    }
    out
}

/// The rows that [`spread`] spread. Fails if what lies between them was written to.
pub fn packed<X: Real>(strided: &[X], cols: usize, stride: usize) -> Vec<X> {
    let mut out = Vec::new();
    for row in strided.chunks(stride) {
        out.extend_from_slice(&row[..cols]);
        assert!(row[cols..].iter().all(|x| x.to_f64().is_nan()), "written between rows");
    }
    out
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

/// A gradient per input: none where the operation has none.
pub type Gradients<X> = Vec<Option<Vec<X>>>;

/// One operation as the checks see it.
pub trait OpCase {
    /// The outputs for these inputs.
    fn forward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>]) -> Vec<Vec<X>>;

    /// The gradient of every input for these gradients of the outputs.
    fn backward<X: CpuReal>(&self, cpu: &Cpu, inputs: &[Vec<X>], d_outputs: &[Vec<X>]) -> Gradients<X>;
}

/// Random gradients of these outputs.
fn random_gradients<X: Real>(outputs: &[Vec<X>]) -> Vec<Vec<f64>> {
    outputs.iter().enumerate().map(|(i, y)| random(&format!("gradient of output {i}"), y.len())).collect()
}

/// Derivative of `Σ c ⊙ outputs` when input `k` moves along `v`.
fn derivative(
    case: &impl OpCase,
    cpu: &Cpu,
    inputs: &[Vec<f64>],
    c: &[Vec<f64>],
    k: usize,
    v: &[f64],
) -> f64 {
    const STEP: f64 = 1e-30;
    let mut moved: Vec<Vec<Complex64>> = inputs.iter().map(|x| to(x)).collect();
    for (x, v) in moved[k].iter_mut().zip(v) {
        x.im = STEP * v;
    }
    let outputs = case.forward(cpu, &moved);
    assert_eq!(outputs.len(), c.len());
    let mut sum = 0.0;
    for (output, c) in outputs.iter().zip(c) {
        assert_eq!(output.len(), c.len());
        sum += output.iter().zip(c).map(|(y, c)| y.im / STEP * c).sum::<f64>();
    }
    sum
}

/// Relative error of the gradient of every input that has one: over several random
/// directions, or over every single element where there are few.
pub fn gradient_errors(case: &impl OpCase, inputs: &[Vec<f64>]) -> Vec<(usize, f64)> {
    let cpu = Cpu::new(1);
    let c = random_gradients(&case.forward(&cpu, inputs));
    let gradients = case.backward(&cpu, inputs, &c);
    assert_eq!(gradients.len(), inputs.len());
    let mut errors = Vec::new();
    for (k, gradient) in gradients.iter().enumerate() {
        let Some(g) = gradient else { continue };
        assert_eq!(g.len(), inputs[k].len(), "length of the gradient of input {k}");
        let unit = |j: usize| (0..g.len()).map(|i| if i == j { 1.0 } else { 0.0 }).collect::<Vec<_>>();
        let directions: Vec<Vec<f64>> = if g.len() <= 64 {
            (0..g.len()).map(unit).collect()
        } else {
            (0..5).map(|i| random(&format!("direction {i} of input {k}"), g.len())).collect()
        };
        let along = |v: &Vec<f64>| g.iter().zip(v).map(|(g, v)| g * v).sum::<f64>();
        let found: Vec<f64> = directions.iter().map(along).collect();
        let exact: Vec<f64> = directions.iter().map(|v| derivative(case, &cpu, inputs, &c, k, v)).collect();
        errors.push((k, relative_error(&found, &exact)));
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

/// Outputs and gradients one after the other, for given gradients of the outputs.
fn outputs_and_gradients<X: CpuReal>(
    case: &impl OpCase,
    cpu: &Cpu,
    inputs: &[Vec<f64>],
    c: &[Vec<f64>],
) -> Vec<Vec<X>> {
    let inputs: Vec<Vec<X>> = inputs.iter().map(|x| to(x)).collect();
    let c: Vec<Vec<X>> = c.iter().map(|c| to(c)).collect();
    let mut all = case.forward(cpu, &inputs);
    all.extend(case.backward(cpu, &inputs, &c).into_iter().flatten());
    all
}

/// Fails unless `f32` agrees with `f64` within `tolerance`, and 2 and 3 threads with one to the bit.
pub fn check_f32(what: &str, case: &impl OpCase, inputs: &[Vec<f64>], tolerance: f64) {
    // What f32 cannot hold would differ for that reason alone.
    let inputs: Vec<Vec<f64>> = inputs.iter().map(|x| to_f64(&to::<f32>(x))).collect();
    let c: Vec<Vec<f64>> = random_gradients(&case.forward(&Cpu::new(1), &inputs));
    let c: Vec<Vec<f64>> = c.iter().map(|c| to_f64(&to::<f32>(c))).collect();
    let exact = outputs_and_gradients::<f64>(case, &Cpu::new(1), &inputs, &c);
    let single = outputs_and_gradients::<f32>(case, &Cpu::new(1), &inputs, &c);
    for (i, (single, exact)) in single.iter().zip(&exact).enumerate() {
        assert_close(&format!("{what}, result {i}"), single, exact, tolerance);
    }
    for threads in [2, 3] {
        let shared = outputs_and_gradients::<f32>(case, &Cpu::new(threads), &inputs, &c);
        for (i, (shared, single)) in shared.iter().zip(&single).enumerate() {
            assert!(
                shared.iter().map(|x| x.to_bits()).eq(single.iter().map(|x| x.to_bits())),
                "{what}, result {i}: {threads} threads differ from one"
            );
        }
    }
}
