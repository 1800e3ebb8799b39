//! What tests share: where the golden fixtures are, copies of them to damage, and a miniature
//! of what a run needs.

#![allow(clippy::unwrap_used)]

pub mod miniature;
pub mod ranks;

use std::path::{Path, PathBuf};

/// A directory of golden fixtures, e.g. `qwen2/model`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/fixtures").join(name)
}

/// Copies the files of a directory (not its subdirectories) into a new one.
///
/// # Panics
/// When a file cannot be copied: a test cannot continue.
pub fn copy_files(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a test's directory can be made");
    for entry in std::fs::read_dir(from).expect("the fixture is there") {
        let path = entry.expect("the fixture can be listed").path();
        if let (true, Some(name)) = (path.is_file(), path.file_name()) {
            std::fs::copy(&path, to.join(name)).expect("a fixture's file can be copied");
        }
    }
}
