//! What tests measure, for `make gpu-check`.

use std::io::Write;

/// Adds a comparison to the file of JSON lines that `GRADTX_TEST_RESULTS` names, if it names one.
///
/// # Panics
/// If the file cannot be written.
pub fn record(case: &str, dtype: &str, error: f64, bound: f64) {
    let Some(path) = std::env::var_os("GRADTX_TEST_RESULTS") else { return };
    let open = std::fs::OpenOptions::new().create(true).append(true).open(path);
    let mut file = open.expect("results can be written");
    // In one piece, for other processes write too.
    file.write_all(line(case, dtype, error, bound).as_bytes()).expect("results can be written");
}

/// Names of cases are plain text, for which Rust's quotes are JSON's.
fn line(case: &str, dtype: &str, error: f64, bound: f64) -> String {
    // JSON has no number for what is not one.
    let number = if error.is_finite() { format!("{error:e}") } else { "\"not finite\"".into() };
    let within = error <= bound;
    format!(
        "{{\"part\":\"correct\",\"case\":{case:?},\"dtype\":{dtype:?},\"error\":{number},\"bound\":{bound:e},\
         \"within\":{within}}}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::line;

    #[test]
    fn lines_are_json() {
        let good = line("linear layer", "bf16", 0.0015, 4e-3);
        let expected = r#"{"part":"correct","case":"linear layer","dtype":"bf16","error":1.5e-3,"bound":4e-3,"within":true}"#;
        assert_eq!(good, format!("{expected}\n"));
        let bad = line("linear layer", "f32", f64::NAN, 1e-6);
        assert!(bad.contains(r#""error":"not finite""#) && bad.contains(r#""within":false"#), "{bad}");
    }
}
