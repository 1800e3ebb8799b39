//! [`Row`]: one row as it was read, and where it stands.

use crate::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

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
    /// Columns with values that JSON or Unicode has no place for, and what these are (`NaN`,
    /// half of a surrogate pair). They may be there, and may not be used.
    pub unusable: BTreeMap<String, &'static str>,
}

impl Row {
    /// A row of columns that are all as they should be.
    pub fn new(origin: Origin, columns: Map<String, Value>) -> Self {
        Self { origin, columns, unusable: BTreeMap::new() }
    }
}

/// Takes rows one by one. An error that it gets is about one row of a file that can be read
/// on; one that it returns ends the reading.
pub type Sink<'a> = dyn FnMut(Result<Row>) -> Result<()> + 'a;

/// What a JSON value is, in words.
pub(in crate::data) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
