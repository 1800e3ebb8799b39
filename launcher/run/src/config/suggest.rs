//! What a person may have meant by a key that does not exist.
//!
//! In: a run file's text or a dotted key, and the table of all settings. Out: the most
//! similar key, by name or, for a key in the wrong section, by its last part.

use strsim::osa_distance;
use toml::{Table, Value};

/// The existing key most like `wrong` (dotted), if one is like it at all.
pub fn similar(wrong: &str, known: &Table) -> Option<String> {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_string();
    let keys = all_keys("", known);
    let whole = keys.iter().map(|key| (osa_distance(wrong, key), key));
    // The right name in another section is a near miss too.
    let moved = keys.iter().filter(|key| last(key) == last(wrong)).map(|key| (1, key));
    let (far, key) = whole.chain(moved).min_by_key(|(far, _)| *far)?;
    // A third of what was typed may be wrong; what is short may have one letter wrong.
    (far > 0 && far <= (last(wrong).chars().count() / 3).max(1)).then(|| key.clone())
}

/// The first key of a run file that is no setting.
pub fn unknown_in(text: &str, known: &Table) -> Option<String> {
    fn find(at: &str, table: &Table, known: &Table) -> Option<String> {
        table.iter().find_map(|(key, value)| {
            let path = join(at, key);
            match (value, known.get(key)) {
                (_, None) => Some(path),
                (Value::Table(inner), Some(Value::Table(known))) => find(&path, inner, known),
                _ => None,
            }
        })
    }
    find("", &text.parse().ok()?, known)
}

/// A hint that names the key which was meant.
pub fn hint(wrong: &str, known: &Table) -> Option<String> {
    similar(wrong, known).map(|key| format!("did you mean `{key}`?"))
}

fn join(at: &str, key: &str) -> String {
    if at.is_empty() { key.into() } else { format!("{at}.{key}") }
}

/// Every key and section, dotted.
fn all_keys(at: &str, table: &Table) -> Vec<String> {
    let mut keys = vec![];
    for (key, value) in table {
        let path = join(at, key);
        if let Value::Table(inner) = value {
            keys.extend(all_keys(&path, inner));
        }
        keys.push(path);
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn what_was_meant_is_found_and_nonsense_is_not() {
        let known = Config::default().table();
        let similar = |key| similar(key, &known);
        assert_eq!(similar("train.stesp").as_deref(), Some("train.steps"));
        assert_eq!(similar("curate.subset").as_deref(), Some("curate.subsets"));
        assert_eq!(similar("cuarte.subsets").as_deref(), Some("curate.subsets"));
        assert_eq!(similar("subsets").as_deref(), Some("curate.subsets"), "in the wrong section");
        assert_eq!(similar("models.rank").as_deref(), Some("adapter.rank"));
        assert_eq!(similar("train.flavour"), None);
        let file = "seed = 1\n[curate]\nsubsets = 3\n[curate.tiny]\nwarm_up = 3\n";
        assert_eq!(unknown_in(file, &known).as_deref(), Some("curate.tiny.warm_up"));
        assert_eq!(similar("curate.tiny.warm_up").as_deref(), Some("curate.tiny.warmup"));
        assert_eq!(unknown_in("seed = 1\n[curate]\nsubsets = 3\n", &known), None);
    }
}
