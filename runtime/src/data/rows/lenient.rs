//! JSON as Python writes it, where the standard has no such thing: `NaN`, `Infinity`,
//! `-Infinity`, and halves of surrogate pairs (`"\ud83d"`).
//!
//! Such values cannot be used, but a row that has one in a column that nobody uses can be.
//! They become marks that are no characters, so that the columns with them are known.

use serde_json::Value;

/// Stands for half of a surrogate pair in a string.
const HALF_PAIR: char = '\u{fdd0}';
/// Stands for a number that is none.
const NO_NUMBER: &str = "\u{fdd1}";

/// The text with marks in the place of what JSON does not have; None where nothing of that
/// kind is in it.
pub(super) fn with_marks(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len() + 16);
    let (mut rest, mut changed) = (text, false);
    while let Some(at) = rest.find(['"', 'N', 'I', '-']) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if rest.starts_with('"') {
            rest = string(rest, &mut out, &mut changed);
        } else if let Some(word) =
            ["NaN", "Infinity", "-Infinity"].iter().find(|word| rest.starts_with(**word))
        {
            out.extend(["\"", NO_NUMBER, "\""]);
            rest = &rest[word.len()..];
            changed = true;
        } else {
            out.push_str(&rest[..1]);
            rest = &rest[1..];
        }
    }
    out.push_str(rest);
    changed.then_some(out)
}

/// Copies the string that `text` begins with; what comes after it.
fn string<'t>(text: &'t str, out: &mut String, changed: &mut bool) -> &'t str {
    let mut rest = &text[1..];
    out.push('"');
    while let Some(at) = rest.find(['"', '\\']) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix('"') {
            out.push('"');
            return after;
        }
        let length = match (surrogate(rest), rest.get(6..).and_then(surrogate)) {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => 12,
            (Some(_), _) => {
                out.push(HALF_PAIR);
                *changed = true;
                rest = &rest[6..];
                continue;
            }
            // An escape is a backslash and at least one more character.
            (None, _) => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
        };
        out.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    out.push_str(rest);
    ""
}

/// The half of a surrogate pair that `text` begins with as an escape.
fn surrogate(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("\\u")?.get(..4)?;
    u32::from_str_radix(digits, 16).ok().filter(|code| (0xd800..=0xdfff).contains(code))
}

/// Takes the marks out of a value, and says what they stood for.
pub(super) fn take_marks(value: &mut Value) -> Option<&'static str> {
    match value {
        Value::String(text) if text == NO_NUMBER => {
            *value = Value::Null;
            Some("NaN or an infinite number")
        }
        Value::String(text) if text.contains(HALF_PAIR) => {
            *text = text.replace(HALF_PAIR, "\u{fffd}");
            Some("text with half of a surrogate pair (`\\ud83d`), which is no Unicode")
        }
        Value::Array(items) => items.iter_mut().filter_map(take_marks).last(),
        Value::Object(entries) => entries.values_mut().filter_map(take_marks).last(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_json_does_not_have_is_marked() {
        for same in [
            r#"{"a": "NaN", "b": [-1, "\\ud83d", "\ud83d\ude00", "\u00e9"], "c": "-Infinity \" NaN"}"#,
            r#"{"a": "\"#,
            r#"{"a": -"#,
            "",
        ] {
            assert_eq!(with_marks(same), None, "{same}");
        }
        let text = r#"{"x": NaN, "y": [-Infinity, Infinity, 2], "z": "a\ud83dé\ude00", "ok": "NaN"}"#;
        let mut value: Value = serde_json::from_str(&with_marks(text).unwrap()).unwrap();
        assert!(take_marks(&mut value["ok"]).is_none() && value["ok"] == "NaN");
        assert!(take_marks(&mut value["x"]).unwrap().contains("NaN") && value["x"].is_null());
        assert!(take_marks(&mut value["y"]).is_some() && value["y"][2] == 2);
        assert!(take_marks(&mut value["z"]).unwrap().contains("surrogate"));
        assert_eq!(value["z"], "a\u{fffd}é\u{fffd}");
    }
}
