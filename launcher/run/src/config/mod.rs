//! The run file: every setting of the pipeline, checked.
//!
//! In: a TOML file and `--set key=value` overrides. Out: a [`Config`] whose values are
//! all in range, and `run.toml` in the run directory, which holds every setting as
//! resolved, defaults included. Settings may change from stage to stage ([`RunSettings`]):
//! every stage is tied to those that its result depends on, and to no others.
//!
//! Paths are relative to the run file, or to the working directory in `--set`;
//! `run.toml` holds them as absolute paths. They may change: a run whose files were moved
//! takes the new paths from `--config` or `--set`, and every stage compares contents.
//!
//! * settings: the settings, their defaults, and what values they may have.
//! * reference: what they mean, for people and editors.
//! * args: where a run and its settings are, as typed.
//! * client: those that a client needs.
//! * optimizer: the settings of an optimizer, as trainers take them.
//! * preset: settings with a name.
//! * aliases: what settings are called elsewhere.
//! * suggest: what a mistyped key may have meant.
//! * run_settings: those of a run directory, as a stage is given them.
//! * reuse: results of other runs.
//! * run_dir: what a directory is that was named as a run and is none.
//! * sweep: many run files from one.
//! * sharing: which results runs can share.

mod aliases;
mod args;
mod client;
mod optimizer;
mod preset;
mod reference;
mod reuse;
pub mod run_dir;
mod run_settings;
mod settings;
mod sharing;
mod suggest;
mod sweep;

pub use args::{PrivacyArgs, RunArgs};
pub use preset::Preset;
pub use reference::{defaults, explain, page, schema};
pub use reuse::ReuseConfig;
pub use run_settings::{RunSettings, is_reused};
pub use settings::{
    Accountant, AdapterConfig, AnswerForm, Config, CurateConfig, DataConfig, DataPaths, DeviceConfig,
    DeviceKind, DtypeKind, EmulatorConfig, EvaluateConfig, FinetuneConfig, Fisher, GroupBy, KindConfig,
    LossNormalization, MetricChoice, Models, PenaltyChoice, PenaltyRule, PrivacyConfig, ReadingInputs,
    Recipe, RefineConfig, RougeTokens, TargetModules, TrainConfig, TranslateConfig, TranslatorConfig,
    ValidationSplit,
};
pub use sweep::{SweptRun, read_sweep};

use settings::ALTERNATIVES;

use crate::failure::{refused, unusable, unusable_with};
use crate::record::make_dir;
use anyhow::Result;
use gradtx_runtime::artifact::{MAX_CONFIG_BYTES, read_regular_text};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Name of the resolved configuration in a run directory.
pub const RUN_FILE: &str = "run.toml";

impl Config {
    /// Reads a run file. Unknown keys are errors.
    pub fn read(path: &Path) -> Result<Self> {
        let text = read_regular_text(path, MAX_CONFIG_BYTES).map_err(|e| {
            let hint = "name a run file; `gradtx world` writes one to start from";
            let what = match path.is_dir() {
                true => format!("{}: is a directory, expected a run file (TOML)", path.display()),
                false => e.to_string(),
            };
            unusable_with(what, Some(hint.into()))
        })?;
        // For its errors, which name the line.
        toml::from_str::<Self>(&text).map_err(|e| {
            let known = Self::default().table();
            let hint = suggest::hint_for_file(&text, &known);
            unusable_with(format!("{}: {}", path.display(), plain(&e)), hint)
        })?;
        let mut table = Self::default().table();
        overlay(&mut table, text.parse()?);
        let mut config: Self = Value::Table(table).try_into()?;
        let file = std::path::absolute(path)?;
        config.resolve_paths(file.parent().unwrap_or(Path::new("/")));
        Ok(config)
    }

    /// The configuration that [`RunSettings::open`] would give, without touching the run directory.
    /// Here a run file takes the place of what the directory has.
    pub fn look(
        run: Option<&Path>,
        file: Option<&Path>,
        preset: Option<Preset>,
        set: &[String],
    ) -> Result<Self> {
        let stored = run.map(|run| (run, run.join(RUN_FILE)));
        let mut config = match (file, stored) {
            (Some(path), _) => Self::read(path)?,
            (None, Some((_, path))) if path.is_file() => Self::read(&path)?,
            (None, Some((run, _))) => return Err(run_dir::no_run(run)),
            (None, None) => {
                return Err(unusable("expected a run file (--config), or a run directory that has one"));
            }
        };
        if let Some(preset) = preset {
            config = config.with_preset(preset);
        }
        config = config.with_overrides(set)?;
        config.check()?;
        gradtx_models::ignore_fields(&config.models.ignore_fields);
        Ok(config)
    }

    /// The settings of a command that has no run: those of a run file, if one is given, and
    /// overrides of the section `[data]`.
    pub fn for_data(file: Option<&Path>, set: &[String]) -> Result<Self> {
        if let Some(other) = set.iter().find(|entry| !entry.trim_start().starts_with("data.")) {
            return Err(unusable(format!("--set {other}: only settings of [data] have an effect here")));
        }
        let config = file.map_or_else(|| Ok(Self::default()), Self::read)?;
        let config = config.with_overrides(set)?;
        config.check()?;
        Ok(config)
    }

    /// Every setting that is a path.
    fn places(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        [
            &mut self.models.tiny,
            &mut self.models.llm,
            &mut self.lora.init_adapter_tiny,
            &mut self.lora.init_adapter_llm,
            &mut self.translator.pretrained_path,
            &mut self.reuse.tuples,
            &mut self.reuse.translator,
        ]
        .into_iter()
        .chain(self.data.public.as_mut_slice())
    }

    /// Makes relative paths absolute.
    fn resolve_paths(&mut self, base: &Path) {
        for place in self.places().filter(|place| !place.as_os_str().is_empty()) {
            *place = base.join(&*place);
        }
    }

    /// With every path that is set replaced by the same word.
    fn without_places(&self) -> Self {
        let mut config = self.clone();
        config.places().filter(|place| !place.as_os_str().is_empty()).for_each(|place| *place = "set".into());
        // Whether a model may be read, never what is computed with it.
        config.models.ignore_fields.clear();
        config
    }

    /// With settings in the form `section.key=value` in the place of its own; not checked.
    pub fn with_overrides(self, set: &[String]) -> Result<Self> {
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
            let hint = suggest::hint(key, Some(&value), &table);
            assign(&mut table, key, value)
                .map_err(|why| unusable_with(format!("--set {entry}: {why}"), hint))?;
        }
        let sets = set.join(" ");
        let mut config: Self = Value::Table(table)
            .try_into()
            .map_err(|e| unusable(format!("--set {sets}: {}", plain(&e).replace('\n', " "))))?;
        config.resolve_paths(&std::env::current_dir()?);
        Ok(config)
    }

    fn table(&self) -> Table {
        Table::try_from(self).expect("a configuration has only values that TOML has")
    }

    /// Whether a run directory has no configuration yet; fails if it has another one.
    pub fn is_new_in(&self, run: &Path) -> Result<bool> {
        let stored = run.join(RUN_FILE);
        if !stored.is_file() {
            return Ok(true);
        }
        let before = Self::read(&stored)?;
        let mut wanted = self.clone();
        if wanted.data.date.is_empty() {
            wanted.data.date = before.data.date.clone();
        }
        // What `auto` takes is decided by every stage; a directory that names a device keeps it.
        if wanted.device.kind == DeviceKind::Auto {
            wanted.device = before.device.clone();
        }
        // Filled in by the first stage that uses them.
        if wanted.reuse.tuples == before.reuse.tuples {
            wanted.reuse.tuples_checksum.clone_from(&before.reuse.tuples_checksum);
        }
        if wanted.reuse.translator == before.reuse.translator {
            wanted.reuse.translator_checksum.clone_from(&before.reuse.translator_checksum);
        }
        if before == wanted {
            return Ok(false);
        }
        let what = format!("{}: this run has another configuration", stored.display());
        let hint = "remove the run's directory to start over, or give the sweep another directory";
        Err(refused(what, diff(&before.table(), &self.table()), hint))
    }

    /// Writes all settings to a file.
    pub fn store(&self, path: &Path) -> Result<()> {
        let dir = path.parent().unwrap_or(Path::new("."));
        make_dir(dir)?;
        let text = toml::to_string(self).expect("a configuration has only values that TOML has");
        gradtx_runtime::artifact::write_atomic(path, |out| std::io::Write::write_all(out, text.as_bytes()))?;
        Ok(())
    }
}

/// An error in the words of a person who writes run files.
fn plain(error: &impl std::fmt::Display) -> String {
    let types = [
        ("expected usize", "expected a whole number"),
        ("expected u64", "expected a whole number"),
        ("expected u32", "expected a whole number"),
        ("expected f64", "expected a number"),
    ];
    let text = error.to_string().trim_end().to_string();
    types.iter().fold(text, |text, (from, to)| text.replace(from, to))
}

/// Puts the values of a file in the place of defaults. Keys are known, types are right.
fn overlay(table: &mut Table, file: Table) {
    for [one, other] in ALTERNATIVES.into_iter().flat_map(|[a, b]| [[a, b], [b, a]]) {
        let is_set = |name| file.get(name).is_some_and(|value| !is_zero(value));
        if is_set(one) && !file.contains_key(other) {
            unset(table, other);
        }
    }
    for (key, value) in file {
        match (table.get_mut(&key), value) {
            (Some(Value::Table(inner)), Value::Table(file)) => overlay(inner, file),
            (_, value) => _ = table.insert(key, value),
        }
    }
}

fn is_zero(value: &Value) -> bool {
    value.as_integer() == Some(0) || value.as_float() == Some(0.0)
}

/// Sets a number to 0: another setting takes its place.
fn unset(table: &mut Table, name: &str) {
    match table.get_mut(name) {
        Some(Value::Integer(value)) => *value = 0,
        Some(Value::Float(value)) => *value = 0.0,
        _ => {}
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
    if let Value::Table(inner) = old {
        let known: Vec<&str> = inner.keys().map(String::as_str).collect();
        return Err(format!("`{key}` is a section; set one of its keys: {}", known.join(", ")));
    }
    // A whole number is a fine value for a setting that is a real number.
    *old = match (&old, value) {
        (Value::Float(_), Value::Integer(i)) => Value::Float(i as f64),
        // A date needs no quotes.
        (Value::String(_), Value::Datetime(date)) => Value::String(date.to_string()),
        (_, value) => value,
    };
    let is_set = !is_zero(old);
    let other = ALTERNATIVES.into_iter().find_map(|[a, b]| match name {
        _ if name == a => Some(b),
        _ if name == b => Some(a),
        _ => None,
    });
    if let Some(other) = other.filter(|_| is_set) {
        unset(at, other);
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn read(text: &str) -> Result<Config> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        std::fs::write(&path, text).unwrap();
        let config = Config::read(&path)?;
        config.check()?;
        Ok(config)
    }

    #[test]
    fn defaults_hold_for_what_a_file_leaves_out() {
        let config = read("[finetune.tiny]\nlearning_rate = 1e-3\n[curate]\nllm.weight_decay = 0\n").unwrap();
        let mut wanted = Config::default();
        wanted.finetune.tiny.learning_rate = 1e-3;
        wanted.curate.llm.weight_decay = 0.0;
        assert_eq!(config, wanted);
        assert_eq!((config.finetune.tiny.max_steps, config.curate.llm.max_steps), (1250, 87));
    }

    #[test]
    fn epochs_take_the_place_of_steps_and_back() {
        let steps = |config: &Config| (config.train.max_steps, config.train.num_train_epochs);
        let by_epochs = read("[train]\nnum_train_epochs = 30\n").unwrap();
        assert_eq!(steps(&by_epochs), (0, 30.0));
        // 300 subsets of 13 tuples, 15 of them held out.
        assert_eq!(by_epochs.expected().train.max_steps, (30 * 285 * 13u32).div_ceil(32));
        let set = |config: &Config, set: &str| config.clone().with_overrides(&[set.into()]).unwrap();
        assert_eq!(steps(&set(&by_epochs, "train.max_steps=7")), (7, 0.0));
        assert_eq!(steps(&set(&Config::default(), "train.num_train_epochs=2")), (0, 2.0));
        let warm = read("[train]\nwarmup_ratio = 0.1\n").unwrap();
        assert_eq!((warm.train.warmup_steps, warm.expected().train.warmup_steps), (0, 366));
        for (text, words) in [
            ("[train]\nmax_steps = 3\nnum_train_epochs = 2\n", "max_steps = 3 and num_train_epochs = 2"),
            ("[train]\nmax_steps = 0\n", "train.max_steps = 0"),
            ("[finetune.llm]\nwarmup_steps = 3\nwarmup_ratio = 0.5\n", "finetune.llm: warmup_steps = 3"),
            ("[curate.tiny]\nnum_train_epochs = 0.1\n", "curate.tiny.max_steps = 7: the snapshots reach 13"),
        ] {
            let said = read(text).unwrap_err().to_string();
            assert!(said.contains(words), "{text}: {said}");
        }
    }

    #[test]
    fn data_paths_are_one_or_several_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        for (text, names) in [("\"a.jsonl\"", vec!["a.jsonl"]), ("[\"a\", \"b\"]", vec!["a", "b"])] {
            let text = format!("[data]\npublic = {text}\nformat = \"drop\"\ninstruction = \"none\"\n");
            std::fs::write(&path, text).unwrap();
            let config = Config::read(&path).unwrap();
            let wanted: Vec<PathBuf> = names.iter().map(|name| dir.path().join(name)).collect();
            assert_eq!(config.data.public.as_slice(), wanted);
            config.store(&path).unwrap();
            assert_eq!(Config::read(&path).unwrap(), config);
        }
        for (text, word) in [("public = 3", "list of paths"), ("format = \"gsm9k\"", "commonsense_qa")] {
            std::fs::write(&path, format!("[data]\n{text}\n")).unwrap();
            let message = Config::read(&path).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
        let set = ["curate.dirichlet_alpha=0.5".to_string()];
        let message = Config::default().with_overrides(&set).unwrap().check().unwrap_err().to_string();
        assert!(message.contains("curate.group_by"), "{message}");
    }
}
