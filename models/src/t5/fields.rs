//! Reading a `config.json` field by field, so that nothing in it is ignored unseen.
//!
//! A reader takes every field that it understands; [`Fields::finish`] then fails on
//! what is left, unless it is known not to matter.

use crate::foreign::{is_harmless, shown, unknown};
use gradtx_runtime::artifact::read_json;
use gradtx_runtime::{Error, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// The fields of one JSON object that nobody has taken yet.
pub(crate) struct Fields {
    path: PathBuf,
    prefix: String,
    left: Map<String, Value>,
}

impl Fields {
    /// All fields of a JSON file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        match read_json(path)? {
            Value::Object(left) => Ok(Self { path: path.to_owned(), prefix: String::new(), left }),
            other => Err(Error::file(path, format!("expected a JSON object, found {other}"))),
        }
    }

    /// An error about the field `name`.
    pub(crate) fn error(&self, name: &str, why: &str) -> Error {
        Error::file(&self.path, format!("field `{}{name}`: {why}", self.prefix))
    }

    fn take<T>(&mut self, name: &str, kind: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        match self.left.shift_remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match read(&value) {
                Some(read) => Ok(Some(read)),
                None => Err(self.error(name, &format!("expected {kind}, found {}", shown(&value)))),
            },
        }
    }

    /// A whole number, if the field is there. It is so small that products of three fit into
    /// 128 bits and sums into 64.
    pub(crate) fn count(&mut self, name: &str) -> Result<Option<usize>> {
        self.take(name, "a positive whole number below 2^31", |v| {
            v.as_u64().filter(|n| (1..1 << 31).contains(n)).and_then(|n| usize::try_from(n).ok())
        })
    }

    /// A whole number that must be there.
    pub(crate) fn need_count(&mut self, name: &str) -> Result<usize> {
        let found = self.count(name)?;
        found.ok_or_else(|| self.error(name, "is missing"))
    }

    /// A number, if the field is there.
    pub(crate) fn number(&mut self, name: &str) -> Result<Option<f64>> {
        self.take(name, "a number", Value::as_f64)
    }

    /// A text, if the field is there.
    pub(crate) fn text(&mut self, name: &str) -> Result<Option<String>> {
        self.take(name, "a text", |v| v.as_str().map(str::to_owned))
    }

    /// An object's fields, if the field is there.
    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Fields>> {
        let found = self.take(name, "an object", |v| v.as_object().cloned())?;
        let prefix = format!("{}{name}.", self.prefix);
        Ok(found.map(|left| Fields { path: self.path.clone(), prefix, left }))
    }

    /// Fails if the field is there with another value than the one that is supported.
    pub(crate) fn only(&mut self, name: &str, supported: Value) -> Result<()> {
        match self.left.shift_remove(name) {
            Some(found) if !found.is_null() && found != supported => {
                Err(self.error(name, &format!("only {supported} is supported, found {}", shown(&found))))
            }
            _ => Ok(()),
        }
    }

    /// Fails if a field is left that is not in the list of those without influence.
    pub(crate) fn finish(mut self, harmless: &[&str]) -> Result<()> {
        self.left.retain(|name, value| !harmless.contains(&name.as_str()) && !is_harmless(name, value));
        match self.left.iter().next() {
            None => Ok(()),
            Some((name, value)) => {
                Err(unknown(&self.path, &format!("{}{name}", self.prefix), value, "model"))
            }
        }
    }
}
