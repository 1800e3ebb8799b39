//! Many runs from one file: every combination of the values that are listed.
//!
//! In: a TOML file of `[[sweep]]` tables. Each has a `base` run file, perhaps a `name` and a
//! `preset`, and settings as in a run file. A setting with a list of values is varied; one
//! with a single value is the same in all runs of the table. A value may be a table of
//! settings that go together, with a `name` for them:
//!
//! ```toml
//! [[sweep]]
//! base = "run.toml"
//! train.learning_rate = [2e-5, 4e-5]
//! models = [
//!     { name = "3b-7b", tiny = "/models/3b", llm = "/models/7b" },
//!     { name = "7b-14b", tiny = "/models/7b", llm = "/models/14b" },
//! ]
//! ```
//!
//! Out: a [`SweptRun`] for each combination, with a name that says what is varied, such as
//! `learning_rate=0.00002,models=3b-7b`. Names are the same every time, differ also for file systems
//! that ignore case, and have no characters that a shell or a file system takes amiss.
//! Paths are relative to the sweep file, those in a base file to that file.

use super::{Config, Preset, Table, Value, assign, suggest};
use crate::failure::unusable;
use anyhow::{Context, Result};
use clap::ValueEnum;
use gradtx_kernels::rng::derive_named;
use gradtx_runtime::artifact::{MAX_CONFIG_BYTES, read_regular_text};
use serde::Deserialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// One run of a sweep.
#[derive(Clone, Debug, PartialEq)]
pub struct SweptRun {
    /// Its name, and that of its directory.
    pub name: String,
    /// Which `[[sweep]]` table it is of, from 1.
    pub entry: usize,
    /// The settings that are varied, with this run's values.
    pub settings: Vec<(String, Value)>,
    /// All settings.
    pub config: Config,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    sweep: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    base: PathBuf,
    name: Option<String>,
    preset: Option<String>,
    #[serde(flatten)]
    settings: Table,
}

/// A setting with the values that it takes, and what these are called.
struct Varied {
    key: String,
    values: Vec<(String, Value)>,
}

/// Longest name of a run, in bytes; file systems allow 255.
const LONGEST: usize = 200;
/// Runs of one file.
const MOST: usize = 10_000;

/// Reads a sweep file: all of its runs, each checked.
///
/// # Errors
/// Names the file and the table for unknown keys and sections, values of a wrong type or
/// out of range, two runs with the same settings, and names that cannot be distinguished.
pub fn read_sweep(path: &Path) -> Result<Vec<SweptRun>> {
    let shown = path.display();
    let text = read_regular_text(path, MAX_CONFIG_BYTES).map_err(|error| unusable(error.to_string()))?;
    let file: File =
        toml::from_str(&text).map_err(|e| unusable(format!("{shown}: {}", e.to_string().trim_end())))?;
    let absolute = std::path::absolute(path)?;
    let dir = absolute.parent().unwrap_or(Path::new("/"));
    let mut runs: Vec<SweptRun> = vec![];
    for (i, entry) in file.sweep.iter().enumerate() {
        let name = entry.name.as_ref().map_or(String::new(), |name| format!(" (`{name}`)"));
        let place = format!("{shown}: sweep {}{name}", i + 1);
        runs.extend(entry.runs(i + 1, dir).map_err(|why| unusable(format!("{place}: {why:#}")))?);
        if runs.len() > MOST {
            return Err(unusable(format!("{place}: more than {MOST} runs")));
        }
    }
    distinguish(&runs).map_err(|why| unusable(format!("{shown}: {why}")))?;
    Ok(runs)
}

impl Entry {
    fn runs(&self, entry: usize, dir: &Path) -> Result<Vec<SweptRun>> {
        let (base, name) = (self.base_config(dir)?, self.first_part()?);
        let mut varied = vec![];
        let mut fixed = vec![];
        collect("", &self.settings, &mut varied, &mut fixed)?;
        let short = short_keys(varied.iter().map(|v| v.key.as_str()).collect());
        let count: usize = varied.iter().map(|v| v.values.len()).fold(1, usize::saturating_mul);
        anyhow::ensure!(count <= MOST, "{count} combinations are more than {MOST}");
        let mut runs = Vec::with_capacity(count);
        for number in 0..count {
            // The last key's value changes fastest.
            let (mut rest, mut chosen) = (number, vec![]);
            for (v, short) in varied.iter().zip(&short).rev() {
                chosen.push((v, short, &v.values[rest % v.values.len()]));
                rest /= v.values.len();
            }
            chosen.reverse();
            let settings: Vec<(String, Value)> =
                chosen.iter().map(|(v, _, (_, value))| (v.key.clone(), value.clone())).collect();
            let all = fixed.iter().chain(&settings);
            let config = apply(&base, all, dir)?;
            let mut parts: Vec<String> =
                chosen.iter().map(|(_, short, (label, _))| format!("{short}={label}")).collect();
            parts.sort();
            let parts = name.iter().cloned().chain(parts).collect::<Vec<_>>();
            let name = if parts.is_empty() { self.stem() } else { parts.join(",") };
            runs.push(SweptRun { name: shortened(name), entry, settings, config });
        }
        Ok(runs)
    }

    /// The base run file with the preset.
    fn base_config(&self, dir: &Path) -> Result<Config> {
        let config = Config::read(&dir.join(&self.base))?;
        match &self.preset {
            None => Ok(config),
            Some(name) => {
                let preset = Preset::from_str(name, false).map_err(|why| anyhow::anyhow!("preset: {why}"))?;
                Ok(config.with_preset(preset))
            }
        }
    }

    fn first_part(&self) -> Result<Option<String>> {
        self.name.as_deref().map(|name| checked_name(name).map(String::from)).transpose()
    }

    fn stem(&self) -> String {
        safe(&self.base.file_stem().unwrap_or_default().to_string_lossy())
    }
}

/// The base with other values at these keys.
fn apply<'a>(
    base: &Config,
    settings: impl Iterator<Item = &'a (String, Value)>,
    dir: &Path,
) -> Result<Config> {
    let mut table = base.table();
    for (key, value) in settings {
        let mut leaves = vec![];
        match value {
            Value::Table(inner) => flatten(key, inner, &mut leaves),
            other => leaves.push((key.clone(), other.clone())),
        }
        for (key, value) in leaves {
            let hint = suggest::hint(&key, Some(&value), &table)
                .map_or_else(String::new, |hint| format!("; {hint}"));
            assign(&mut table, &key, value).map_err(|why| anyhow::anyhow!("{key}: {why}{hint}"))?;
        }
    }
    let mut config: Config = Value::Table(table).try_into().map_err(|e: toml::de::Error| {
        let why = e.to_string().trim_end().replace('\n', " ");
        anyhow::anyhow!("{why}; a setting that is itself a list is varied by a list of lists")
    })?;
    config.resolve_paths(dir);
    config.check()?;
    Ok(config)
}

/// The settings of a table that go together, without its name.
fn flatten(at: &str, table: &Table, out: &mut Vec<(String, Value)>) {
    for (key, value) in table.iter().filter(|(key, _)| *key != "name") {
        match value {
            Value::Table(inner) => flatten(&format!("{at}.{key}"), inner, out),
            other => out.push((format!("{at}.{key}"), other.clone())),
        }
    }
}

/// Finds the settings of a table and those below it.
fn collect(
    at: &str,
    table: &Table,
    varied: &mut Vec<Varied>,
    fixed: &mut Vec<(String, Value)>,
) -> Result<()> {
    for (key, value) in table {
        let key = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
        match value {
            Value::Table(inner) => collect(&key, inner, varied, fixed)?,
            Value::Array(values) => {
                let labels = labels(values).with_context(|| key.clone())?;
                varied.push(Varied { key, values: labels.into_iter().zip(values.clone()).collect() });
            }
            other => fixed.push((key, other.clone())),
        }
    }
    Ok(())
}

/// What the values of a list are called: different for each.
fn labels(values: &[Value]) -> Result<Vec<String>> {
    anyhow::ensure!(!values.is_empty(), "a list of values that has none");
    if let Some(twice) = values.iter().enumerate().find(|(i, v)| values[..*i].contains(v)) {
        anyhow::bail!("the value {} is listed twice", twice.1);
    }
    // As many last parts of paths as it takes to distinguish them.
    let mut found = vec![];
    for parts in 1..=4 {
        found = values.iter().map(|value| label(value, parts)).collect::<Result<Vec<_>>>()?;
        if distinct(&found) {
            return Ok(found);
        }
    }
    let numbered = |(value, label): (&Value, String)| {
        format!("{label}-{:04x}", derive_named(0, &value.to_string()) & 0xffff)
    };
    let numbered: Vec<String> = values.iter().zip(found).map(numbered).collect();
    anyhow::ensure!(distinct(&numbered), "its values are ambiguous; give them names");
    Ok(numbered)
}

fn distinct(labels: &[String]) -> bool {
    let lower: Vec<String> = labels.iter().map(|label| label.to_lowercase()).collect();
    lower.iter().enumerate().all(|(i, label)| !lower[..i].contains(label))
}

/// What a value is called; of a path, its last `parts` components.
fn label(value: &Value, parts: usize) -> Result<String> {
    Ok(match value {
        Value::Table(table) => match table.get("name") {
            Some(Value::String(name)) => checked_name(name)?.into(),
            Some(other) => anyhow::bail!("name = {other}: expected a string"),
            None => {
                let inner = table.values().map(|v| label(v, parts)).collect::<Result<Vec<_>>>()?;
                inner.join("+")
            }
        },
        Value::Array(inner) => inner.iter().map(|v| label(v, parts)).collect::<Result<Vec<_>>>()?.join("+"),
        Value::String(text) if text.contains('/') => {
            let path = Path::new(text).with_extension("");
            let all: Vec<String> = path.iter().map(|part| part.to_string_lossy().into_owned()).collect();
            safe(&all[all.len().saturating_sub(parts)..].join("-"))
        }
        Value::String(text) => safe(text),
        // As Rust prints it: without an exponent, and whole numbers without a point.
        Value::Float(number) => safe(&number.to_string()),
        other => safe(&other.to_string()),
    })
}

/// A text with nothing in it that a shell or a file system takes amiss.
fn safe(text: &str) -> String {
    let kept = |c: char| if c.is_ascii_alphanumeric() || "._+-".contains(c) { c } else { '-' };
    let text: String = text.chars().map(kept).collect();
    let text = text.trim_start_matches('.');
    if text.is_empty() { "none".into() } else { text.into() }
}

/// A name that a person gave.
fn checked_name(name: &str) -> Result<&str> {
    let fine = !name.is_empty() && safe(name) == name && !name.starts_with('-');
    anyhow::ensure!(fine, "name = \"{name}\": expected letters, digits, `.`, `_`, `+` and `-`");
    Ok(name)
}

/// The last parts of keys, as few as it takes to distinguish them.
fn short_keys(keys: Vec<&str>) -> Vec<String> {
    let last = |key: &str, parts: usize| {
        let all: Vec<&str> = key.split('.').collect();
        all[all.len().saturating_sub(parts)..].join(".")
    };
    let short = |key: &&str| {
        let alone = |parts: &usize| {
            let mine = last(key, *parts);
            keys.iter().filter(|other| last(other, *parts) == mine).count() == 1
        };
        let parts = (1..=key.split('.').count()).find(alone).unwrap_or(usize::MAX);
        last(key, parts)
    };
    keys.iter().map(short).collect()
}

/// A name that is not too long for a file system: the end of a long one becomes its hash.
fn shortened(name: String) -> String {
    if name.len() <= LONGEST {
        return name;
    }
    // All characters are ASCII.
    format!("{}-{:016x}", &name[..LONGEST - 17], derive_named(0, &name))
}

/// Fails if two runs have one name, or are the same run.
fn distinguish(runs: &[SweptRun]) -> std::result::Result<(), String> {
    let mut names: HashMap<String, &SweptRun> = HashMap::new();
    let mut configs: HashMap<String, &SweptRun> = HashMap::new();
    for run in runs {
        if let Some(other) = names.insert(run.name.to_lowercase(), run) {
            return Err(format!(
                "sweeps {} and {} both have a run `{}`; give one of them a `name`",
                other.entry, run.entry, run.name
            ));
        }
        let text = run.config.table().to_string();
        if let Some(other) = configs.insert(text, run) {
            return Err(format!("`{}` and `{}` have the same settings", other.name, run.name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs of a sweep file beside a run file with `seed = 7`, or the error.
    fn read(text: &str) -> std::result::Result<Vec<SweptRun>, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("base")).unwrap();
        std::fs::write(dir.path().join("base/run.toml"), "seed = 7\n[data]\npublic = \"p.jsonl\"\n").unwrap();
        let file = dir.path().join("sweep.toml");
        std::fs::write(&file, text).unwrap();
        read_sweep(&file).map_err(|e| format!("{e:#}"))
    }

    fn names(text: &str) -> Vec<String> {
        read(text).unwrap().into_iter().map(|run| run.name).collect()
    }

    const BASE: &str = "[[sweep]]\nbase = \"base/run.toml\"\n";

    #[test]
    fn every_combination_has_a_run_with_a_readable_name() {
        let text = format!(
            "{BASE}curate.num_subsets = 50\ntrain.learning_rate = [1e-3, 2e-5]\n\
             models = [{{ name = \"3b-7b\", tiny = \"m/3b\", llm = \"m/7b\" }}, {{ tiny = \"/m/7b\", llm = \"/m/14b\" }}]\n"
        );
        let runs = read(&text).unwrap();
        let names: Vec<&str> = runs.iter().map(|r| r.name.as_str()).collect();
        let want = [
            "learning_rate=0.001,models=3b-7b",
            "learning_rate=0.00002,models=3b-7b",
            "learning_rate=0.001,models=14b+7b",
            "learning_rate=0.00002,models=14b+7b",
        ];
        assert_eq!(names, want);
        let [first, .., last] = &runs[..] else { panic!("four runs") };
        assert_eq!(
            (first.config.seed, first.config.curate.num_subsets, first.config.train.learning_rate),
            (7, 50, 1e-3)
        );
        assert!(first.config.models.tiny.is_absolute() && first.config.models.tiny.ends_with("m/3b"));
        assert_eq!(last.config.models.llm, PathBuf::from("/m/14b"));
        // A base file's paths are relative to the base file.
        assert!(first.config.table()["data"]["public"].as_str().unwrap().ends_with("base/p.jsonl"));
        let keys: Vec<&str> = first.settings.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, ["models", "train.learning_rate"]);
        assert_eq!(
            read(&text).unwrap().iter().map(|r| &r.name).collect::<Vec<_>>(),
            runs.iter().map(|r| &r.name).collect::<Vec<_>>()
        );
    }

    #[test]
    fn keys_and_values_are_distinguished() {
        let two = format!(
            "{BASE}train.learning_rate = [0.1, 1]\ncurate.tiny.learning_rate = [0.5]\ncurate.llm.learning_rate = [0.25]\n"
        );
        assert_eq!(names(&two)[0], "llm.learning_rate=0.25,tiny.learning_rate=0.5,train.learning_rate=0.1");
        let paths = format!("{BASE}data.public = [\"gsm8k/public.jsonl\", \"drop/public.jsonl\"]\n");
        assert_eq!(names(&paths), ["public=gsm8k-public", "public=drop-public"]);
        let lists = format!("{BASE}lora.target_modules = [[\"q_proj\"], [\"q_proj\", \"v_proj\"]]\n");
        assert_eq!(names(&lists), ["target_modules=q_proj", "target_modules=q_proj+v_proj"]);
        let odd = format!("{BASE}curate.group_by = [\"a b\", \"a?b\", \"A-B\"]\n");
        let odd = names(&odd);
        assert!(
            odd.iter().all(|n| n.chars().all(|c| c.is_ascii_alphanumeric() || "._+-=,".contains(c))),
            "{odd:?}"
        );
        assert!(distinct(&odd), "{odd:?}");
        let dots = format!("{BASE}curate.group_by = [\"..\", \"../..\"]\n");
        assert!(names(&dots).iter().all(|n| !n.contains("=.")), "{:?}", names(&dots));
    }

    #[test]
    fn names_of_tables_and_of_the_base_file_are_used() {
        assert_eq!(names(BASE), ["run"]);
        let named =
            format!("{BASE}name = \"paper\"\npreset = \"paper\"\n{BASE}name = \"ours\"\nseed = [1, 2]\n");
        assert_eq!(names(&named), ["paper", "ours,seed=1", "ours,seed=2"]);
        let runs = read(&named).unwrap();
        assert_eq!((runs[0].config.translator.update_normalization.name(), runs[2].entry), ("none", 2));
    }

    #[test]
    fn long_names_are_cut_and_stay_different() {
        let long = "x".repeat(300);
        let found = names(&format!("{BASE}curate.group_by = [\"{long}a\", \"{long}b\"]\n"));
        assert!(found.iter().all(|n| n.len() <= LONGEST));
        assert_ne!(found[0], found[1]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_sweep() {
        let cases = [
            (
                format!("{BASE}name = \"b\"\ntrain.learning_rat = [1, 2]\n"),
                vec!["sweep 1 (`b`)", "learning_rat", "did you mean `train.learning_rate`?"],
            ),
            (format!("{BASE}{BASE}seed = [2]\ntrian.lr = 0.1\n"), vec!["sweep 2", "trian"]),
            (format!("{BASE}models = [{{ tinny = \"x\" }}]\n"), vec!["sweep 1", "tinny"]),
            (format!("{BASE}train.learning_rate = [0.1, \"fast\"]\n"), vec!["sweep 1", "fast"]),
            (format!("{BASE}train.learning_rate = [0.1, -1]\n"), vec!["sweep 1", "train.learning_rate"]),
            (format!("{BASE}train.learning_rate = []\n"), vec!["train.learning_rate", "none"]),
            (format!("{BASE}train.learning_rate = [0.1, 0.1]\n"), vec!["train.learning_rate", "twice"]),
            (format!("{BASE}train.learning_rate = [1, 1.0]\n"), vec!["same settings"]),
            (format!("{BASE}lora.target_modules = [\"q_proj\"]\n"), vec!["list of lists"]),
            (format!("{BASE}name = \"a/b\"\n"), vec!["a/b", "letters"]),
            (format!("{BASE}preset = \"mine\"\n"), vec!["preset"]),
            (format!("{BASE}{BASE}"), vec!["sweeps 1 and 2", "`name`"]),
            (format!("{BASE}{BASE}name = \"b\"\n"), vec!["same settings"]),
            ("[[sweep]]\nbase = \"none.toml\"\n".into(), vec!["none.toml"]),
            ("[[sweep]]\nseed = [1]\n".into(), vec!["base"]),
            ("[[sweeps]]\n".into(), vec!["sweeps"]),
        ];
        for (text, wanted) in cases {
            let error = read(&text).expect_err(&text);
            for want in wanted {
                assert!(error.contains(want), "no `{want}` in: {error}\n{text}");
            }
        }
    }

    #[test]
    fn too_many_combinations_are_refused_at_once() {
        let many: Vec<String> = (0..200).map(|i| i.to_string()).collect();
        let many = many.join(", ");
        let text =
            format!("{BASE}seed = [{many}]\ntrain.max_steps = [{many}]\ncurate.num_subsets = [{many}]\n");
        assert!(read(&text).unwrap_err().contains("8000000"));
    }
}
