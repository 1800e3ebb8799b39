//! Where tests find the program, its fixtures and what the emulator needs: in the directories of
//! sources and builds, or, for an executable in a directory that `make gpu-check` has put together,
//! beside it. Such a directory works on a machine that has neither.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The directory of `make gpu-check` that this executable lies in, if it does.
pub fn gpu_check() -> Option<&'static Path> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    let find = || {
        let executable = std::env::current_exe().expect("the system knows this executable");
        let directory = executable.parent()?;
        directory.join("run.sh").is_file().then(|| directory.to_path_buf())
    };
    FOUND.get_or_init(find).as_deref()
}

/// The program under test.
pub fn program() -> PathBuf {
    gpu_check().map_or_else(|| env!("CARGO_BIN_EXE_gradtx-under-test").into(), |home| home.join("gradtx"))
}

/// A file or directory of fixtures.
pub fn fixture(name: &str) -> PathBuf {
    gpu_check().map_or_else(|| gradtx_tests::fixture(name), |home| home.join("fixtures").join(name))
}

/// Adds a comparison to the file of JSON lines that `GRADTX_TEST_RESULTS` names, if it names one.
pub fn record(case: &str, dtype: &str, error: f64, bound: f64) {
    let Some(path) = std::env::var_os("GRADTX_TEST_RESULTS") else { return };
    // JSON has no number for what is not one.
    let number = if error.is_finite() { serde_json::json!(error) } else { "not finite".into() };
    let line = serde_json::json!({"part": "correct", "case": case, "dtype": dtype, "error": number,
        "bound": bound, "within": error <= bound});
    let open = std::fs::OpenOptions::new().create(true).append(true).open(path);
    let mut file = open.expect("results can be written");
    // In one piece, for other processes write too.
    file.write_all(format!("{line}\n").as_bytes()).expect("results can be written");
}
