//! What differs between two JSON values.

use serde_json::Value;
use std::collections::BTreeMap;

/// The leaves of two JSON values that differ, as lines `- key = before` and `+ key = now`.
pub fn diff(before: &Value, now: &Value) -> String {
    let (a, b) = (leaves(before), leaves(now));
    let mut lines = String::new();
    let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
    keys.sort();
    keys.dedup();
    for key in keys.into_iter().filter(|key| a.get(*key) != b.get(*key)) {
        for (sign, side) in [('-', &a), ('+', &b)] {
            if let Some(value) = side.get(key) {
                lines += &format!("  {sign} {key} = {value}\n");
            }
        }
    }
    lines
}

/// The leaves of a JSON value, by their dotted keys.
pub fn leaves(value: &Value) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    collect("", value, &mut out);
    out
}

fn collect(at: &str, value: &Value, out: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(entries) => {
            for (key, inner) in entries {
                let key = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                collect(&key, inner, out);
            }
        }
        other => {
            out.insert(at.to_string(), other.to_string());
        }
    }
}
