//! Several runs side by side: the settings that differ, what their models score, and what it
//! took.
//!
//! In: run directories, finished or not. Out: [`Comparison`]. The settings of tuples and
//! translator are those that their records have, wherever a run has them from. Runs of other models or
//! other test data can be compared; that they are is noted.

mod rows;

use crate::cost::{Cost, of_curation, of_training};
use crate::table::{Entry, Table, collect};
use anyhow::Result;
use gradtx_pipeline::records::{CurateInputs, TrainInputs};
use gradtx_run::config::run_dir::no_run;
use gradtx_run::config::{Config, RUN_FILE};
use gradtx_run::record::{self, RECORD_FILE};
use gradtx_run::role::Role;
use gradtx_run::stage::Inputs;
use gradtx_runtime::artifact::read_json;
use gradtx_runtime::data::Metric;
use serde::Serialize;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Settings that are of a place or a day, and of no result.
const PLACES: [&str; 3] = ["reuse.", "models.ignore_fields", "data.date"];

/// Runs side by side.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The runs, in the order in which they were named.
    pub runs: Vec<ComparedRun>,
    /// The settings that are not the same in all runs, by their keys.
    pub settings: Vec<Setting>,
    /// What deserves attention.
    pub notes: Vec<String>,
}

/// A setting that differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Setting {
    /// Its key, as in a run file.
    pub key: String,
    /// Its value in every run.
    pub values: Vec<Option<String>>,
}

/// One of the runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ComparedRun {
    /// Name of its directory, as short as it takes to distinguish the runs.
    pub name: String,
    /// Fingerprints of TinyLM and LLM, where the run has tuples.
    pub models: Option<[String; 2]>,
    /// Relative error of translated updates of subsets that were held out, at the best step.
    pub relative_error: Option<f64>,
    /// What the models score that the translator made: an entry for each metric and model. Where there are
    /// none, those of the fine-tuned models alone.
    pub scores: Vec<ComparedScore>,
    /// What curation took.
    pub curation: Option<Cost>,
    /// How many of the runs use the same tuples.
    pub curation_shared_by: usize,
    /// What training took.
    pub training: Option<Cost>,
    /// Checksums of the test data.
    #[serde(skip)]
    data: BTreeSet<String>,
    /// Directory of the tuples.
    #[serde(skip)]
    tuples: PathBuf,
}

/// A model's score. All of them are in percent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ComparedScore {
    /// What was measured.
    pub metric: Metric,
    /// What a reader calls the model; none where only the fine-tuned models were scored.
    pub model: Option<String>,
    /// Mean over clients.
    pub score: Option<f64>,
    /// Half the width of its 95 % confidence interval over clients.
    pub interval: Option<f64>,
    /// Performance gap recovered.
    pub pgr: Option<f64>,
    /// Half the width of its 95 % confidence interval.
    pub pgr_interval: Option<f64>,
    /// The fine-tuned TinyLM's mean.
    pub p_s: Option<f64>,
    /// The mean of the LLM that was fine-tuned on the private data.
    pub p_t: Option<f64>,
    /// Clients with a score of the model.
    pub clients: usize,
}

impl Comparison {
    /// Reads what there is of these runs.
    ///
    /// # Errors
    /// For a directory that is no run; for settings that cannot be read.
    pub fn of(dirs: &[PathBuf]) -> Result<Self> {
        let configs = dirs.iter().map(|dir| effective(dir)).collect::<Result<Vec<_>>>()?;
        let mut notes = vec![];
        let mut runs: Vec<ComparedRun> = vec![];
        for ((dir, config), name) in dirs.iter().zip(&configs).zip(names(dirs)) {
            runs.push(ComparedRun::of(dir, config, name, &mut notes));
        }
        let tuples: Vec<PathBuf> = runs.iter().map(|run| run.tuples.clone()).collect();
        for run in &mut runs {
            run.curation_shared_by = tuples.iter().filter(|dir| **dir == run.tuples).count();
        }
        notes.extend(of_different_worlds(&runs));
        Ok(Self { settings: differing(&configs), runs, notes })
    }

    /// Rank hours of all runs together, with every curation once, as far as they are recorded.
    pub fn rank_hours(&self) -> f64 {
        let mut seen: BTreeSet<&Path> = BTreeSet::new();
        let curation = |run: &'_ ComparedRun| run.curation.as_ref().map_or(0.0, |cost| cost.rank_hours);
        let training = |run: &ComparedRun| run.training.as_ref().map_or(0.0, |cost| cost.rank_hours);
        let curated: f64 = self.runs.iter().filter(|run| seen.insert(&run.tuples)).map(curation).sum();
        curated + self.runs.iter().map(training).sum::<f64>()
    }

    /// Whether all that is recorded was computed on GPUs.
    pub(crate) fn is_on_gpus(&self) -> bool {
        let costs = self.runs.iter().flat_map(|run| [&run.curation, &run.training]).flatten();
        let costs: Vec<&Cost> = costs.collect();
        !costs.is_empty() && costs.iter().all(|cost| cost.on_gpus)
    }
}

/// The settings of a run, those of its tuples and its translator as their records have them.
fn effective(dir: &Path) -> Result<Config> {
    let path = dir.join(RUN_FILE);
    if !path.is_file() {
        return Err(no_run(dir));
    }
    let mut config = Config::read(&path)?;
    if let Some(made) = inputs::<CurateInputs>(&config.reuse.tuples_dir(dir)) {
        config.curate = made.curate;
    }
    if let Some(made) = inputs::<TrainInputs>(&config.reuse.translator_dir(dir)) {
        config.train = made.train;
        // Where the weights lie that it started from is not recorded.
        let pretrained = std::mem::take(&mut config.translator.pretrained_path);
        config.translator = made.translator;
        config.translator.pretrained_path = pretrained;
    }
    Ok(config)
}

fn inputs<I: Inputs>(dir: &Path) -> Option<I> {
    // A record that cannot be read is noted with the run.
    record::read(&dir.join(RECORD_FILE)).ok()?.inputs(dir).ok().flatten()
}

/// As many last parts of paths as it takes to distinguish them.
fn names(dirs: &[PathBuf]) -> Vec<String> {
    let absolute: Vec<PathBuf> =
        dirs.iter().map(|dir| dir.canonicalize().unwrap_or_else(|_| dir.clone())).collect();
    let last = |dir: &PathBuf, parts: usize| -> String {
        let all: Vec<_> = dir.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        all[all.len().saturating_sub(parts)..].join("/")
    };
    let at = |parts: usize| absolute.iter().map(|dir| last(dir, parts)).collect::<Vec<_>>();
    let distinct = |names: &[String]| names.iter().collect::<BTreeSet<_>>().len() == names.len();
    (1..=8).map(at).find(|names| distinct(names)).unwrap_or_else(|| at(1))
}

/// The settings that are not the same in all runs.
fn differing(configs: &[Config]) -> Vec<Setting> {
    let all: Vec<BTreeMap<String, String>> =
        configs.iter().map(|config| record::leaves(&json!(config))).collect();
    let keys: BTreeSet<&String> = all.iter().flat_map(BTreeMap::keys).collect();
    let keys = keys.into_iter().filter(|key| !PLACES.iter().any(|place| key.starts_with(place)));
    let of = |key: &String| all.iter().map(|settings| settings.get(key).cloned()).collect::<Vec<_>>();
    keys.map(|key| (key, of(key)))
        .filter(|(_, values)| values.iter().any(|value| *value != values[0]))
        .map(|(key, values)| Setting { key: key.clone(), values: short(values) })
        .collect()
}

/// Values as a reader needs them: without quotes, and of paths the last part where that is enough.
fn short(values: Vec<Option<String>>) -> Vec<Option<String>> {
    let plain: Vec<Option<String>> =
        values.into_iter().map(|value| value.map(|value| value.trim_matches('"').to_string())).collect();
    let last = |path: &String| path.rsplit('/').next().unwrap_or(path).to_string();
    let shorter: Vec<Option<String>> = plain.iter().map(|value| value.as_ref().map(last)).collect();
    let distinct = |values: &[Option<String>]| values.iter().collect::<BTreeSet<_>>().len();
    if distinct(&shorter) == distinct(&plain) { shorter } else { plain }
}

impl ComparedRun {
    fn of(dir: &Path, config: &Config, name: String, notes: &mut Vec<String>) -> Self {
        let tuples = config.reuse.tuples_dir(dir);
        let translator = config.reuse.translator_dir(dir);
        let (scored, unusable) = collect(&[dir]);
        for (path, why) in unusable {
            let path = path.strip_prefix(dir).unwrap_or(&path);
            notes.push(format!("{name}: {}: not a score that can be used: {why}", path.display()));
        }
        let (tables, _) = Table::of(&scored);
        if tables.is_empty() {
            notes.push(format!("{name}: no scores"));
        }
        let validation = read_json(&translator.join("validation.json")).unwrap_or_default();
        let curated = inputs::<CurateInputs>(&tuples);
        Self {
            name,
            models: curated.map(|curated| [curated.tiny, curated.llm]),
            relative_error: validation["best"]["relative_error"].as_f64(),
            scores: tables.iter().flat_map(ComparedScore::of).collect(),
            curation: of_curation(&tuples),
            curation_shared_by: 1,
            training: of_training(&translator),
            data: scored.into_iter().map(|score| score.data).collect(),
            tuples: tuples.canonicalize().unwrap_or(tuples),
        }
    }
}

impl ComparedScore {
    /// The rows of a table that the translator has a part in; else one with the ends of the gap.
    fn of(table: &Table) -> Vec<Self> {
        let mean = |role| table.row(Entry::Finetuned(role)).and_then(|row| row.mean);
        let none = Self {
            metric: table.metric,
            model: None,
            score: None,
            interval: None,
            pgr: None,
            pgr_interval: None,
            p_s: mean(Role::Tiny),
            p_t: mean(Role::Llm),
            clients: 0,
        };
        let translated = table.rows.iter().filter(|row| row.is_translated());
        let rows: Vec<Self> = translated
            .map(|row| Self {
                model: Some(row.name.clone()),
                score: row.mean,
                interval: row.interval,
                pgr: row.pgr,
                pgr_interval: row.pgr_interval,
                clients: row.scores.iter().flatten().count(),
                ..none.clone()
            })
            .collect();
        if rows.is_empty() { vec![none] } else { rows }
    }
}

/// Notes about runs whose scores are not of the same models and data.
fn of_different_worlds(runs: &[ComparedRun]) -> Vec<String> {
    let mut notes = vec![];
    for (model, which) in ["TinyLM", "LLM"].into_iter().zip(0..) {
        let found: Vec<(&str, &String)> = runs
            .iter()
            .filter_map(|run| Some((run.name.as_str(), run.models.as_ref()?.get::<usize>(which)?)))
            .collect();
        if let Some((other, _)) = found.iter().find(|(_, fingerprint)| *fingerprint != found[0].1) {
            notes.push(format!("the {model} of {other} is another one than that of {}", found[0].0));
        }
    }
    let scored: Vec<&ComparedRun> = runs.iter().filter(|run| !run.data.is_empty()).collect();
    if let Some(other) = scored.iter().find(|run| run.data != scored[0].data) {
        let first = &scored[0].name;
        notes.push(format!(
            "{} and {first} have scores of other test data: they say little about each other",
            other.name
        ));
    }
    notes
}
