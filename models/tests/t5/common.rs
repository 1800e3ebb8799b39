//! What the tests of the T5 models share: a comparison that fails on NaN.

use std::path::{Path, PathBuf};

/// `‖found − expected‖ / ‖expected‖`; NaN if any element is, infinite if lengths differ.
pub fn relative_error(found: &[f64], expected: &[f64]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
    let diff = found.iter().zip(expected).map(|(f, e)| (f - e) * (f - e)).sum::<f64>().sqrt();
    diff / norm
}

/// A directory of golden fixtures, such as `qwen2/model`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/fixtures").join(name)
}
