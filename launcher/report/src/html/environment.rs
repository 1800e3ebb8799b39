//! The templates, and how values become text in them.
//!
//! In: the name of a template and what it shows. Out: its text. All strings are escaped unless a
//! filter made them: names of directories, tasks and models are other people's words.

use crate::svg::escape;
use anyhow::{Context as _, Result};
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, Error, Output, State, UndefinedBehavior, escape_formatter};
use serde::Serialize;

/// All templates by their names; those that end in `.html` are escaped.
const TEMPLATES: [(&str, &str); 6] = [
    ("layout.html", include_str!("../../templates/layout.html")),
    ("macros.html", include_str!("../../templates/macros.html")),
    ("style.css", include_str!("../../templates/style.css")),
    ("report.html", include_str!("../../templates/report.html")),
    ("comparison.html", include_str!("../../templates/comparison.html")),
    ("predictions.html", include_str!("../../templates/predictions.html")),
];

/// A page.
///
/// # Errors
/// If the template asks for something that the view lacks, which is a bug.
pub fn render(name: &str, view: &impl Serialize) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_formatter(write_value);
    environment.add_filter("typeset", typeset);
    environment.add_filter("breakable", breakable);
    environment.add_filter("drawing", |svg: String| Value::from_safe_string(svg));
    for (name, text) in TEMPLATES {
        environment.add_template(name, text)?;
    }
    let page = environment.get_template(name)?.render(view);
    page.with_context(|| format!("template {name}"))
}

/// Writes a value: strings with what a page may not hold replaced.
fn write_value(out: &mut Output, state: &State, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) if !value.is_safe() && state.auto_escape() == AutoEscape::Html => {
            Ok(out.write_str(&escape(text))?)
        }
        _ => escape_formatter(out, state, value),
    }
}

/// A path, escaped, that may be broken into lines after its slashes.
fn breakable(path: &str) -> Value {
    Value::from_safe_string(escape(path).replace('/', "/<wbr>"))
}

/// Sentences, escaped and set as print sets them: curly apostrophes, subscripts, numbers
/// that stay with their unit, and what stands in backticks as code.
fn typeset(text: &str) -> Value {
    let escaped = escape(text);
    let parts: Vec<&str> = escaped.split('`').collect();
    let mut out = String::new();
    for (i, part) in parts.iter().enumerate() {
        match (i % 2 == 1, i + 1 < parts.len()) {
            (false, _) => out += part,
            (true, true) => out += &format!("<code>{part}</code>"),
            // A backtick without a second one.
            (true, false) => out += &format!("`{part}"),
        }
    }
    let set = out
        .replace("&#39;", "’")
        .replace("P_S", "P<sub>S</sub>")
        .replace("P_T", "P<sub>T</sub>")
        .replace(" %", "\u{a0}%");
    Value::from_safe_string(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_are_escaped_and_set() {
        let text = |text: &str| typeset(text).to_string();
        assert_eq!(text("P_S isn't <b> 5 %"), "P<sub>S</sub> isn’t &lt;b&gt; 5\u{a0}%");
        assert_eq!(text("run `gradtx <x>`, not `this"), "run <code>gradtx &lt;x&gt;</code>, not `this");
    }

    #[test]
    fn paths_may_break_after_slashes() {
        assert_eq!(breakable("a/<b>/c").to_string(), "a/<wbr>&lt;b&gt;/<wbr>c");
    }

    #[test]
    fn strings_are_escaped_and_lacking_values_are_errors() {
        let layout = |title: &str| serde_json::json!({ "title": title, "kind": "test", "contents": [] });
        let page = render("layout.html", &layout("<i>\u{7}")).unwrap();
        assert!(page.contains("<h1>&lt;i&gt;\u{fffd}</h1>"), "{page}");
        assert!(render("layout.html", &serde_json::json!({})).is_err());
        assert!(render("no.html", &layout("")).is_err());
    }
}
