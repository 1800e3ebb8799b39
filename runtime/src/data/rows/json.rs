//! Rows of JSON files: one object per line; or one list of objects (SAMSum is published
//! so), which may be the only entry of an object (`{"data": [...]}`); or the object of
//! sections and questions that DROP is published as.

use super::lenient::{take_marks, with_marks};
use super::row::{Origin, Row, Sink, Unit, kind};
use super::source::Source;
use crate::{Error, Result};
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of a line at most.
const MAX_LINE: u64 = 64 << 20;

/// Names under which an object holds its rows.
const ENVELOPES: [&str; 6] = ["data", "rows", "examples", "instances", "samples", "items"];
/// The same for splits.
const SPLITS: [&str; 4] = ["train", "test", "validation", "dev"];

/// Reads a JSON file.
pub(super) fn read(source: Source, sink: &mut Sink) -> Result<()> {
    match source.begin.trim_ascii_start().first() {
        Some(b'[') => whole(source, sink),
        Some(b'{') if source.named_json => whole(source, sink),
        _ => lines(source.text, &source.path, sink),
    }
}

fn lines(mut input: impl BufRead, file: &Arc<PathBuf>, sink: &mut Sink) -> Result<()> {
    let (mut line, mut bytes) = (0, vec![]);
    loop {
        bytes.clear();
        let read = input.by_ref().take(MAX_LINE).read_until(b'\n', &mut bytes);
        if read.map_err(|e| Error::io("read", file, e))? == 0 {
            return Ok(());
        }
        line += 1;
        let origin = Origin { file: file.clone(), line, unit: Unit::Line };
        if bytes.len() as u64 == MAX_LINE {
            return Err(origin.error(format!("the line is longer than {} MiB", MAX_LINE >> 20)));
        }
        let text = match std::str::from_utf8(&bytes) {
            Ok(text) if text.trim().is_empty() => continue,
            Ok(text) => text,
            Err(e) => {
                sink(Err(origin.error(format!("not valid UTF-8: {e}"))))?;
                continue;
            }
        };
        match parse(text) {
            Ok(value) => sink(row(value, origin))?,
            Err(e) if line == 1 && e.is_eof() && text.ends_with('\n') => {
                return Err(origin.error(
                    "the first line is not an object of its own; a file of JSON lines has one object on each \
                     line, and a list `[...]` or one object over several lines is read from *.json \
                     (`jq -c . FILE > NEW` writes lines)",
                ));
            }
            Err(e) => sink(Err(origin.error(format!("not valid JSON: {e}"))))?,
        }
    }
}

/// A file that is one value.
fn whole(mut source: Source, sink: &mut Sink) -> Result<()> {
    let path = source.path.clone();
    let mut bytes = vec![];
    source.text.read_to_end(&mut bytes).map_err(|e| Error::io("read", &path, e))?;
    let is_list = bytes.trim_ascii_start().first() == Some(&b'[');
    let text = String::from_utf8(bytes)
        .map_err(|e| Error::file(&path, format!("not valid JSON: not valid UTF-8: {}", e.utf8_error())))?;
    if is_list {
        let items: Vec<Item> = parse(&text).map_err(|e| {
            Error::file(&path, format!("begins like a JSON list of objects, but is not valid JSON: {e}"))
        })?;
        return items.into_iter().enumerate().try_for_each(|(i, item)| sink(row(item, nth(&path, i))));
    }
    match parse::<Item>(&text) {
        Ok(Item(Value::Object(entries))) => object(entries, &path, sink),
        // Lines of objects under another name, or an object that is cut short.
        _ => lines(text.as_bytes(), &path, sink),
    }
}

fn nth(path: &Arc<PathBuf>, i: usize) -> Origin {
    Origin { file: path.clone(), line: i + 1, unit: Unit::Row }
}

/// The rows of a file that is one object.
fn object(mut entries: Map<String, Value>, path: &Arc<PathBuf>, sink: &mut Sink) -> Result<()> {
    let is_section = |s: &Value| s.get("passage").is_some() && s.get("qa_pairs").is_some_and(Value::is_array);
    if !entries.is_empty() && entries.values().all(is_section) {
        return sections(entries, path, sink);
    }
    let is_rows = |(_, v): &(&String, &Value)| v.as_array().is_some_and(|a| a.iter().all(Value::is_object));
    let names: Vec<String> = entries.iter().filter(is_rows).map(|(name, _)| name.clone()).collect();
    let known = |among: &[&str]| -> Vec<&String> {
        names.iter().filter(|n| among.contains(&n.to_lowercase().as_str())).collect()
    };
    let (envelopes, splits) = (known(&ENVELOPES), known(&SPLITS));
    match (envelopes.as_slice(), splits.as_slice()) {
        ([name], []) | ([], [name]) => {
            let Some(Value::Array(items)) = entries.shift_remove(*name) else { return Ok(()) };
            let mut items = items.into_iter().enumerate();
            items.try_for_each(|(i, item)| sink(row(Item(item), nth(path, i))))
        }
        ([], []) => columns_or_one_row(entries, path, sink),
        _ => {
            let names: Vec<String> = envelopes.iter().chain(&splits).map(|n| format!("`{n}`")).collect();
            let why =
                format!("has several lists of rows ({}); write each to a file of its own", names.join(", "));
            Err(Error::file(path, why))
        }
    }
}

/// An object that is a row itself. Tables by columns look alike, and are no row.
fn columns_or_one_row(entries: Map<String, Value>, path: &Path, sink: &mut Sink) -> Result<()> {
    let by_row = |v: &Value| {
        v.as_array().is_some_and(|a| !a.is_empty() && a.iter().all(Value::is_string))
            || v.as_object().is_some_and(|o| o.contains_key("0"))
    };
    if entries.len() > 1 && entries.values().all(by_row) {
        return Err(Error::file(
            path,
            "holds a table by columns; write it by rows (pandas: `to_json(FILE, orient=\"records\", lines=True)`)",
        ));
    }
    let file = Arc::new(path.to_owned());
    sink(row(Item(Value::Object(entries)), Origin { file, line: 1, unit: Unit::Line }))
}

/// A row per pair of the sections with a `passage` and `qa_pairs` each, with the columns of
/// the pair and of its section.
fn sections(sections: Map<String, Value>, path: &Arc<PathBuf>, sink: &mut Sink) -> Result<()> {
    let mut count = 0;
    for (name, mut section) in sections {
        let Some(Value::Array(pairs)) = section.get_mut("qa_pairs").map(Value::take) else { continue };
        for pair in pairs {
            let found = row(Item(pair), nth(path, count)).map(|mut found| {
                found.columns.insert("section_id".into(), name.clone().into());
                found.columns.insert("passage".into(), section["passage"].clone());
                found
            });
            sink(found)?;
            count += 1;
        }
    }
    Ok(())
}

/// Parses strict JSON; where that fails, with what Python's `json` also writes.
fn parse<T: for<'de> Deserialize<'de>>(text: &str) -> serde_json::Result<T> {
    serde_json::from_str(text).or_else(|e| match with_marks(text) {
        Some(marked) => serde_json::from_str(&marked).map_err(|_| e),
        None => Err(e),
    })
}

fn row(Item(value): Item, origin: Origin) -> Result<Row> {
    match value {
        Value::Object(mut columns) => {
            let marked =
                columns.iter_mut().filter_map(|(name, value)| Some((name.clone(), take_marks(value)?)));
            let unusable: BTreeMap<_, _> = marked.collect();
            Ok(Row { origin, columns, unusable })
        }
        other => Err(origin.error(format!("expected a JSON object, found {}", kind(&other)))),
    }
}

/// A value in which an object has no key twice: which of the two is meant, nobody knows.
struct Item(Value);

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Value;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a JSON value")
            }

            fn visit_unit<E>(self) -> std::result::Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_bool<E>(self, value: bool) -> std::result::Result<Value, E> {
                Ok(value.into())
            }

            fn visit_i64<E>(self, value: i64) -> std::result::Result<Value, E> {
                Ok(value.into())
            }

            fn visit_u64<E>(self, value: u64) -> std::result::Result<Value, E> {
                Ok(value.into())
            }

            fn visit_f64<E>(self, value: f64) -> std::result::Result<Value, E> {
                Ok(value.into())
            }

            fn visit_str<E>(self, value: &str) -> std::result::Result<Value, E> {
                Ok(value.into())
            }

            fn visit_string<E>(self, value: String) -> std::result::Result<Value, E> {
                Ok(value.into())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> std::result::Result<Value, A::Error> {
                let mut list = vec![];
                while let Some(Item(item)) = items.next_element()? {
                    list.push(item);
                }
                Ok(Value::Array(list))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> std::result::Result<Value, A::Error> {
                let mut object = Map::new();
                while let Some((key, Item(value))) = entries.next_entry::<String, Item>()? {
                    if object.contains_key(&key) {
                        return Err(A::Error::custom(format!("the key `{key}` is there twice")));
                    }
                    object.insert(key, value);
                }
                Ok(Value::Object(object))
            }
        }
        deserializer.deserialize_any(Any).map(Item)
    }
}

#[cfg(test)]
mod tests {
    use super::super::read_rows;
    use super::*;

    fn read_as(name: &str, text: &[u8]) -> Result<Vec<Row>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        read_rows(&path)
    }

    #[test]
    fn lines_and_lists_give_the_same_rows() {
        let (a, b) = ("{\"x\": 1, \"y\": \"Grüße\"}", "{\"x\": null, \"y\": [\"a\", {\"z\": 2.5}]}");
        let by_line = read_as("d.jsonl", format!("\u{feff}{a}\r\n\n{b}").as_bytes()).unwrap();
        let indented = format!("\u{feff}\n [\n{a},\n {b}\n]\n");
        let by_list = read_as("d.json", indented.as_bytes()).unwrap();
        let columns = |rows: &[Row]| rows.iter().map(|r| r.columns.clone()).collect::<Vec<_>>();
        assert_eq!(columns(&by_line), columns(&by_list));
        assert!(by_line[1].origin.to_string().ends_with("d.jsonl:3"));
        assert!(by_list[1].origin.to_string().ends_with("d.json: row 2"));
        // Lines stay lines under any name.
        assert_eq!(columns(&read_as("d.json", format!("{a}\n{b}").as_bytes()).unwrap()), columns(&by_line));
        assert_eq!(columns(&read_as("d.json", a.as_bytes()).unwrap()), columns(&by_line[..1]));
        for envelope in ["data", "train", "rows"] {
            let text = format!("{{\"version\": 1, \"{envelope}\": [{a}, {b}]}}");
            assert_eq!(columns(&read_as("d.json", text.as_bytes()).unwrap()), columns(&by_line));
        }
        let both = format!("{{\"train\": [{a}], \"test\": [{b}]}}");
        let message = read_as("d.json", both.as_bytes()).unwrap_err().to_string();
        assert!(message.contains("`train`, `test`"), "{message}");
    }

    #[test]
    fn sections_become_a_row_per_question() {
        let text = r#"{"nfl_1": {"passage": "P", "wiki_url": "u", "qa_pairs": [{"question": "Q1", "answer": {}},
            {"question": "Q2", "answer": {"number": "3"}}]}, "h_2": {"passage": "R", "qa_pairs": [{"question": "Q3"}]}}"#;
        let rows = read_as("drop.json", text.as_bytes()).unwrap();
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[1].columns["passage"], "P");
        assert_eq!(rows[1].columns["answer"]["number"], "3");
        assert_eq!((&rows[2].columns["section_id"], rows[2].origin.line), (&Value::from("h_2"), 3));
    }

    #[test]
    fn errors_name_the_place() {
        for (name, text, place, say) in [
            ("d.jsonl", &b"{}\n{\"a\": 1"[..], "d.jsonl:2: ", "not valid JSON"),
            ("d.jsonl", b"{}\n[1]", "d.jsonl:2: ", "a list"),
            ("d.jsonl", b"{}\n{\"a\": \"\xff\"}", "d.jsonl:2: ", "UTF-8"),
            ("d.jsonl", b"{}\n{\"a\": 1,}", "d.jsonl:2: ", "trailing comma"),
            ("d.jsonl", b"{}\n{\"a\": 1, \"a\": 2}", "d.jsonl:2: ", "`a` is there twice"),
            ("d.jsonl", b"{}\n{\"a\": [{\"b\": 1, \"b\": 2}]}", "d.jsonl:2: ", "`b` is there twice"),
            ("d.jsonl", b"{\n  \"a\": 1\n}\n", "d.jsonl:1: ", "jq -c"),
            ("d.json", b"[{}, 3]", "d.json: row 2: ", "a number"),
            ("d.json", b"[{}, {\"a\": ]", "d.json: ", "not valid JSON"),
            ("d.json", b"[{\"a\": \"\xff\"}]", "d.json: ", "not valid JSON"),
            ("d.json", b"{\"prompt\": [\"a\"], \"response\": [\"b\"]}", "d.json: ", "by columns"),
            ("d.json", b"{\"p\": {\"0\": \"a\"}, \"r\": {\"0\": \"b\"}}", "d.json: ", "by columns"),
        ] {
            let message = read_as(name, text).unwrap_err().to_string();
            assert!(message.contains(place) && message.contains(say), "{message}");
        }
        // Nesting has a limit, so that no input can exhaust the stack.
        let deep = [b"[".repeat(100_000), b"]".repeat(100_000)].concat();
        assert!(read_as("d.json", &deep).unwrap_err().to_string().contains("recursion"));
        let deep = [&b"{\"a\": NaN, \"b\": "[..], &deep, b"}"].concat();
        assert!(read_as("d.jsonl", &deep).is_err());
    }

    #[test]
    fn json_of_python_is_read_and_its_columns_known() {
        let text = "{\"a\": NaN, \"b\": \"x\"}\n{\"a\": 1, \"b\": \"\\ud83d\"}\n{\"a\": [1, -Infinity]}\n";
        let rows = read_as("d.jsonl", text.as_bytes()).unwrap();
        let names = |i: usize| rows[i].unusable.keys().map(String::as_str).collect::<Vec<_>>();
        assert_eq!((names(0), names(1), names(2)), (vec!["a"], vec!["b"], vec!["a"]));
        let list = read_as("d.json", b"[{\"a\": Infinity}, {\"a\": 2}]").unwrap();
        assert_eq!((list[0].unusable.len(), list[1].unusable.len()), (1, 0));
        let message = read_as("d.jsonl", b"{\"a\": NaN, b}").unwrap_err().to_string();
        assert!(message.contains("not valid JSON"), "{message}");
    }
}
