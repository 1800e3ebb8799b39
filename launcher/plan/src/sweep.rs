//! The directories of a sweep: a run for every combination of settings, and the curations that
//! these runs share.
//!
//! In: a sweep file (see [`gradtx_run::config::read_sweep`]). Out: `OUT/NAME/run.toml` for each
//! run, resolved and checked; `OUT/curations/HASH/run.toml` for each distinct setting of
//! what curation depends on, from which the runs take their tuples; and `OUT/sweep.json`, which
//! lists them. The stages then work in these directories as in any other: `gradtx curate --run
//! OUT/curations/HASH`, `gradtx train --run OUT/NAME`. A directory that is there with the same
//! settings stays as it is; one with other settings is refused.

use anyhow::Result;
use gradtx_run::config::{Config, RUN_FILE, SweptRun, read_sweep};
use gradtx_run::context::Context;
use gradtx_run::failure::failed;
use gradtx_run::paths::{CURATIONS_DIR, INDEX_FILE, SHADOW_DIR};
use gradtx_run::record::{self, RECORD_FILE};
use gradtx_run::text::counted;
use gradtx_runtime::artifact::{read_json, write_json};
use gradtx_runtime::metrics::JsonLines;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// A sweep, read and checked.
pub struct Sweep {
    /// The sweep file.
    file: PathBuf,
    /// Its directory, absolute.
    pub out: PathBuf,
    /// The runs, in the order of the file.
    pub runs: Vec<SweptRun>,
    /// What they share.
    pub curations: Vec<Curation>,
}

/// A curation that runs of a sweep share.
#[derive(Clone, Debug)]
pub struct Curation {
    /// Hash of the settings that it depends on.
    pub name: String,
    /// Its run directory.
    pub dir: PathBuf,
    /// Its settings.
    pub config: Config,
    /// Names of the runs that take their tuples from it.
    pub runs: Vec<String>,
}

/// The content of sweep.json.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Index {
    /// The sweep file.
    pub file: String,
    /// The runs.
    pub runs: Vec<IndexedRun>,
    /// What they share. None in directories that older versions wrote.
    #[serde(default)]
    pub curations: Vec<IndexedCuration>,
}

/// A run as sweep.json has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IndexedRun {
    /// Its name, and that of its directory.
    pub name: String,
    /// Which `[[sweep]]` table it is of, from 1.
    pub sweep: usize,
    /// The settings that are varied, with this run's values.
    pub settings: Map<String, Value>,
}

/// A shared curation as sweep.json has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IndexedCuration {
    /// Name of its directory in `curations`.
    pub name: String,
    /// Names of the runs that take their tuples from it.
    pub runs: Vec<String>,
}

impl Index {
    /// The list of runs in the directory of a sweep.
    ///
    /// # Errors
    /// When it is not there, or not what `gradtx sweep` writes.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(INDEX_FILE);
        serde_json::from_value(read_json(&path)?).map_err(|error| {
            let what = format!("{}: expected a list of runs: {error}", path.display());
            failed(what, "write it again: gradtx sweep FILE --out DIR")
        })
    }
}

impl Sweep {
    /// Reads a sweep file, whose directories are to be in `out`.
    ///
    /// # Errors
    /// Those of [`read_sweep`].
    pub fn read(file: &Path, out: &Path) -> Result<Self> {
        let out = std::path::absolute(out)?;
        let mut runs = read_sweep(file)?;
        let curations = share(&mut runs, &out);
        Ok(Self { file: file.to_owned(), out, runs, curations })
    }

    /// Directory of a run.
    pub fn dir(&self, run: &SweptRun) -> PathBuf {
        self.out.join(&run.name)
    }

    /// Writes the directories that are not there yet; returns how many of them are runs.
    ///
    /// # Errors
    /// If one is there with other settings; all are compared before the first is written.
    pub fn write(&self) -> Result<usize> {
        let curations = self.curations.iter().map(|curation| (curation.dir.clone(), &curation.config));
        let curations = new_ones(curations)?;
        let runs = new_ones(self.runs.iter().map(|run| (self.dir(run), &run.config)))?;
        // A run reads the settings of its curation.
        for (dir, config) in curations.iter().chain(&runs) {
            config.store(&dir.join(RUN_FILE))?;
        }
        write_json(&self.out.join(INDEX_FILE), &self.index())?;
        Ok(runs.len())
    }

    fn index(&self) -> Index {
        let run = |run: &SweptRun| IndexedRun {
            name: run.name.clone(),
            sweep: run.entry,
            settings: run.settings.iter().map(|(key, value)| (key.clone(), json!(value))).collect(),
        };
        let curation = |it: &Curation| IndexedCuration { name: it.name.clone(), runs: it.runs.clone() };
        Index {
            file: self.file.display().to_string(),
            runs: self.runs.iter().map(run).collect(),
            curations: self.curations.iter().map(curation).collect(),
        }
    }

    /// `4 runs`.
    pub fn count_of_runs(&self) -> String {
        counted(self.runs.len(), "run")
    }

    /// `2 shared curations`.
    pub fn count_of_curations(&self) -> String {
        counted(self.curations.len(), "shared curation")
    }

    /// Prints every run and what it varies.
    pub fn list(&self, context: &Context) {
        self.runs.iter().for_each(|run| context.ui.result(line_of(run)));
    }

    /// Prints how far every run is.
    pub fn status(&self, context: &Context) {
        let widest = self.runs.iter().map(|run| run.name.len()).max().unwrap_or(0);
        for run in &self.runs {
            let standing = standing(&self.dir(run), &run.config);
            context.ui.result(format!("{:widest$}  {standing}", run.name));
        }
    }
}

/// The directories that have no settings yet.
fn new_ones<'a>(all: impl Iterator<Item = (PathBuf, &'a Config)>) -> Result<Vec<(PathBuf, &'a Config)>> {
    let mut new = vec![];
    for (dir, config) in all {
        if config.is_new_in(&dir)? {
            new.push((dir, config));
        }
    }
    Ok(new)
}

/// Finds the curations that runs can share, and has the runs take their tuples from there. A
/// run that has tuples, or takes them from elsewhere, keeps to that.
fn share(runs: &mut [SweptRun], out: &Path) -> Vec<Curation> {
    let mut curations: Vec<Curation> = vec![];
    let has_tuples = |run: &SweptRun| {
        !run.config.reuse.tuples.as_os_str().is_empty() || out.join(&run.name).join(SHADOW_DIR).exists()
    };
    for run in runs.iter_mut().filter(|run| !has_tuples(run)) {
        let name = run.config.curation_hash();
        let dir = out.join(CURATIONS_DIR).join(&name);
        match curations.iter_mut().find(|curation| curation.name == name) {
            Some(curation) => curation.runs.push(run.name.clone()),
            None => {
                let config = run.config.for_curation();
                curations.push(Curation { name, dir: dir.clone(), config, runs: vec![run.name.clone()] });
            }
        }
        run.config.reuse.tuples = dir;
    }
    curations
}

/// A run's name and what it varies.
fn line_of(run: &SweptRun) -> String {
    let settings: Vec<String> = run.settings.iter().map(|(key, value)| format!("{key} = {value}")).collect();
    if settings.is_empty() { run.name.clone() } else { format!("{}  {}", run.name, settings.join(", ")) }
}

/// How far a run is, in a line, from what is on disk.
fn standing(dir: &Path, config: &Config) -> String {
    if !dir.join(RUN_FILE).is_file() {
        return "not written".into();
    }
    match config.is_new_in(dir) {
        Ok(_) => {}
        Err(_) => return "has other settings than the sweep file now".into(),
    }
    let tuples = config.reuse.tuples_dir(dir);
    let curated = match finished(&tuples) {
        None => return "not started".into(),
        Some(true) => "curate finished".to_string(),
        Some(false) => {
            let [tiny, llm] = shards(&tuples.join("shards"));
            let all = config.curate.num_subsets;
            return format!("curate: {tiny} of {all} shards of tiny, {llm} of {all} of llm");
        }
    };
    let translator = config.reuse.translator_dir(dir);
    match finished(&translator) {
        None => curated,
        Some(false) => {
            let lines = JsonLines::read(&translator.join("metrics.jsonl")).unwrap_or_default();
            let step = lines.last().and_then(|line| line["step"].as_u64()).unwrap_or(0);
            format!("{curated}, train: step {step} of {}", config.expected().train.max_steps)
        }
        Some(true) => {
            let validation = read_json(&translator.join("validation.json")).unwrap_or_default();
            let error = validation["best"]["relative_error"].as_f64().unwrap_or(f64::NAN);
            format!("{curated}, train finished: relative error {error:.4}")
        }
    }
}

/// Whether the stage of a directory is finished; `None` before it has started.
fn finished(dir: &Path) -> Option<bool> {
    let record = record::read(&dir.join(RECORD_FILE)).ok()?;
    Some(!record.outputs.is_empty())
}

/// Shards of the TinyLM and of the LLM.
fn shards(dir: &Path) -> [usize; 2] {
    let files: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    // Temporary files begin with a dot.
    let whole = |end: &str| files.iter().filter(|name| name.ends_with(end) && !name.starts_with('.')).count();
    [whole(".student.safetensors"), whole(".teacher.safetensors")]
}
