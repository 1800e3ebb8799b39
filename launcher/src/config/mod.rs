//! The run file: every setting of the pipeline, checked.
//!
//! In: a TOML file and `--set key=value` overrides. Out: a [`Config`] whose values are
//! all in range, and `run.toml` in the run directory, which holds every setting as
//! resolved, defaults included. A run directory has one configuration: another one is
//! refused with the lines that differ, since its results would be mixed up.
//!
//! Paths are relative to the run file, or to the working directory in `--set`;
//! `run.toml` holds them as absolute paths.
//!
//! * settings: the settings and their defaults.
//! * preset: settings with a name.
//! * check: what values they may have.

mod check;
mod preset;
mod settings;

pub use settings::{
    AdapterConfig, AnswerForm, Config, CurateConfig, DataConfig, DeviceConfig, DeviceKind, DtypeKind,
    EvaluateConfig, FinetuneConfig, LossNormalization, Models, RANDOM_SUBSETS, Recipe, TrainConfig,
    TranslatorConfig, ValidationSplit,
};

use crate::args::RunArgs;
use crate::failure::{refused, unusable};
use anyhow::{Context, Result};
use std::fmt::Write as _;
use std::path::Path;
use toml::{Table, Value};

/// Name of the resolved configuration in a run directory.
pub const RUN_FILE: &str = "run.toml";

impl Config {
    /// The configuration of a run directory: resolved, checked, and stored there.
    ///
    /// The first time it comes from `--config` (or the defaults) and `--set`. Later it
    /// comes from the directory's run.toml; `--config` and `--set` may then only repeat
    /// what stands there.
    pub fn of_run(args: &RunArgs) -> Result<Self> {
        let config = Self::resolved(args)?;
        let stored = args.run.join(RUN_FILE);
        if !stored.is_file() {
            config.store(&stored)?;
        }
        Ok(config)
    }

    /// The same, without storing it.
    pub fn resolved(args: &RunArgs) -> Result<Self> {
        let stored = args.run.join(RUN_FILE);
        let before = if stored.is_file() { Some(Self::read(&stored)?) } else { None };
        let mut config = match (&args.config, &before) {
            (Some(path), _) => Self::read(path)?,
            (None, Some(before)) => before.clone(),
            (None, None) => Self::default(),
        };
        if let Some(preset) = args.preset {
            config = config.with_preset(preset);
        }
        config = config.with_overrides(&args.set)?;
        config.check()?;
        match before {
            Some(before) if before != config => {
                let what = format!("{}: this run has another configuration", stored.display());
                let hint = "results of two configurations do not mix: use another --run directory";
                Err(refused(what, diff(&before.table(), &config.table()), hint))
            }
            _ => Ok(config),
        }
    }

    /// Reads a run file. Unknown keys are errors.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("{}: cannot read", path.display()))?;
        let mut config: Self = toml::from_str(&text)
            .map_err(|e| unusable(format!("{}: {}", path.display(), e.to_string().trim_end())))?;
        let file = std::path::absolute(path)?;
        config.resolve_paths(file.parent().unwrap_or(Path::new("/")));
        Ok(config)
    }

    /// Makes relative paths absolute.
    fn resolve_paths(&mut self, base: &Path) {
        for place in [
            &mut self.models.tiny,
            &mut self.models.llm,
            &mut self.data.public,
            &mut self.adapter.start_tiny,
            &mut self.adapter.start_llm,
            &mut self.translator.pretrained,
        ] {
            if !place.as_os_str().is_empty() {
                *place = base.join(&*place);
            }
        }
    }

    fn with_overrides(self, set: &[String]) -> Result<Self> {
        if set.is_empty() {
            return Ok(self);
        }
        let mut table = self.table();
        for entry in set {
            let pair = entry.split_once('=').map(|(key, value)| (key.trim(), value.trim()));
            let (key, value) = pair.ok_or_else(|| unusable(format!("--set {entry}: expected KEY=VALUE")))?;
            // What is not a TOML value is a string without its quotes.
            let value = format!("v = {value}")
                .parse::<Table>()
                .ok()
                .and_then(|mut t| t.remove("v"))
                .unwrap_or_else(|| Value::String(value.into()));
            assign(&mut table, key, value).map_err(|why| unusable(format!("--set {entry}: {why}")))?;
        }
        let sets = set.join(" ");
        let mut config: Self = Value::Table(table).try_into().map_err(|e| {
            unusable(format!("--set {sets}: {}", e.to_string().trim_end().replace('\n', " ")))
        })?;
        config.resolve_paths(&std::env::current_dir()?);
        Ok(config)
    }

    fn table(&self) -> Table {
        Table::try_from(self).expect("a configuration has only values that TOML has")
    }

    fn store(&self, path: &Path) -> Result<()> {
        let dir = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(dir).with_context(|| format!("{}: cannot make", dir.display()))?;
        let text = toml::to_string(self).expect("a configuration has only values that TOML has");
        gradtx_runtime::artifact::write_atomic(path, |out| std::io::Write::write_all(out, text.as_bytes()))?;
        Ok(())
    }
}

/// Puts a value at a dotted key; the tables on the way must exist.
fn assign(table: &mut Table, key: &str, value: Value) -> std::result::Result<(), String> {
    let (section, name) = key.rsplit_once('.').map_or((None, key), |(s, n)| (Some(s), n));
    let mut at = table;
    for part in section.into_iter().flat_map(|s| s.split('.')) {
        at = match at.get_mut(part) {
            Some(Value::Table(inner)) => inner,
            _ => return Err(format!("there is no section `{part}`")),
        };
    }
    let Some(old) = at.get_mut(name) else {
        let known: Vec<&str> = at.keys().map(String::as_str).collect();
        return Err(format!("unknown key `{name}`, expected one of {}", known.join(", ")));
    };
    // A whole number is a fine value for a setting that is a real number.
    *old = match (&old, value) {
        (Value::Float(_), Value::Integer(i)) => Value::Float(i as f64),
        (_, value) => value,
    };
    Ok(())
}

/// The settings that differ, as lines `- key = before` and `+ key = now`.
pub fn diff(before: &Table, now: &Table) -> String {
    let (before, now) = (flat(before), flat(now));
    let mut lines = String::new();
    let mut keys: Vec<&String> = before.iter().chain(&now).map(|(key, _)| key).collect();
    keys.sort();
    keys.dedup();
    let find = |list: &[(String, String)], key: &String| {
        list.iter().find(|(k, _)| k == key).map(|(_, value)| value.clone())
    };
    for key in keys {
        let (old, new) = (find(&before, key), find(&now, key));
        if old != new {
            for (sign, value) in [('-', old), ('+', new)] {
                if let Some(value) = value {
                    let _ = writeln!(lines, "  {sign} {key} = {value}");
                }
            }
        }
    }
    lines
}

fn flat(table: &Table) -> Vec<(String, String)> {
    let mut out = vec![];
    for (key, value) in table {
        match value {
            Value::Table(inner) => {
                out.extend(flat(inner).into_iter().map(|(k, v)| (format!("{key}.{k}"), v)));
            }
            other => out.push((key.clone(), other.to_string())),
        }
    }
    out
}
