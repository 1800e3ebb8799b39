//! Opening and reading files that may be anything: only regular files, of bounded size,
//! with an error that says what stands there instead.
//!
//! Every file that comes from outside (models, adapters, data, updates) is opened here. A
//! file that a reader holds in memory is read through [`read_file`] or [`read_text`], so
//! that the bytes that were checked are the bytes that are used.

use crate::{Error, Result};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// Bytes of a configuration file at most: `config.json`, manifests, records, run files.
pub const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Bytes of a file of JSON lines at most: metrics, results of benchmarks.
pub const MAX_LINES_BYTES: u64 = 4 << 30;
/// Bytes of a tokenizer's file at most; the largest published ones are below 40 MB.
pub(crate) const MAX_TOKENIZER_BYTES: u64 = 512 << 20;

/// What Git LFS leaves in the place of a file that was not downloaded begins like this.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1";

/// Opens a regular file, which may be empty.
pub fn open_regular(path: &Path) -> Result<File> {
    // Without O_NONBLOCK, opening a named pipe waits for a writer that may never come.
    let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = opened.map_err(|e| missing(path, e))?;
    let kind = file.metadata().map_err(|e| Error::io("read", path, e))?.file_type();
    if !kind.is_file() {
        let what = if kind.is_dir() {
            "a directory"
        } else if kind.is_fifo() {
            "a named pipe"
        } else if kind.is_socket() {
            "a socket"
        } else {
            "a device"
        };
        return Err(Error::file(path, format!("is {what}; expected a regular file")));
    }
    Ok(file)
}

/// Opens a regular file that is not empty and not a pointer of Git LFS.
pub fn open_file(path: &Path) -> Result<File> {
    let file = open_regular(path)?;
    let found = file.metadata().map_err(|e| Error::io("read", path, e))?;
    if found.len() == 0 {
        return Err(Error::file(path, "is empty (0 bytes): an interrupted download or a full disk"));
    }
    let mut begin = [0; LFS_POINTER.len()];
    if found.len() < 1024 && file.read_exact_at(&mut begin, 0).is_ok() && begin == LFS_POINTER {
        return Err(Error::file(
            path,
            "is a pointer of Git LFS, not the file itself; run `git lfs pull` in its repository, or \
             download the file with the hub's own client",
        ));
    }
    Ok(file)
}

/// Why a file cannot be opened: where a link leads nowhere, the link is named.
fn missing(path: &Path, error: std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::NotFound
        && let Ok(target) = std::fs::read_link(path)
    {
        let why = format!("is a link to {}, which does not exist", target.display());
        return Error::file(path, why);
    }
    Error::io("open", path, error)
}

/// All bytes of a regular file of at most `limit` bytes, which is not empty.
pub fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>> {
    all_of(open_file(path)?, path, limit)
}

/// All bytes of a regular file of at most `limit` bytes, which may be none.
pub fn read_regular(path: &Path, limit: u64) -> Result<Vec<u8>> {
    all_of(open_regular(path)?, path, limit)
}

fn all_of(file: File, path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![];
    // One byte beyond the limit: a file that grows while it is read is caught as well.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| Error::io("read", path, e))?;
    if bytes.len() as u64 > limit {
        return Err(Error::file(path, format!("is larger than the {limit} bytes that such a file may have")));
    }
    Ok(bytes)
}

/// The text of a regular UTF-8 file of at most `limit` bytes, which is not empty.
pub fn read_text(path: &Path, limit: u64) -> Result<String> {
    text_of(read_file(path, limit)?, path)
}

/// The text of a regular UTF-8 file of at most `limit` bytes, which may be none.
pub fn read_regular_text(path: &Path, limit: u64) -> Result<String> {
    text_of(read_regular(path, limit)?, path)
}

fn text_of(bytes: Vec<u8>, path: &Path) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| Error::file(path, format!("not valid UTF-8: {}", e.utf8_error())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regular_files_are_read_and_others_named() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("good"), "text").unwrap();
        std::fs::write(at("empty"), "").unwrap();
        std::fs::write(at("bytes"), b"a\xff").unwrap();
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 988097824\n";
        std::fs::write(at("pointer"), pointer).unwrap();
        std::fs::create_dir(at("dir")).unwrap();
        std::os::unix::fs::symlink("nowhere", at("link")).unwrap();
        let status = std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap();
        assert!(status.success());
        assert_eq!(read_text(&at("good"), 4).unwrap(), "text");
        assert_eq!(read_regular_text(&at("empty"), 4).unwrap(), "");
        for name in ["dir", "link", "pipe", "absent"] {
            assert!(read_regular(&at(name), 4).unwrap_err().to_string().contains(name));
        }
        for (name, say) in [
            ("good", "larger than the 3 bytes"),
            ("empty", "is empty"),
            ("bytes", "UTF-8"),
            ("pointer", "git lfs pull"),
            ("dir", "a directory"),
            ("link", "a link to nowhere"),
            ("pipe", "a named pipe"),
            ("absent", "cannot open"),
        ] {
            let message = read_text(&at(name), 3).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(say), "{message}");
        }
    }
}
