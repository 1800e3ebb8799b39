//! Files of examples as other programs write them: Parquet by pyarrow, the published data
//! sets in the columns of the hub and of their original releases, and damaged files.

#![allow(clippy::unwrap_used)]

mod damage;
mod encodings;
mod forms;
mod labels;
mod tasks;
mod templates;

use std::path::{Path, PathBuf};

/// A fixture below `goldens/fixtures/parquet`.
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens/fixtures/parquet").join(name)
}
