//! What a person may have meant by a setting that does not exist.
//!
//! In: a run file's text or a dotted key, and the table of all settings. Out: a hint with the right
//! name: one that the setting has elsewhere ([`aliases`](super::aliases)), the same name in another
//! section, or the most similar name.

use super::aliases::{Alias, BEFORE, SECTIONS, alias};
use strsim::osa_distance;
use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

/// A setting that does not exist, as it was written.
struct Unknown {
    key: String,
    /// Nothing for a section without settings.
    value: Option<Value>,
    /// Of the file, from 1.
    line: usize,
}

/// A hint for one key; none if it exists.
pub(super) fn hint(wrong: &str, value: Option<&Value>, known: &Table) -> Option<String> {
    if exists(wrong, known) {
        return None;
    }
    match named_elsewhere(wrong, known) {
        Some((Alias::Same(_), keys)) => Some(match (&keys[..], value) {
            ([key], Some(value)) => format!("did you mean `{key}`? `{key} = {value}`"),
            _ => format!("did you mean {}?", listed(&keys)),
        }),
        Some((Alias::Like(_, why), keys)) => Some(format!("did you mean {}? {why}", listed(&keys))),
        Some((Alias::Nothing(why), _)) => Some(format!("gradtx has no setting for it: {why}")),
        None => similar(wrong, known).map(|key| format!("did you mean `{key}`?")),
    }
}

/// A hint for all settings of a run file that do not exist, a line each if there are several.
pub(super) fn hint_for_file(text: &str, known: &Table) -> Option<String> {
    let file = DeTable::parse(text).ok()?;
    let mut unknown = vec![];
    collect("", file.get_ref(), known, text, &mut unknown);
    let hint = |u: &Unknown| hint(&u.key, u.value.as_ref(), known);
    match &unknown[..] {
        [] => None,
        [one] => hint(one),
        many => {
            let lines = many.iter().map(|u| {
                let hint = hint(u).unwrap_or_else(|| "there is no such setting".into());
                format!("\n  line {}: {}: {hint}", u.line, u.key)
            });
            Some(format!("{} settings are unknown:{}", many.len(), lines.collect::<String>()))
        }
    }
}

fn collect(at: &str, table: &DeTable<'_>, known: &Table, text: &str, out: &mut Vec<Unknown>) {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    for (key, value) in entries {
        let path = join(at, key.get_ref());
        let nothing = Table::new();
        match (value.get_ref(), known.get(key.get_ref().as_ref())) {
            (DeValue::Table(inner), Some(Value::Table(known))) => collect(&path, inner, known, text, out),
            (_, Some(_)) => {}
            (DeValue::Table(inner), None) if !inner.is_empty() => collect(&path, inner, &nothing, text, out),
            (_, None) => out.push(Unknown {
                key: path,
                value: plain(value, text),
                line: 1 + text[..key.span().start].matches('\n').count(),
            }),
        }
    }
}

/// A value that fits into a line.
fn plain(value: &Spanned<DeValue<'_>>, text: &str) -> Option<Value> {
    if matches!(value.get_ref(), DeValue::Table(_)) {
        return None;
    }
    format!("v = {}", text.get(value.span())?).parse::<Table>().ok()?.remove("v")
}

/// What a key is called here that has another name, or another section, elsewhere; and the settings of
/// that name.
fn named_elsewhere(wrong: &str, known: &Table) -> Option<(Alias, Vec<String>)> {
    let (section, name) = wrong.rsplit_once('.').unwrap_or(("", wrong));
    let section = renamed(section);
    if exists(&join(&section, name), known) {
        return Some((Alias::Same(&[]), vec![join(&section, name)]));
    }
    let found = alias(name);
    let names = match found {
        Some(Alias::Same(names) | Alias::Like(names, _)) => names,
        Some(Alias::Nothing(_)) | None => &[],
    };
    if let (Some(found), Some(name)) = (found, names.iter().find(|name| exists(&join(&section, name), known)))
    {
        return Some((found, vec![join(&section, name)]));
    }
    let settings: Vec<String> =
        all_keys("", known).into_iter().filter(|key| !is_section(key, known)).collect();
    let named = |name: &str| settings.iter().filter(|key| last(key) == name).cloned().collect::<Vec<_>>();
    let moved = named(name);
    match found {
        None | Some(Alias::Like(..)) if !moved.is_empty() => Some((Alias::Same(&[]), moved)),
        // Names of one setting each: the first one is the most usual.
        Some(found @ Alias::Same(names)) => {
            Some((found, names.iter().map(|name| named(name)).find(|keys| !keys.is_empty())?))
        }
        Some(found) => Some((found, names.iter().flat_map(|name| named(name)).collect())),
        None => None,
    }
}

/// A section under its name of today.
fn renamed(section: &str) -> String {
    SECTIONS.iter().find(|(before, _)| *before == section).map_or(section, |(_, now)| now).to_string()
}

/// The existing key most like `wrong` (dotted), if one is like it at all.
fn similar(wrong: &str, known: &Table) -> Option<String> {
    let keys = all_keys("", known);
    let whole = keys.iter().map(|key| (osa_distance(wrong, key), key.clone()));
    // The right name in another section is a near miss too.
    let moved = keys.iter().filter(|key| last(key) == last(wrong)).map(|key| (1, key.clone()));
    // So is a name of an earlier version.
    let (section, name) = wrong.rsplit_once('.').unwrap_or(("", wrong));
    let before = BEFORE.iter().filter_map(|(other, alias)| {
        let Alias::Same(names) = alias else { return None };
        let key = names.iter().map(|name| join(section, name)).find(|key| exists(key, known))?;
        Some((osa_distance(name, other), key))
    });
    let (far, key) = whole.chain(moved).chain(before).min_by_key(|(far, _)| *far)?;
    // A third of what was typed may be wrong; what is short may have one letter wrong.
    (far > 0 && far <= (last(wrong).chars().count() / 3).max(1)).then_some(key)
}

fn last(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or_default()
}

fn join(at: &str, key: &str) -> String {
    if at.is_empty() { key.into() } else { format!("{at}.{key}") }
}

/// Whether there is a setting or a section of this name.
fn exists(key: &str, known: &Table) -> bool {
    find(key, known).is_some()
}

fn is_section(key: &str, known: &Table) -> bool {
    find(key, known).is_some_and(Value::is_table)
}

fn find<'a>(key: &str, known: &'a Table) -> Option<&'a Value> {
    let mut parts = key.split('.');
    let first = parts.next().and_then(|part| known.get(part));
    parts.fold(first, |value, part| value?.as_table()?.get(part))
}

fn listed(keys: &[String]) -> String {
    keys.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ")
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

    fn hint_of(key: &str, value: impl Into<Value>) -> String {
        hint(key, Some(&value.into()), &Config::default().table()).unwrap_or_default()
    }

    #[test]
    fn mistyped_keys_are_found_and_nonsense_is_not() {
        let known = Config::default().table();
        let similar = |key| similar(key, &known);
        assert_eq!(similar("train.max_stesp").as_deref(), Some("train.max_steps"));
        assert_eq!(similar("curate.num_subset").as_deref(), Some("curate.num_subsets"));
        assert_eq!(similar("curate.subset").as_deref(), Some("curate.num_subsets"), "its earlier name");
        assert_eq!(similar("cuarte.num_subsets").as_deref(), Some("curate.num_subsets"));
        assert_eq!(similar("num_subsets").as_deref(), Some("curate.num_subsets"), "in the wrong section");
        assert_eq!(similar("models.r").as_deref(), Some("lora.r"));
        assert_eq!(similar("curate.tiny.warm_up_steps").as_deref(), Some("curate.tiny.warmup_steps"));
        assert_eq!(similar("train.flavour"), None);
    }

    #[test]
    fn foreign_names_are_translated_with_their_values() {
        for (key, wanted) in [
            ("adapter.rank", "`lora.r = 8`"),
            ("rank", "`lora.r = 8`"),
            ("lora.rank", "`lora.r = 8`"),
            ("translate.rank", "`translate.lora_r = 8`"),
            ("adapter.dropout", "`lora.lora_dropout = 8`"),
            ("translator.dropout", "`translator.dropout_rate = 8`"),
            ("train.lr", "`train.learning_rate = 8`"),
            ("curate.llm.normalization", "`curate.llm.loss_reduction = 8`"),
            ("translator.normalization", "`translator.update_normalization = 8`"),
            ("refine.steps", "`refine.steps_per_round = 8`"),
            ("evaluate.batch", "`evaluate.per_device_eval_batch_size = 8`"),
            ("training.cutoff_len", "`data.max_length = 8`"),
            ("student_model", "`models.tiny = 8`"),
            ("adapter.lora_alpha", "`lora.lora_alpha = 8`"),
            ("lora_alpha", "`lora.lora_alpha = 8`"),
            ("lora_r", "`lora.r = 8`"),
            ("train.num_epochs", "`train.num_train_epochs = 8`"),
            ("per_device_train_batch_size", "`train.per_device_train_batch_size = 8`"),
        ] {
            assert!(hint_of(key, 8).ends_with(wanted), "{key}: {}", hint_of(key, 8));
        }
        let all = hint_of("learning_rate", 8);
        assert!(
            all.contains("`curate.tiny.learning_rate`") && all.contains("`train.learning_rate`"),
            "{all}"
        );
        let all = hint_of("lr", 8);
        assert!(
            all.contains("`curate.tiny.learning_rate`") && all.contains("`train.learning_rate`"),
            "{all}"
        );
        let other = hint_of("finetune.tiny.per_device_train_batch_size", 8);
        assert!(other.contains("`finetune.tiny.global_batch_size`? it counts"), "{other}");
        assert!(hint_of("gradient_checkpointing", true).contains("no setting for it"));
    }

    #[test]
    fn every_alias_leads_to_a_setting() {
        let known = Config::default().table();
        let all = all_keys("", &known);
        let names = |alias: &Alias| match alias {
            Alias::Same(names) | Alias::Like(names, _) => names.to_vec(),
            Alias::Nothing(_) => vec![],
        };
        for (other, alias) in super::super::aliases::all() {
            for name in names(alias) {
                assert!(all.iter().any(|key| last(key) == name), "{other}: no setting is called {name}");
            }
        }
    }

    #[test]
    fn old_files_are_translated_line_by_line() {
        let known = Config::default().table();
        let file = "seed = 1\n[adapter]\nrank = 4\n\n[curate]\nsubsets = 3\ntiny.lr = 1e-3\n[curate.llm]\nflavour = 1\n";
        let hint = hint_for_file(file, &known).unwrap();
        for line in [
            "4 settings are unknown:\n",
            "line 3: adapter.rank: did you mean `lora.r`? `lora.r = 4`",
            "line 6: curate.subsets: did you mean `curate.num_subsets`?",
            "line 7: curate.tiny.lr: did you mean `curate.tiny.learning_rate`? `curate.tiny.learning_rate = 0.001`",
            "line 9: curate.llm.flavour: there is no such setting",
        ] {
            assert!(hint.contains(line), "no {line} in {hint}");
        }
        assert_eq!(hint_for_file("seed = 1\n[curate]\nnum_subsets = 3\n", &known), None);
    }
}
