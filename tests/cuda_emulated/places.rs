//! Where tests find the program and its fixtures: in the directories of sources and builds, or, for an executable in a
//! directory that `make gpu-check` has put together, beside it.

use gradtx_emulator::gpu_check;
use std::path::PathBuf;

/// The program under test.
pub fn program() -> PathBuf {
    gpu_check().map_or_else(|| env!("CARGO_BIN_EXE_gradtx-under-test").into(), |home| home.join("gradtx"))
}

/// A file or directory of fixtures.
pub fn fixture(name: &str) -> PathBuf {
    gpu_check().map_or_else(|| gradtx_tests::fixture(name), |home| home.join("fixtures").join(name))
}
