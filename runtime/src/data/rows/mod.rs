//! From files to [`Row`]s: JSON objects, and where each stands.
//!
//! In: JSON lines, a JSON list of objects, or Parquet, as people download them; a
//! directory stands for all such files in it, in the order of their names. What a file
//! is, its content tells: the name only chooses which files of a directory are data.
//! What the columns mean is not looked at here (see the schema module). Every error
//! names the file and, where there is one, the line or row.

mod json;
mod parquet;

use crate::{Error, Result};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Names of data files in a directory end like this.
const EXTENSIONS: [&str; 4] = ["jsonl", "ndjson", "json", "parquet"];

/// Files in a directory of data that a download puts beside it; they hold no rows.
const NOT_DATA: [&str; 3] = ["dataset_info.json", "dataset_infos.json", "state.json"];

/// Parquet files begin and end with this.
const PARQUET_MAGIC: &[u8] = b"PAR1";

/// Some editors begin files with a byte-order mark.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// What a record's number counts in its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unit {
    /// Lines of text.
    #[default]
    Line,
    /// Rows of a table, or objects of a list.
    Row,
}

/// Where a record stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub file: Arc<PathBuf>,
    /// Its line or row, from 1.
    pub line: usize,
    /// Which of the two.
    pub unit: Unit,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.unit {
            Unit::Line => write!(f, "{}:{}", self.file.display(), self.line),
            Unit::Row => write!(f, "{}: row {}", self.file.display(), self.line),
        }
    }
}

impl Origin {
    /// An error about this record.
    pub fn error(&self, why: impl Into<String>) -> Error {
        Error::invalid(self.to_string(), why)
    }
}

/// One row as it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Where it stands.
    pub origin: Origin,
    /// Its columns, in the file's order.
    pub columns: Map<String, Value>,
}

/// The files of a data set: a path is a file, or a directory of data files, which come
/// in the order of their names. It is an error if there is none.
pub fn data_files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = vec![];
    for path in paths {
        if path.is_dir() {
            files.extend(files_in(path)?);
        } else {
            files.push(path.clone());
        }
    }
    if files.is_empty() {
        return Err(Error::invalid("data", "no file is given"));
    }
    Ok(files)
}

fn files_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = vec![];
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io("list", dir, e))? {
        let path = entry.map_err(|e| Error::io("list", dir, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        let hidden = name.starts_with('.') || NOT_DATA.contains(&name.as_str());
        if path.is_file() && !hidden && EXTENSIONS.contains(&extension.as_str()) {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        let why = format!("there is no data file (*.{}) in this directory", EXTENSIONS.join(", *."));
        return Err(Error::file(dir, why));
    }
    Ok(files)
}

/// Reads one file. Empty lines are skipped; a file without rows is an error.
pub fn read_rows(path: &Path) -> Result<Vec<Row>> {
    let mut file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    let mut begin = vec![];
    (&mut file).take(4096).read_to_end(&mut begin).map_err(|e| Error::io("read", path, e))?;
    let named_parquet = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("parquet"));
    let rows = if begin.starts_with(PARQUET_MAGIC) {
        parquet::read(path)?
    } else if named_parquet {
        return Err(Error::file(path, "not a Parquet file: it does not begin with `PAR1`"));
    } else if begin.starts_with(&[0x1f, 0x8b]) {
        return Err(Error::file(path, "this file is compressed by gzip; unpack it first"));
    } else {
        json::read(path, &begin)?
    };
    if rows.is_empty() {
        return Err(Error::file(path, "there is no example in this file"));
    }
    Ok(rows)
}

/// What a JSON value is, in words.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_its_data_files_in_the_order_of_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let row = |i: usize| format!("{{\"i\": {i}}}\n");
        for (i, name) in ["b-00001.jsonl", "a.json", "b-00000.jsonl"].iter().enumerate() {
            std::fs::write(dir.path().join(name), row(i)).unwrap();
        }
        for name in ["README.md", ".hidden.jsonl", "dataset_info.json"] {
            std::fs::write(dir.path().join(name), "{").unwrap();
        }
        let files = data_files(&[dir.path().to_owned()]).unwrap();
        let found: Vec<i64> =
            files.iter().map(|f| read_rows(f).unwrap()[0].columns["i"].as_i64().unwrap()).collect();
        assert_eq!(found, [1, 2, 0]);
        let one = dir.path().join("a.json");
        assert_eq!(data_files(std::slice::from_ref(&one)).unwrap(), [one]);
        let empty = tempfile::tempdir().unwrap();
        let message = data_files(&[empty.path().to_owned()]).unwrap_err().to_string();
        assert!(message.contains("*.parquet"), "{message}");
        assert!(data_files(&[]).is_err());
    }

    #[test]
    fn what_is_no_data_says_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes, say) in [
            ("a.parquet", &b"{\"a\": 1}"[..], "PAR1"),
            ("a.jsonl", &b"\x1f\x8b\x08"[..], "gzip"),
            ("b.jsonl", &b" \n\n"[..], "no example"),
            ("c.json", &b"[]"[..], "no example"),
        ] {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let message = read_rows(&path).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(say), "{message}");
        }
        assert!(read_rows(&dir.path().join("none")).unwrap_err().to_string().contains("none"));
    }
}
