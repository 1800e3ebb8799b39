//! Rows of JSON files: one object per line, or one list of objects (SAMSum is published
//! so), or the object of sections and questions that DROP is published as.

use super::{BYTE_ORDER_MARK, Origin, Row, Unit, kind};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;

/// Reads a JSON file whose first bytes are `begin`.
pub(super) fn read(path: &Path, begin: &[u8]) -> Result<Vec<Row>> {
    let begin = begin.strip_prefix(BYTE_ORDER_MARK).unwrap_or(begin).trim_ascii_start();
    let named_json = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json"));
    match begin.first() {
        Some(b'[') => list(path),
        Some(b'{') if named_json => match sections(path)? {
            Some(rows) => Ok(rows),
            None => lines(path),
        },
        _ => lines(path),
    }
}

fn lines(path: &Path) -> Result<Vec<Row>> {
    let mut input = BufReader::new(File::open(path).map_err(|e| Error::io("open", path, e))?);
    let file = Arc::new(path.to_owned());
    let (mut rows, mut line, mut bytes) = (vec![], 0, vec![]);
    loop {
        bytes.clear();
        if input.read_until(b'\n', &mut bytes).map_err(|e| Error::io("read", path, e))? == 0 {
            return Ok(rows);
        }
        line += 1;
        let origin = Origin { file: file.clone(), line, unit: Unit::Line };
        let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes);
        let text = std::str::from_utf8(bytes).map_err(|e| origin.error(format!("not valid UTF-8: {e}")))?;
        if !text.trim().is_empty() {
            let value =
                serde_json::from_str(text).map_err(|e| origin.error(format!("not valid JSON: {e}")))?;
            rows.push(row(value, origin)?);
        }
    }
}

fn list(path: &Path) -> Result<Vec<Row>> {
    let items: Vec<Value> = whole(path)?.map_err(|e| {
        Error::file(path, format!("begins like a JSON list of objects, but is not valid JSON: {e}"))
    })?;
    let file = Arc::new(path.to_owned());
    let origin = |i| Origin { file: file.clone(), line: i + 1, unit: Unit::Row };
    items.into_iter().enumerate().map(|(i, item)| row(item, origin(i))).collect()
}

/// A file that is one object of sections with a `passage` and `qa_pairs` each; a row per
/// pair, with the columns of the pair and of its section. None when it is not that.
fn sections(path: &Path) -> Result<Option<Vec<Row>>> {
    let Ok(sections): std::result::Result<Map<String, Value>, _> = whole(path)? else { return Ok(None) };
    let is_section = |s: &Value| s.get("passage").is_some() && s.get("qa_pairs").is_some_and(Value::is_array);
    if sections.is_empty() || !sections.values().all(is_section) {
        return Ok(None);
    }
    let file = Arc::new(path.to_owned());
    let mut rows = vec![];
    for (name, section) in sections {
        for pair in section["qa_pairs"].as_array().into_iter().flatten() {
            let origin = Origin { file: file.clone(), line: rows.len() + 1, unit: Unit::Row };
            let mut found = row(pair.clone(), origin)?;
            found.columns.insert("section_id".into(), name.clone().into());
            found.columns.insert("passage".into(), section["passage"].clone());
            rows.push(found);
        }
    }
    Ok(Some(rows))
}

fn whole<T: serde::de::DeserializeOwned>(path: &Path) -> Result<serde_json::Result<T>> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, e))?;
    Ok(serde_json::from_slice(bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes)))
}

fn row(value: Value, origin: Origin) -> Result<Row> {
    match value {
        Value::Object(columns) => Ok(Row { origin, columns }),
        other => Err(origin.error(format!("expected a JSON object, found {}", kind(&other)))),
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
            ("d.json", b"[{}, 3]", "d.json: row 2: ", "a number"),
            ("d.json", b"[{}, {\"a\": ]", "d.json: ", "not valid JSON"),
            ("d.json", b"[{\"a\": \"\xff\"}]", "d.json: ", "not valid JSON"),
        ] {
            let message = read_as(name, text).unwrap_err().to_string();
            assert!(message.contains(place) && message.contains(say), "{message}");
        }
        // Nesting has a limit, so that no input can exhaust the stack.
        let deep = [b"[".repeat(100_000), b"]".repeat(100_000)].concat();
        assert!(read_as("d.json", &deep).unwrap_err().to_string().contains("recursion"));
    }
}
