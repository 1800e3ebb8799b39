//! Where sources and what is built of them lie: in the directories of sources and builds, or, for an
//! executable in a directory that `make gpu-check` has put together, beside it. Such a directory works
//! on a machine that has neither.

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

/// A directory of `kernels`: `cu` or `emu`.
pub(crate) fn sources(directory: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name(directory)
}

/// Where emulator and kernels are built, for all test executables of a build directory.
pub(crate) fn built() -> PathBuf {
    let executable = std::env::current_exe().expect("the system knows this executable");
    // target/PROFILE/deps/EXECUTABLE
    let target = executable.ancestors().nth(3).expect("cargo puts executables into its directories");
    target.join("tmp/cuda-emulator")
}
