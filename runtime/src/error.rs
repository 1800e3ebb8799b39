//! The error type of this crate: which file or tensor, what was expected, what was found.

use crate::text::{printable_line, shown};
use std::path::{Path, PathBuf};

/// Result of a runtime operation.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong outside the mathematics.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("{}: cannot {what}: {source}", shown(path))]
    Io {
        /// What was attempted: "open", "write", …
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// A file is not what its name or its place says.
    #[error("{}: {why}", shown(path))]
    File {
        /// The file.
        path: PathBuf,
        /// Expected and found.
        why: String,
    },
    /// A tensor in a file is missing, or has another shape or type than expected.
    #[error("{}: tensor `{}`: {why}", shown(path), printable_line(tensor))]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in the file.
        tensor: String,
        /// Expected and found.
        why: String,
    },
    /// Input that cannot be used: an example, a setting, an option.
    #[error("{what}: {why}")]
    Invalid {
        /// What was looked at.
        what: String,
        /// Expected and found.
        why: String,
    },
    /// A device operation failed.
    #[error(transparent)]
    Device(#[from] gradtx_kernels::Error),
}

impl Error {
    /// An I/O error at a path.
    pub fn io(what: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { what, path: path.to_owned(), source }
    }

    /// A wrong file.
    pub fn file(path: &Path, why: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), why: why.into() }
    }

    /// A wrong tensor in a file.
    pub fn tensor(path: &Path, tensor: &str, why: impl Into<String>) -> Self {
        Self::Tensor { path: path.to_owned(), tensor: tensor.into(), why: why.into() }
    }

    /// Unusable input.
    pub fn invalid(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Invalid { what: what.into(), why: why.into() }
    }
}
