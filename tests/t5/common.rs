//! What the tests of the T5 models share: a comparison that fails on NaN.

/// `‖found − expected‖ / ‖expected‖`; NaN if any element is, infinite if lengths differ.
pub fn relative_error(found: &[f64], expected: &[f64]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
    let diff = found.iter().zip(expected).map(|(f, e)| (f - e) * (f - e)).sum::<f64>().sqrt();
    diff / norm
}
