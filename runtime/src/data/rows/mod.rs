//! From files to [`Row`]s: JSON objects, and where each stands.
//!
//! In: JSON lines, a JSON list of objects, CSV, TSV or Parquet, as people download them;
//! text files also compressed by gzip or zstd. What a file is, its content says: the name
//! chooses which files of a directory are data ([`files`]) and gives CSV from TSV. What the
//! columns mean is the schema module's matter. Every error names the file and, where there
//! is one, the line or row.
//!
//! * [`files`]: the files of a directory, and which split they are.
//! * row: rows, and where they stand.
//! * source: opening and decompressing within bounds.
//! * json, table, parquet: the forms.
//! * thrift: the headers in Parquet files, checked.

pub mod files;
mod json;
mod lenient;
mod parquet;
mod row;
mod source;
mod table;
mod thrift;

pub use files::data_files;
pub(in crate::data) use row::kind;
pub use row::{Origin, Row, Sink, Unit};
pub use source::Budget;

use crate::{Error, Result};
use serde_json::{Map, Value};
use source::{Form, Source};
use std::path::Path;

/// Reads one file. Empty lines are skipped; a file without rows is an error.
pub fn read_rows(path: &Path) -> Result<Vec<Row>> {
    let mut rows = vec![];
    each_row(path, &mut Budget::of(&[path], None), &mut |row| {
        rows.push(row?);
        Ok(())
    })?;
    Ok(rows)
}

/// Gives every row of a file to `sink`. A file without rows is an error.
pub fn each_row(path: &Path, budget: &mut Budget, sink: &mut Sink) -> Result<()> {
    let source = Source::open(path, budget)?;
    let mut count = 0usize;
    let mut counted = |row: Result<Row>| {
        count += 1;
        if let Ok(row) = &row {
            budget.take(path, size_of_columns(&row.columns))?;
        }
        sink(row)
    };
    match source.form {
        Form::Parquet => parquet::read(path, source.allowed, &mut counted)?,
        Form::Json => json::read(source, &mut counted)?,
        Form::Table(delimiter) => table::read(source, delimiter, &mut counted)?,
    }
    if count == 0 {
        return Err(Error::file(path, "there is no example in this file"));
    }
    Ok(())
}

/// Bytes that a row's columns take in memory, roughly.
fn size_of_columns(columns: &Map<String, Value>) -> u64 {
    const ROW: u64 = 160;
    const ENTRY: u64 = 120;
    fn of(value: &Value) -> u64 {
        match value {
            Value::String(text) => text.len() as u64,
            Value::Array(items) => items.iter().map(|item| of(item) + size_of::<Value>() as u64).sum(),
            Value::Object(entries) => entries.iter().map(|(key, v)| key.len() as u64 + ENTRY + of(v)).sum(),
            _ => 0,
        }
    }
    ROW + columns.iter().map(|(name, value)| name.len() as u64 + ENTRY + of(value)).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_data_says_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let utf16: Vec<u8> = "\u{feff}{\"a\": 1}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let without_mark: Vec<u8> = "{\"a\": 1}".encode_utf16().flat_map(u16::to_be_bytes).collect();
        for (name, bytes, say) in [
            ("a.parquet", &b"{\"a\": 1}"[..], "PAR1"),
            ("a.jsonl", &b"\x1f\x8b\x08"[..], "cannot read"),
            ("b.jsonl", &b" \n\n"[..], "no example"),
            ("c.json", &b"[]"[..], "no example"),
            ("d.csv", &b"a,b\n"[..], "no example"),
            ("e.arrow", &b"\xff\xff\xff\xff\x78\x00"[..], "to_parquet"),
            ("f.arrow", &b"ARROW1\0\0"[..], "to_parquet"),
            ("g.jsonl", &utf16, "iconv -f UTF-16"),
            ("h.csv", &without_mark, "iconv -f UTF-16"),
            ("i.jsonl", b"PK\x03\x04", "ZIP"),
            ("j.jsonl", b"", "is empty"),
            ("k.jsonl.gz", b"{\"a\": 1}", "does not begin"),
        ] {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let message = read_rows(&path).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(say), "{message}");
        }
        assert!(read_rows(&dir.path().join("none")).unwrap_err().to_string().contains("none"));
    }

    #[test]
    fn rows_that_outgrow_their_file_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.jsonl");
        std::fs::write(&path, "{\"a\": 1}\n".repeat(5000)).unwrap();
        let read = |mebibytes| each_row(&path, &mut Budget::of(&[&path], Some(mebibytes)), &mut |_| Ok(()));
        assert!(read(4).is_ok());
        let message = read(1).unwrap_err().to_string();
        assert!(message.contains("d.jsonl") && message.contains("data.read_limit_mib"), "{message}");
    }
}
