//! What Python prints for a value of a template: `str`, `repr`, and `json.dumps`.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};
use std::fmt::Write;

/// Values in values at most; one that contains itself has no end.
const MAX_DEPTH: usize = 64;
/// Bytes of a printed value at most.
const MAX_BYTES: usize = 16 << 20;

type Printed = std::result::Result<(), Error>;

fn too_large(what: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("a value {what} cannot be printed"))
}

fn check(out: &str, depth: usize) -> Printed {
    match () {
        () if depth > MAX_DEPTH => Err(too_large("that contains itself, or nests so deeply,")),
        () if out.len() > MAX_BYTES => Err(too_large("of so many bytes")),
        () => Ok(()),
    }
}

/// `str(value)`: texts as they are, everything else as [`repr`].
pub fn text(value: &Value, out: &mut String) -> Printed {
    match value.kind() {
        ValueKind::String => out.push_str(value.as_str().unwrap_or_default()),
        ValueKind::Undefined => {}
        _ => repr(value, out, 0)?,
    }
    check(out, 0)
}

/// `repr(value)`.
fn repr(value: &Value, out: &mut String, depth: usize) -> Printed {
    check(out, depth)?;
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::String => quoted(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                repr(&item, out, depth + 1)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                repr(&key, out, depth + 1)?;
                out.push_str(": ");
                repr(&value.get_item(&key)?, out, depth + 1)?;
            }
            out.push('}');
        }
        _ => _ = write!(out, "{value}"),
    }
    Ok(())
}

/// A text between the quotes that Python chooses.
fn quoted(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_control() => _ = write!(out, "\\x{:02x}", c as u32),
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// How `json.dumps` writes.
struct Json {
    ensure_ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sorted: bool,
}

/// The filter `tojson` as transformers defines it: `json.dumps(value, ensure_ascii=False, …)`,
/// no escaping of HTML.
pub fn to_json(value: &Value, options: Kwargs) -> std::result::Result<Value, Error> {
    let indent = match options.get::<Option<Value>>("indent")? {
        None => None,
        Some(value) if value.is_none() || value.is_undefined() => None,
        Some(value) => Some(match value.as_str() {
            Some(text) => text.to_string(),
            None => " ".repeat(usize::try_from(value)?.min(1000)),
        }),
    };
    let separators = options.get::<Option<Value>>("separators")?.filter(|s| !s.is_none());
    let part = |i: usize| -> std::result::Result<Option<String>, Error> {
        let Some(separators) = &separators else { return Ok(None) };
        let part = separators.get_item(&Value::from(i))?;
        let wrong = || Error::new(ErrorKind::InvalidOperation, "tojson: separators should be two texts");
        Ok(Some(part.as_str().ok_or_else(wrong)?.to_string()))
    };
    let item = part(0)?.unwrap_or_else(|| if indent.is_some() { ",".into() } else { ", ".into() });
    let json = Json {
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        indent,
        item,
        key: part(1)?.unwrap_or_else(|| ": ".into()),
        sorted: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let mut out = String::new();
    json.write(value, &mut out, 0)?;
    Ok(Value::from_safe_string(out))
}

impl Json {
    fn write(&self, value: &Value, out: &mut String, depth: usize) -> Printed {
        check(out, depth)?;
        match value.kind() {
            ValueKind::Undefined => {
                return Err(Error::new(ErrorKind::UndefinedError, "tojson of an undefined value"));
            }
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Number => {
                let text = value.to_string();
                out.push_str(match text.as_str() {
                    "inf" => "Infinity",
                    "-inf" => "-Infinity",
                    "nan" => "NaN",
                    other => other,
                });
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(&items, ['[', ']'], out, depth, |item, out| self.write(item, out, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.list(&keys, ['{', '}'], out, depth, |key, out| {
                    self.string(&key.to_string(), out);
                    out.push_str(&self.key);
                    self.write(&value.get_item(key)?, out, depth + 1)
                })?;
            }
            kind => {
                let why = format!("tojson: a value of the kind {kind} has no JSON");
                return Err(Error::new(ErrorKind::BadSerialization, why));
            }
        }
        Ok(())
    }

    /// Items between brackets, each on a line of its own where there is an indent.
    fn list(
        &self,
        items: &[Value],
        [open, close]: [char; 2],
        out: &mut String,
        depth: usize,
        mut write: impl FnMut(&Value, &mut String) -> Printed,
    ) -> Printed {
        let line = |out: &mut String, depth: usize| {
            if let Some(indent) = self.indent.as_ref().filter(|_| !items.is_empty()) {
                out.push('\n');
                (0..depth).for_each(|_| out.push_str(indent));
            }
        };
        out.push(open);
        for (i, item) in items.iter().enumerate() {
            out.push_str(if i == 0 { "" } else { &self.item });
            line(out, depth + 1);
            write(item, out)?;
        }
        line(out, depth);
        out.push(close);
        Ok(())
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if (c as u32) < 0x20 => _ = write!(out, "\\u{:04x}", c as u32),
                c if self.ensure_ascii && (!c.is_ascii() || c == '\u{7f}') => {
                    let mut units = [0; 2];
                    c.encode_utf16(&mut units).iter().for_each(|unit| _ = write!(out, "\\u{unit:04x}"));
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}
