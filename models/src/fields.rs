//! Reading a `config.json` or an `adapter_config.json` field by field, so that nothing in it is ignored unseen.
//!
//! A reader takes every field that it understands; [`Fields::finish`] then fails on what is left, unless it is
//! known not to matter. Null is the same as absent.

use crate::foreign::{is_harmless, is_off, shown, unknown};
use gradtx_runtime::artifact::{MAX_CONFIG_BYTES, read_text};
use gradtx_runtime::{Error, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// The fields of one JSON object that nobody has taken yet.
pub(crate) struct Fields {
    path: PathBuf,
    /// What stands before a field's name in messages, such as `t5.`.
    prefix: String,
    /// What the file describes: a model, or an adapter.
    what: &'static str,
    left: Map<String, Value>,
}

impl Fields {
    /// All fields of a JSON file that describes a `what`.
    pub(crate) fn open(path: &Path, what: &'static str) -> Result<Self> {
        Self::parse(path, &read_text(path, MAX_CONFIG_BYTES)?, what)
    }

    /// All fields of a JSON text; `path` is for messages.
    pub(crate) fn parse(path: &Path, text: &str, what: &'static str) -> Result<Self> {
        let value: Value =
            serde_json::from_str(text).map_err(|e| Error::file(path, format!("not valid JSON: {e}")))?;
        match value {
            Value::Object(left) => Ok(Self { path: path.to_owned(), prefix: String::new(), what, left }),
            other => Err(Error::file(path, format!("expected a JSON object, found {}", shown(&other)))),
        }
    }

    /// An error about the file as a whole.
    pub(crate) fn file_error(&self, why: impl Into<String>) -> Error {
        Error::file(&self.path, why)
    }

    /// An error about a field.
    pub(crate) fn error(&self, field: &str, why: &str) -> Error {
        self.file_error(format!("field `{}{field}`: {why}", self.prefix))
    }

    /// The error about a field that must be there.
    pub(crate) fn missing(&self, field: &str) -> Error {
        self.file_error(format!("field `{}{field}` is missing", self.prefix))
    }

    /// The error about a field whose value is not the one that is wanted.
    pub(crate) fn unsupported(&self, field: &str, value: &Value, want: &str) -> Error {
        let (prefix, value) = (&self.prefix, shown(value));
        self.file_error(format!("field `{prefix}{field}` = {value} is not supported; expected {want}"))
    }

    /// Whether the file states the field, were it as null.
    pub(crate) fn has(&self, field: &str) -> bool {
        self.left.contains_key(field)
    }

    /// Takes a field, if it is there.
    pub(crate) fn take(&mut self, field: &str) -> Option<Value> {
        self.left.shift_remove(field).filter(|value| !value.is_null())
    }

    /// A value as `read` understands it; otherwise the error that says what is wanted.
    pub(crate) fn read<T>(
        &self,
        field: &str,
        value: &Value,
        want: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<T> {
        read(value).ok_or_else(|| self.unsupported(field, value, want))
    }

    fn optional<T>(
        &mut self,
        field: &str,
        want: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        self.take(field).map(|value| self.read(field, &value, want, read)).transpose()
    }

    /// A number of things, if the field is there. It is so small that products of three fit into 128 bits and
    /// sums into 64.
    pub(crate) fn optional_size(&mut self, field: &str) -> Result<Option<usize>> {
        self.optional(field, "a positive integer below 2^31", |value| {
            value.as_u64().filter(|n| (1..1 << 31).contains(n)).and_then(|n| usize::try_from(n).ok())
        })
    }

    /// A number of things; the field must be there.
    pub(crate) fn size(&mut self, field: &str) -> Result<usize> {
        self.optional_size(field)?.ok_or_else(|| self.missing(field))
    }

    /// A number, if the field is there.
    pub(crate) fn number(&mut self, field: &str) -> Result<Option<f64>> {
        self.optional(field, "a number", Value::as_f64)
    }

    /// A number above 0, if the field is there.
    pub(crate) fn positive(&mut self, field: &str) -> Result<Option<f64>> {
        self.optional(field, POSITIVE, as_positive)
    }

    /// True or false, if the field is there.
    pub(crate) fn flag(&mut self, field: &str) -> Result<Option<bool>> {
        self.optional(field, "true or false", Value::as_bool)
    }

    /// A text, if the field is there.
    pub(crate) fn text(&mut self, field: &str) -> Result<Option<String>> {
        self.optional(field, "a text", |value| value.as_str().map(str::to_owned))
    }

    /// One token id, or a list of them.
    pub(crate) fn ids(&mut self, field: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = self.optional(field, "a token id or a list of token ids", |value| match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        });
        Ok(ids?.unwrap_or_default())
    }

    /// An object's own fields, if the field is there.
    pub(crate) fn object(&mut self, field: &str) -> Result<Option<Self>> {
        let left = self.optional(field, "an object", |value| value.as_object().cloned())?;
        let prefix = format!("{}{field}.", self.prefix);
        Ok(left.map(|left| Self { path: self.path.clone(), prefix, what: self.what, left }))
    }

    /// Fails if the field is there with another value than the one that is supported. Numbers are equal by value.
    pub(crate) fn only(&mut self, field: &str, supported: &Value) -> Result<()> {
        let same = |value: &Value| match supported.as_f64() {
            Some(number) => value.as_f64() == Some(number),
            None => value == supported,
        };
        self.optional(field, &supported.to_string(), |value| same(value).then_some(())).map(drop)
    }

    /// Fails if the field is there and switches something on.
    pub(crate) fn off(&mut self, field: &str, want: &str) -> Result<()> {
        self.optional(field, want, |value| is_off(value).then_some(())).map(drop)
    }

    /// Fails if a field is left that is not among those without influence.
    pub(crate) fn finish(self, harmless: &[&str]) -> Result<()> {
        let is_known = |field: &str, value| harmless.contains(&field) || is_harmless(field, value);
        match self.left.iter().find(|(field, value)| !is_known(field, value)) {
            None => Ok(()),
            Some((field, value)) => {
                Err(unknown(&self.path, &format!("{}{field}", self.prefix), value, self.what))
            }
        }
    }
}

/// What [`as_positive`] wants.
pub(crate) const POSITIVE: &str = "a positive number";

/// A finite number above 0.
pub(crate) fn as_positive(value: &Value) -> Option<f64> {
    value.as_f64().filter(|x| *x > 0.0 && x.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: &Value) -> Fields {
        Fields::parse(Path::new("m/config.json"), &value.to_string(), "model").unwrap()
    }

    #[test]
    fn every_kind_is_read_and_null_is_absent() {
        let mut fields = fields(&json!({
            "size": 7, "number": -2.5, "positive": 0.5, "flag": true, "text": "a", "one": 3, "many": [1, 2],
            "inner": {"size": 4}, "null": null, "two": 2, "nothing": {}
        }));
        assert_eq!((fields.size("size").unwrap(), fields.number("number").unwrap()), (7, Some(-2.5)));
        assert_eq!(
            (fields.positive("positive").unwrap(), fields.flag("flag").unwrap()),
            (Some(0.5), Some(true))
        );
        assert_eq!(fields.text("text").unwrap().as_deref(), Some("a"));
        assert_eq!((fields.ids("one").unwrap(), fields.ids("many").unwrap()), (vec![3], vec![1, 2]));
        assert!(fields.ids("absent").unwrap().is_empty() && fields.object("absent").unwrap().is_none());
        assert_eq!(fields.object("inner").unwrap().unwrap().size("size").unwrap(), 4);
        assert!(fields.has("null") && fields.take("null").is_none() && !fields.has("null"));
        fields.only("two", &json!(2.0)).unwrap();
        fields.off("nothing", "nothing in it").unwrap();
        fields.finish(&[]).unwrap();
    }

    #[test]
    fn errors_name_file_field_value_and_what_is_expected() {
        let value = json!({"a": {"b": -3}, "c": "x", "d": 0, "e": {"f": 1}, "g": 1});
        let refused = |result: Result<()>| result.unwrap_err().to_string();
        let mut all = fields(&value);
        let inner = all.object("a").unwrap().unwrap().size("b").map(drop);
        let messages = [
            (refused(inner), "field `a.b` = -3 is not supported; expected a positive integer below 2^31"),
            (refused(all.flag("c").map(drop)), "field `c` = \"x\" is not supported; expected true or false"),
            (
                refused(all.positive("d").map(drop)),
                "field `d` = 0 is not supported; expected a positive number",
            ),
            (refused(all.off("e", "it off")), "field `e` = {\"f\":1} is not supported; expected it off"),
            (refused(all.size("h").map(drop)), "field `h` is missing"),
            (refused(all.finish(&["h"])), "unknown field `g` = 1: it may change what the model computes"),
        ];
        for (message, wanted) in messages {
            assert!(message.contains("m/config.json") && message.contains(wanted), "{message}");
        }
        for (text, wanted) in [("[1]", "expected a JSON object, found [1]"), ("{", "not valid JSON")] {
            let message = refused(Fields::parse(Path::new("c.json"), text, "model").map(drop));
            assert!(message.contains(wanted), "{message}");
        }
    }
}
