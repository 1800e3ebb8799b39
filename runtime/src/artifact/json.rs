//! JSON files: reading with errors that name the file, atomic writing.

use super::{MAX_CONFIG_BYTES, read_text, write_atomic};
use crate::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::io::Write;
use std::path::Path;

/// A JSON file as a value.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = read_text(path, MAX_CONFIG_BYTES)?;
    serde_json::from_str(&text).map_err(|e| Error::file(path, format!("not valid JSON: {e}")))
}

/// A JSON file of ours: an object whose `format` and `version` are checked before the rest.
pub fn read_versioned<T: DeserializeOwned>(path: &Path, format: &str, version: u64) -> Result<T> {
    let mut value = read_json(path)?;
    let entries = value.as_object_mut().ok_or_else(|| Error::file(path, "expected a JSON object"))?;
    let found = entries.remove("format");
    if found.as_ref().and_then(Value::as_str) != Some(format) {
        let found = found.map_or("none".into(), |f| f.to_string());
        return Err(Error::file(path, format!("expected `format` \"{format}\", found {found}")));
    }
    let found = entries.remove("version");
    if found.as_ref().and_then(Value::as_u64) != Some(version) {
        let found = found.map_or("none".into(), |f| f.to_string());
        let why = format!("version {found} of \"{format}\"; this program reads version {version}");
        return Err(Error::file(path, why));
    }
    serde_json::from_value(value).map_err(|e| Error::file(path, e.to_string()))
}

/// Writes a JSON file for people: indented, with a final newline; whole or not at all.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let failed = |e: serde_json::Error| Error::file(path, format!("cannot be put into JSON: {e}"));
    let text = serde_json::to_string_pretty(value).map_err(failed)?;
    write_atomic(path, |out| writeln!(out, "{text}"))
}

/// Writes an object of ours with `format` and `version` in front.
pub fn write_versioned<T: Serialize>(path: &Path, format: &str, version: u64, value: &T) -> Result<()> {
    #[derive(Serialize)]
    struct Versioned<'a, T> {
        format: &'a str,
        version: u64,
        #[serde(flatten)]
        value: &'a T,
    }
    write_json(path, &Versioned { format, version, value })
}
