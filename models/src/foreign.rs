//! Fields of other programs' configuration files that nobody here knows: which of them cannot
//! change a result, and how a person overrules the refusal of the rest.

use gradtx_runtime::Error;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{PoisonError, RwLock};

/// What the setting `models.ignore_fields` names. Models are read in many places, each of which
/// must judge alike, so this is one list for the process.
static IGNORED: RwLock<BTreeSet<String>> = RwLock::new(BTreeSet::new());

/// Accepts these fields of `config.json` and `adapter_config.json` from now on, whatever their
/// values: their user says that they change nothing. Fields that are understood stay in force.
pub fn ignore_fields(names: &[String]) {
    IGNORED.write().unwrap_or_else(PoisonError::into_inner).extend(names.iter().cloned());
}

/// Null, false, zero, empty, or an object with nothing else in it: what switches nothing on.
pub(crate) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        // A list with a zero in it may name layer 0.
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.values().all(is_off),
    }
}

/// Names under which programs note what made a file.
fn is_bookkeeping(name: &str) -> bool {
    let begins =
        ["_", "unsloth_", "transformers.", "transformers_", "axolotl_", "mergekit_", "llamafactory_"];
    begins.iter().any(|begin| name.starts_with(begin)) || name.ends_with("_version")
}

/// Whether a field that is not understood may stay unread.
pub(crate) fn is_harmless(name: &str, value: &Value) -> bool {
    let is_ignored = || IGNORED.read().unwrap_or_else(PoisonError::into_inner).contains(name);
    is_off(value) || is_bookkeeping(name) || is_ignored()
}

/// The refusal of a field that may change the result.
pub(crate) fn unknown(path: &Path, name: &str, value: &Value, what: &str) -> Error {
    let why = format!(
        "unknown field `{name}` = {}: it may change what the {what} computes; if you know that it does not, \
         set models.ignore_fields = [\"{name}\"]",
        shown(value)
    );
    Error::file(path, why)
}

/// A value for a message, cut where it is long.
pub(crate) fn shown(value: &Value) -> String {
    const LONGEST: usize = 120;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        None => text,
        Some((at, _)) => format!("{}…", &text[..at]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn harmless_fields_pass_and_others_have_an_override() {
        for value in [json!(null), json!(false), json!(0), json!(0.0), json!(""), json!([]), json!({})] {
            assert!(is_harmless("an_entry", &value), "{value}");
        }
        assert!(is_harmless("an_entry", &json!({"a": null, "b": {"c": false, "d": 0}})));
        for value in [json!(true), json!(1), json!("x"), json!([0]), json!({"a": {"b": 1}})] {
            assert!(!is_harmless("an_entry", &value), "{value}");
            assert!(is_harmless("unsloth_entry", &value) && is_harmless("some_version", &value));
        }
        let message = unknown(Path::new("config.json"), "scale_by", &json!(2), "model").to_string();
        assert!(message.contains("models.ignore_fields = [\"scale_by\"]"), "{message}");
        ignore_fields(&["a_field_of_this_test".into()]);
        assert!(is_harmless("a_field_of_this_test", &json!(2)) && !is_harmless("another", &json!(2)));
        assert!(shown(&json!("ä".repeat(500))).chars().count() < 130);
    }
}
