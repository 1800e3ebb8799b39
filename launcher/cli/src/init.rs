//! `init`: a commented run file to start from.
//!
//! In: the name of a recipe of the folder launcher/recipes/, which the program carries. Out: the recipe as a run
//! file, and perhaps the JSON schema that editors check it with.

use anyhow::Result;
use comfy_table::{Table, presets};
use gradtx_run::config::schema;
use gradtx_run::context::Context;
use gradtx_run::failure::{unusable, unusable_with};
use gradtx_runtime::artifact::write_atomic;
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};
use strsim::osa_distance;

/// Name and text of every recipe.
pub const RECIPES: [(&str, &str); 8] = [
    ("rehearsal", include_str!("../../recipes/rehearsal.toml")),
    ("qwen2.5-0.5b-7b", include_str!("../../recipes/qwen2.5-0.5b-7b.toml")),
    ("qwen2.5-1.5b-7b", include_str!("../../recipes/qwen2.5-1.5b-7b.toml")),
    ("qwen2.5-3b-7b", include_str!("../../recipes/qwen2.5-3b-7b.toml")),
    ("qwen2.5-0.5b-14b", include_str!("../../recipes/qwen2.5-0.5b-14b.toml")),
    ("qwen2.5-1.5b-14b", include_str!("../../recipes/qwen2.5-1.5b-14b.toml")),
    ("qwen2.5-3b-14b", include_str!("../../recipes/qwen2.5-3b-14b.toml")),
    ("qwen2.5-0.5b-32b", include_str!("../../recipes/qwen2.5-0.5b-32b.toml")),
];

/// The recipe that is written where none is named: the pair of the method's paper.
const USUAL: &str = "qwen2.5-3b-7b";
/// The schema beside a run file.
const SCHEMA_FILE: &str = "gradtx.schema.json";

/// Which run file to write, and where.
#[derive(Debug, clap::Args)]
pub struct Job {
    /// The recipe to start from; --list shows all.
    #[arg(long, value_name = "NAME", default_value = USUAL)]
    recipe: String,
    /// Run file to write; it must not be there yet.
    #[arg(long, value_name = "FILE", default_value = "run.toml")]
    out: PathBuf,
    /// List the recipes: models, GPU hours as `plan` predicts them.
    #[arg(long, conflicts_with_all = ["recipe", "out", "schema"])]
    list: bool,
    /// Also write a JSON schema beside the run file, with which editors complete and check it.
    #[arg(long)]
    schema: bool,
}

/// Writes it, or lists the recipes.
pub(crate) fn run(context: &Context, job: &Job) -> Result<()> {
    if job.list {
        list(context);
        return Ok(());
    }
    let mut text = recipe(&job.recipe)?.to_string();
    let shown = job.out.display();
    if job.out.symlink_metadata().is_ok() {
        let hint = "name another file (--out), or remove this one";
        return Err(unusable_with(format!("{shown}: is there already"), Some(hint.into())));
    }
    let dir = job.out.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !dir.is_dir() {
        return Err(unusable(format!("{}: there is no such directory", dir.display())));
    }
    let mut files = vec![shown.to_string()];
    if job.schema {
        let path = dir.join(SCHEMA_FILE);
        let schema = serde_json::to_string_pretty(&schema())? + "\n";
        write(&path, &schema)?;
        files.push(path.display().to_string());
        text = format!("#:schema ./{SCHEMA_FILE}\n{text}");
    }
    write(&job.out, &text)?;
    context.ui.result_object("init", json!({ "recipe": job.recipe, "files": files }));
    if !context.ui.is_json() {
        context.ui.result(format!("init: {} of the recipe {}", files.join(" and "), job.recipe));
        context.ui.line(format!(
            "next: fetch models and data as its first lines say, then\n  gradtx doctor --run {shown}\n  \
             gradtx curate --run run --config {shown}"
        ));
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    Ok(write_atomic(path, |out| out.write_all(text.as_bytes()))?)
}

/// The text of a recipe.
fn recipe(name: &str) -> Result<&'static str> {
    let found = RECIPES.iter().find(|(known, _)| *known == name);
    found.map(|(_, text)| *text).ok_or_else(|| {
        let near = RECIPES.iter().map(|(known, _)| (osa_distance(name, known), known)).min();
        let hint = match near.filter(|(far, _)| *far <= 4) {
            Some((_, known)) => format!("did you mean {known}?"),
            None => "gradtx init --list shows all recipes".into(),
        };
        unusable_with(format!("--recipe {name}: there is no such recipe"), Some(hint))
    })
}

fn list(context: &Context) {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(["recipe", "what", "GPU hours"]);
    for (name, text) in RECIPES {
        let what = text.lines().next().unwrap_or_default().trim_start_matches("# ");
        let hours = hours(text).map_or_else(String::new, |hours| hours.to_string());
        table.add_row([name, what.trim_end_matches('.'), &hours]);
        context.ui.result_object("init", json!({ "recipe": name, "what": what, "gpu_hours": hours }));
    }
    if !context.ui.is_json() {
        context.ui.result(table.to_string());
    }
}

/// GPU hours as a recipe states them.
pub fn hours(text: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix("# GPU hours: "))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_of_the_folder_is_carried() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../recipes");
        let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        let mut files: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
        files.retain(|name| name.ends_with(".toml"));
        files.sort();
        let mut carried: Vec<String> = RECIPES.iter().map(|(name, _)| format!("{name}.toml")).collect();
        carried.sort();
        assert_eq!(files, carried);
        assert!(RECIPES.iter().any(|(name, _)| *name == USUAL));
        assert!(RECIPES.iter().all(|(_, text)| hours(text).is_some_and(|hours| hours > 0.0)));
    }
}
