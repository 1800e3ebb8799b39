//! What every setting means: from the doc comments of the settings' types.
//!
//! In: [`Config`]'s JSON schema and its defaults. Out: the schema for editors, a run file with all
//! defaults and their meanings, the explanation of one key, and the page docs/configuration.md.

use super::{Config, suggest};
use crate::failure::unusable_with;
use anyhow::Result;
use schemars::generate::SchemaSettings;
use serde_json::Value as Json;
use std::fmt::Write as _;
use toml::{Table, Value};

/// Columns of text.
const WIDTH: usize = 100;

/// A section of run files; the one of settings that stand before all sections has no name.
#[derive(Debug, PartialEq)]
struct Section {
    key: String,
    description: String,
    settings: Vec<Setting>,
}

#[derive(Debug, PartialEq)]
struct Setting {
    name: String,
    description: String,
    /// What a value is.
    kind: String,
    /// Values that have a name, with their meanings.
    choices: Vec<(String, String)>,
    default: Value,
}

/// The JSON schema of run files.
pub fn schema() -> Json {
    let settings = SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true);
    let mut schema = settings.into_generator().into_root_schema_for::<Config>().to_value();
    schema["title"] = "gradtx run file".into();
    schema
}

/// A run file of all settings with their defaults; comments say what they mean.
pub fn defaults() -> String {
    let mut text = String::from("# Every setting of gradtx with its default.\n");
    for section in sections() {
        if !section.key.is_empty() {
            let _ = write!(text, "\n{}[{}]\n", comment(&section.description), section.key);
        }
        for setting in &section.settings {
            let _ = write!(text, "{}", comment(&setting.description));
            for (value, meaning) in &setting.choices {
                let _ = write!(text, "{}", comment(&format!("  {value}: {meaning}")));
            }
            let _ = writeln!(text, "{} = {}", setting.name, setting.default);
        }
    }
    text
}

/// What a setting or a section means.
///
/// # Errors
/// For a key that does not exist, with the one that was probably meant.
pub fn explain(key: &str) -> Result<String> {
    let sections = sections();
    let (at, name) = key.rsplit_once('.').unwrap_or(("", key));
    let setting = sections.iter().filter(|s| s.key == at).flat_map(|s| &s.settings).find(|s| s.name == name);
    if let Some(setting) = setting {
        let mut text = format!("{key} = {}    ({})\n", setting.default, setting.kind);
        text += &indented(&setting.description);
        for (value, meaning) in &setting.choices {
            text += &indented(&format!("{value}: {meaning}"));
        }
        return Ok(text.trim_end().into());
    }
    let inner = format!("{key}.");
    let below: Vec<&Section> =
        sections.iter().filter(|s| s.key == key || s.key.starts_with(&inner)).collect();
    if below.is_empty() {
        let hint = suggest::hint(key, None, &Config::default().table());
        let hint = hint.unwrap_or_else(|| "gradtx config --defaults lists all settings".into());
        return Err(unusable_with(format!("{key}: there is no such setting"), Some(hint)));
    }
    let mut text = String::new();
    for section in below {
        let _ = write!(text, "[{}]\n{}", section.key, indented(&section.description));
        for setting in &section.settings {
            let _ = writeln!(text, "  {} = {}", setting.name, setting.default);
        }
    }
    Ok(text.trim_end().into())
}

/// The page about settings, in Markdown.
pub fn page() -> String {
    let mut text = include_str!("page.md").to_string();
    for group in groups(sections()) {
        let names: Vec<String> = group.iter().map(|section| format!("`[{}]`", section.key)).collect();
        let first = &group[0];
        match first.key.is_empty() {
            true => text += "\n## Before all sections\n\n",
            false => _ = write!(text, "\n## {}\n\n", names.join(", ")),
        }
        for section in group.iter().filter(|section| !section.key.is_empty()) {
            let of = if group.len() > 1 { format!("`[{}]`: ", section.key) } else { String::new() };
            let _ = writeln!(text, "{of}{}\n", section.description);
        }
        for (i, setting) in first.settings.iter().enumerate() {
            let default = default(&group, i);
            let Setting { name, description, kind, choices, .. } = setting;
            let _ = writeln!(text, "* **`{name}`** ({kind}; default {default}). {description}");
            for (value, meaning) in choices {
                let _ = writeln!(text, "  * `{value}`: {meaning}");
            }
        }
    }
    text
}

/// The default of a setting, and in which sections if they have different ones.
fn default(group: &[Section], setting: usize) -> String {
    let mut found: Vec<(&Value, Vec<String>)> = vec![];
    for section in group {
        let default = &section.settings[setting].default;
        let key = format!("`{}`", section.key);
        match found.iter_mut().find(|(known, _)| *known == default) {
            Some((_, keys)) => keys.push(key),
            None => found.push((default, vec![key])),
        }
    }
    match &found[..] {
        [(default, _)] => format!("`{default}`"),
        several => {
            let each = several.iter().map(|(default, keys)| format!("`{default}` in {}", keys.join(" and ")));
            each.collect::<Vec<_>>().join(", ")
        }
    }
}

/// Sections with the same settings together.
fn groups(sections: Vec<Section>) -> Vec<Vec<Section>> {
    let mut groups: Vec<Vec<Section>> = vec![];
    let same = |a: &Section, b: &Section| {
        let both = a.settings.iter().zip(&b.settings);
        a.settings.len() == b.settings.len()
            && both.fold(true, |all, (a, b)| all && a.name == b.name && a.description == b.description)
    };
    for section in sections {
        match groups.iter_mut().find(|group| !section.settings.is_empty() && same(&group[0], &section)) {
            Some(group) => group.push(section),
            None => groups.push(vec![section]),
        }
    }
    groups
}

/// All sections in their order.
fn sections() -> Vec<Section> {
    let mut sections = vec![];
    collect("", &schema(), &Config::default().table(), &mut sections);
    sections
}

fn collect(key: &str, schema: &Json, defaults: &Table, out: &mut Vec<Section>) {
    let mut section = Section { key: key.into(), description: description(schema), settings: vec![] };
    let mut inner = vec![];
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        match defaults.get(name) {
            Some(Value::Table(defaults)) => inner.push((name, schema, defaults)),
            Some(default) => {
                let (mut choices, mut kind) = (choices(schema), kind(schema));
                if !choices.is_empty() && choices.iter().all(|(_, meaning)| meaning.is_empty()) {
                    let names = std::mem::take(&mut choices).into_iter().map(|(name, _)| format!("`{name}`"));
                    kind = format!("one of {}", names.collect::<Vec<_>>().join(", "));
                }
                let (name, description) = (name.clone(), description(schema));
                section.settings.push(Setting { name, description, kind, choices, default: default.clone() });
            }
            None => {}
        }
    }
    out.push(section);
    for (name, schema, defaults) in inner {
        let key = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
        collect(&key, schema, defaults, out);
    }
}

/// The doc comment as paragraphs of one line each.
fn description(schema: &Json) -> String {
    let text = schema["description"].as_str().unwrap_or_default();
    let paragraphs = text.split("\n\n").map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "));
    paragraphs.collect::<Vec<_>>().join("\n\n")
}

/// What a value is, in words.
fn kind(schema: &Json) -> String {
    let of_type = |name: &str| match name {
        "integer" => "whole number".to_string(),
        "number" => "number".into(),
        "boolean" => "true or false".into(),
        "array" => "list".into(),
        _ => "text".into(),
    };
    let of_any = |parts: &[Json]| {
        let mut kinds: Vec<String> = parts.iter().map(kind).collect();
        kinds.dedup();
        kinds.join(" or ")
    };
    match schema["anyOf"].as_array() {
        Some(parts) => of_any(parts),
        None if !choices(schema).is_empty() => "one of the values below".into(),
        None => of_type(schema["type"].as_str().unwrap_or("string")),
    }
}

/// The names that a value may be, and their meanings.
fn choices(schema: &Json) -> Vec<(String, String)> {
    let name = |value: &Json| value.as_str().map(String::from);
    let one = |part: &Json| Some((name(&part["const"])?, description(part)));
    let plain = |part: &Json| {
        let names = part["enum"].as_array().into_iter().flatten();
        names.filter_map(|value| Some((name(value)?, String::new()))).collect::<Vec<_>>()
    };
    let parts = ["oneOf", "anyOf"].into_iter().filter_map(|key| schema[key].as_array()).flatten();
    let nested = parts.flat_map(|part| one(part).map_or_else(|| choices(part), |choice| vec![choice]));
    plain(schema).into_iter().chain(nested).collect()
}

/// Lines of a TOML comment.
fn comment(text: &str) -> String {
    let lines = wrapped(text, WIDTH - 2);
    lines.into_iter().map(|line| format!("# {line}").trim_end().to_string() + "\n").collect()
}

fn indented(text: &str) -> String {
    wrapped(text, WIDTH - 2)
        .into_iter()
        .map(|line| format!("  {line}").trim_end().to_string() + "\n")
        .collect()
}

/// Lines of at most so many letters; leading blanks of a paragraph stand before each of its lines.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![];
    for paragraph in text.split('\n') {
        let margin = &paragraph[..paragraph.len() - paragraph.trim_start().len()];
        let mut line = margin.to_string();
        for word in paragraph.split_whitespace() {
            if !line.trim().is_empty() && line.chars().count() + 1 + word.chars().count() > width {
                lines.push(std::mem::replace(&mut line, margin.to_string()));
            }
            if !line.trim().is_empty() {
                line.push(' ');
            }
            line += word;
        }
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_as_a_run_file_are_the_defaults() {
        let config: Config = toml::from_str(&defaults()).unwrap();
        assert_eq!(config, Config::default());
    }

    /// `UPDATE_DOCS=1` writes the page in the place of comparing it.
    #[test]
    fn the_page_is_of_these_settings() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/configuration.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, page()).unwrap();
        }
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        let help = "docs/configuration.md is not of these settings: \
                    UPDATE_DOCS=1 cargo test -p gradtx-run the_page writes it";
        assert!(written == page(), "{help}");
    }

    #[test]
    fn every_setting_has_a_description() {
        for section in sections() {
            for Setting { name, description, .. } in &section.settings {
                let key = format!("{}.{name}", section.key);
                assert!(description.split(' ').count() >= 3, "{key}: {description:?}");
                assert!(
                    description.ends_with(['.', ')']) && !description.contains("[`"),
                    "{key}: {description}"
                );
            }
        }
        let count: usize = sections().iter().map(|section| section.settings.len()).sum();
        assert!(count > 100, "{count} settings");
    }

    #[test]
    fn a_key_a_section_and_a_mistake_are_explained() {
        let said = explain("train.learning_rate").unwrap();
        assert!(said.starts_with("train.learning_rate = 0.00004    (number)\n  "), "{said}");
        let said = explain("data.prompt").unwrap();
        assert!(said.contains("one of the values below") && said.contains("\n  chatml: "), "{said}");
        let said = explain("curate").unwrap();
        assert!(said.contains("  num_subsets = 300\n") && said.contains("[curate.llm]\n"), "{said}");
        let error = explain("train.lr").unwrap_err();
        let failure: &crate::failure::Failure = error.downcast_ref().unwrap();
        assert_eq!(failure.hint.as_deref(), Some("did you mean `train.learning_rate`?"));
    }

    #[test]
    fn the_schema_refuses_what_the_program_refuses() {
        let schema = schema();
        assert_eq!(schema["additionalProperties"], false);
        let train = &schema["properties"]["train"];
        assert_eq!(train["additionalProperties"], false);
        assert_eq!(train["properties"]["max_steps"]["type"], "integer");
        assert_eq!(schema["properties"]["device"]["properties"]["kind"]["oneOf"][0]["const"], "auto");
    }
}
