//! What lies in a run directory and in directories of evaluations.
//!
//! In: paths. Out: [`Source`]: the configuration, every stage's record, the scores, and
//! two lists that fill as the report is made: what is missing, and what could not be used.

use crate::table::{self, Scored, Table};
use anyhow::{Result, ensure};
use gradtx_pipeline::records::{CurateInputs, EmulateInputs, FinetuneInputs, PluginInputs, TrainInputs};
use gradtx_run::config::{Config, RUN_FILE};
use gradtx_run::paths::{SHADOW_DIR, TRANSLATOR_DIR};
use gradtx_run::record::{self, RECORD_FILE, Record};
use gradtx_run::role::Role;
use gradtx_run::stage::Inputs;
use gradtx_runtime::artifact::{MANIFEST, TupleStore, read_json};
use gradtx_runtime::metrics::JsonLines;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A stage's directory and what its record says.
pub struct Stage {
    /// The directory.
    pub dir: PathBuf,
    /// Its name to a reader: relative to where it was found.
    pub name: String,
    /// The record.
    pub record: Record,
}

impl Stage {
    /// What the result depends on, if it is of that stage.
    pub fn inputs<I: Inputs>(&self) -> Option<I> {
        // Records that cannot be read are noted when they are found.
        self.record.inputs(&self.dir).ok().flatten()
    }
}

/// Why the record of a stage that the report reads does not say what it should.
fn unreadable(record: &Record, dir: &Path) -> Option<String> {
    let curate = record.inputs::<CurateInputs>(dir).err();
    let finetune = || record.inputs::<FinetuneInputs>(dir).err();
    curate.or_else(finetune).map(|error| format!("{error:#}"))
}

/// Everything that a report is made from.
pub struct Source {
    /// The run directory.
    pub run: PathBuf,
    /// Directory of its tuples, perhaps in another run.
    pub tuples: PathBuf,
    /// Directory of its translator, perhaps in another run.
    pub translator: PathBuf,
    roots: Vec<PathBuf>,
    /// The run's settings, if they can be read.
    pub config: Option<Config>,
    /// Every stage's directory below the roots, by path.
    pub stages: Vec<Stage>,
    /// The tuple store, if it is there and can be opened.
    pub store: Option<TupleStore>,
    /// What this run does not have yet.
    pub missing: Vec<String>,
    /// What could not be used, and why.
    pub notes: Vec<String>,
}

/// What run this is.
#[derive(Debug, Serialize)]
pub struct RunFacts {
    /// Name of the run directory.
    pub name: String,
    /// Seed of every random choice.
    pub seed: Option<u64>,
    /// Versions of gradtx that made its parts.
    pub versions: Vec<String>,
    /// The TinyLM.
    pub tiny: Model,
    /// The LLM.
    pub llm: Model,
    /// Every setting; of paths only the last part.
    pub settings: Option<Value>,
    /// What the stages were computed on.
    pub stages: Vec<StageFacts>,
    /// What was assumed where the settings leave it open.
    pub assumed: Vec<Assumed>,
}

/// Something that stages assumed about data or models.
#[derive(Debug, PartialEq, Serialize)]
pub struct Assumed {
    /// The stage.
    pub stage: String,
    /// How many of its results.
    pub results: usize,
    /// What, in a sentence.
    pub what: String,
}

/// What one stage was computed on, over all its directories.
#[derive(Debug, Default, Serialize)]
pub struct StageFacts {
    /// The stage.
    pub stage: String,
    /// Directories.
    pub results: usize,
    /// Versions of gradtx that began them.
    pub versions: BTreeSet<String>,
    /// Kinds of device and element types, as set or taken.
    pub devices: BTreeSet<String>,
    /// Devices and libraries that the bits of results depend on: none on CPUs.
    pub computed_on: BTreeSet<String>,
}

/// A base model.
#[derive(Debug, Default, Serialize)]
pub struct Model {
    /// Name of its directory.
    pub name: Option<String>,
    /// Fingerprint of its weights.
    pub fingerprint: Option<String>,
    /// `model_type` of its configuration.
    pub family: Option<String>,
    /// Layers.
    pub layers: Option<u64>,
    /// Width.
    pub hidden: Option<u64>,
}

impl Source {
    /// Looks at the directories. Fails when the run directory is none.
    pub fn open(run: &Path, evaluations: &[&Path]) -> Result<Self> {
        for dir in evaluations.iter().chain([&run]) {
            ensure!(dir.is_dir(), "{}: no such directory", dir.display());
        }
        let run = run.canonicalize()?;
        let mut roots = vec![run.clone()];
        for dir in evaluations {
            roots.push(dir.canonicalize()?);
        }
        let (tuples, translator) = (run.join(SHADOW_DIR), run.join(TRANSLATOR_DIR));
        let mut source = Self {
            run,
            tuples,
            translator,
            roots,
            config: None,
            stages: vec![],
            store: None,
            missing: vec![],
            notes: vec![],
        };
        source.read_config();
        source.find_reused();
        source.read_records();
        source.open_store();
        Ok(source)
    }

    fn read_config(&mut self) {
        let path = self.run.join(RUN_FILE);
        if !path.is_file() {
            self.missing(format!("No settings: there is no {RUN_FILE}."));
            return;
        }
        match Config::read(&path) {
            Ok(config) => self.config = Some(config),
            Err(error) => self.note(&path, format!("{error:#}")),
        }
    }

    /// Takes tuples and translator from the runs that the settings name.
    fn find_reused(&mut self) {
        let Some(config) = &self.config else { return };
        let resolved = |dir: PathBuf| dir.canonicalize().unwrap_or(dir);
        self.tuples = resolved(config.reuse.tuples_dir(&self.run));
        self.translator = resolved(config.reuse.translator_dir(&self.run));
        for dir in [&self.tuples, &self.translator] {
            if !dir.starts_with(&self.run) && !self.roots.contains(dir) {
                self.roots.push(dir.clone());
            }
        }
    }

    fn read_records(&mut self) {
        for path in self.find(RECORD_FILE) {
            let dir = path.parent().unwrap_or(Path::new("/")).to_owned();
            let name = self.name(&dir);
            match record::read(&path) {
                Err(error) => self.note(&path, format!("{error:#}")),
                Ok(record) => {
                    if record.outputs.is_empty() {
                        self.missing(format!("{name}: `{}` has not finished.", record.stage));
                    }
                    if let Some(why) = unreadable(&record, &dir) {
                        self.note(&path, why);
                    }
                    self.stages.push(Stage { dir, name, record });
                }
            }
        }
    }

    fn open_store(&mut self) {
        let dir = self.tuples.clone();
        if !dir.join(MANIFEST).is_file() {
            self.missing_for_translation("No tuples: `gradtx curate` has not finished.");
            return;
        }
        let record = self.stages.iter().find(|stage| stage.dir == dir).map(|stage| &stage.record);
        let used = |name: &str| name == MANIFEST || name.starts_with("shards/") || name.starts_with("init/");
        let problem = record.and_then(|record| record.problems(&dir, used).into_iter().next());
        match TupleStore::open(&dir).map_err(|error| error.to_string()) {
            Ok(store) if problem.is_none() => self.store = Some(store),
            Ok(_) => self.note(&dir, problem.unwrap_or_default()),
            Err(why) => self.note(&dir, why),
        }
    }

    /// Why a file is not what its stage wrote, if a record knows it.
    pub fn damage(&self, path: &Path) -> Option<String> {
        let around = self.stages.iter().filter(|stage| path.starts_with(&stage.dir));
        let stage = around.max_by_key(|stage| stage.dir.components().count())?;
        let name = path.strip_prefix(&stage.dir).ok()?.to_str()?;
        stage.record.problems(&stage.dir, |finished| finished == name).pop()
    }

    /// Notes that the run does not have something.
    pub fn missing(&mut self, what: impl Into<String>) {
        self.missing.push(what.into());
    }

    /// Notes that the run does not have something that translation takes; a run of an emulator has no need of it.
    pub fn missing_for_translation(&mut self, what: impl Into<String>) {
        let has = |stages: [&str; 2]| self.stages.iter().any(|of| stages.contains(&of.record.stage.as_str()));
        let is_offsite = has([EmulateInputs::STAGE, PluginInputs::STAGE]);
        if !is_offsite || has([CurateInputs::STAGE, TrainInputs::STAGE]) {
            self.missing(what);
        }
    }

    /// Notes that a file could not be used, and why.
    pub fn note(&mut self, path: &Path, why: impl AsRef<str>) {
        // Messages name files by their whole paths: here short names are enough.
        let whole = format!("{}: ", path.display());
        let why = why.as_ref().trim();
        let mut why =
            why.strip_prefix(&whole).unwrap_or(why).split_whitespace().collect::<Vec<_>>().join(" ");
        for root in &self.roots {
            why = why.replace(&format!("{}/", root.display()), "");
        }
        self.notes.push(format!("{}: {why}", self.name(path)));
    }

    /// A path as a reader sees it: relative to the root that holds it.
    pub fn name(&self, path: &Path) -> String {
        let relative = self.roots.iter().find_map(|root| path.strip_prefix(root).ok());
        let relative = relative.filter(|rest| !rest.as_os_str().is_empty());
        relative.map_or_else(|| last_part(path), |rest| rest.display().to_string())
    }

    /// Files of this name below all roots.
    pub fn find(&self, name: &str) -> Vec<PathBuf> {
        let roots: Vec<&Path> = self.roots.iter().map(PathBuf::as_path).collect();
        table::find(&roots, name)
    }

    /// The directories of a stage, and what their results depend on.
    pub fn inputs<I: Inputs>(&self) -> impl Iterator<Item = (&Stage, I)> {
        self.stages.iter().filter_map(|stage| Some((stage, stage.inputs()?)))
    }

    /// Records of a JSONL file; a file that cannot be read is noted, one that is not there is empty.
    pub fn lines(&mut self, path: &Path) -> Vec<Value> {
        if !path.is_file() {
            return vec![];
        }
        if let Some(why) = self.damage(path) {
            self.note(path, why);
            return vec![];
        }
        JsonLines::read(path).unwrap_or_else(|error| {
            self.note(path, error.to_string());
            vec![]
        })
    }

    /// All scores.
    pub fn scores(&mut self) -> Vec<Scored> {
        let roots: Vec<&Path> = self.roots.iter().map(PathBuf::as_path).collect();
        let (scored, unusable) = table::collect(&roots);
        for (path, why) in unusable {
            self.note(&path, format!("not a score that can be used here: {why}"));
        }
        scored
    }

    /// The tables of all scores.
    pub fn tables(&mut self) -> Vec<Table> {
        let (tables, aside) = Table::of(&self.scores());
        for path in aside {
            self.note(&path, "left out: the table has another score of the same model and test data");
        }
        tables
    }

    /// Fingerprint of a base model, as the stages noted it.
    pub fn fingerprint(&self, role: Role) -> Option<String> {
        if let Some(store) = &self.store {
            return Some(store.space(role.side()).base_model.clone());
        }
        self.inputs::<CurateInputs>().next().map(|(_, inputs)| inputs.model(role).to_string())
    }

    /// The model that a fingerprint is of.
    pub fn role_of(&self, fingerprint: &str) -> Option<Role> {
        [Role::Tiny, Role::Llm]
            .into_iter()
            .find(|&role| self.fingerprint(role).as_deref() == Some(fingerprint))
    }

    /// What run this is.
    pub fn facts(&self) -> RunFacts {
        let versions: BTreeSet<String> = self.stages.iter().map(|s| s.record.version.clone()).collect();
        RunFacts {
            name: run_name(&self.run),
            seed: self.config.as_ref().map(|c| c.seed),
            versions: versions.into_iter().collect(),
            tiny: self.model(Role::Tiny),
            llm: self.model(Role::Llm),
            settings: self.config.as_ref().map(|config| short_paths(json!(config))),
            stages: self.stage_facts(),
            assumed: self.assumed(),
        }
    }

    /// What the records say that was assumed, each once for a stage.
    fn assumed(&self) -> Vec<Assumed> {
        let mut all: Vec<Assumed> = vec![];
        for Stage { record, .. } in &self.stages {
            for what in &record.assumed {
                match all.iter_mut().find(|known| known.stage == record.stage && known.what == *what) {
                    Some(known) => known.results += 1,
                    None => all.push(Assumed { stage: record.stage.clone(), results: 1, what: what.clone() }),
                }
            }
        }
        all.sort_by(|a, b| a.stage.cmp(&b.stage));
        all
    }

    fn stage_facts(&self) -> Vec<StageFacts> {
        let mut facts: BTreeMap<&str, StageFacts> = BTreeMap::new();
        for Stage { record, .. } in &self.stages {
            let of = facts.entry(&record.stage).or_default();
            of.stage.clone_from(&record.stage);
            of.results += 1;
            of.versions.insert(record.version.clone());
            of.computed_on.extend(record.computed_on.iter().cloned());
            let device = &record.settings["device"];
            if let (Some(kind), Some(dtype)) = (device["kind"].as_str(), device["dtype"].as_str()) {
                of.devices.insert(format!("{kind}, {dtype}"));
            }
        }
        facts.into_values().collect()
    }

    fn model(&self, role: Role) -> Model {
        let fingerprint = self.fingerprint(role);
        let dir = self.config.as_ref().map(|config| match role {
            Role::Tiny => &config.models.tiny,
            Role::Llm => &config.models.llm,
        });
        let Some(dir) = dir.filter(|dir| !dir.as_os_str().is_empty()) else {
            return Model { fingerprint, ..Model::default() };
        };
        let config = read_json(&dir.join("config.json")).unwrap_or(Value::Null);
        Model {
            name: Some(last_part(dir)),
            fingerprint,
            family: config["model_type"].as_str().map(String::from),
            layers: config["num_hidden_layers"].as_u64(),
            hidden: config["hidden_size"].as_u64(),
        }
    }
}

/// The last part of a path: where things lie on a machine is nobody's business.
pub(crate) fn last_part(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

/// A run directory's name. With the directory above where it is only called `run`.
pub(crate) fn run_name(run: &Path) -> String {
    let name = last_part(run);
    match run.parent().and_then(Path::file_name) {
        Some(above) if name == "run" => format!("{}/{name}", above.to_string_lossy()),
        _ => name,
    }
}

/// A word of a command line or a setting; of an absolute path, also after `--flag=`, only the last
/// part.
pub(crate) fn short_path(word: &str) -> String {
    match word.split_once('=') {
        Some((flag, path)) if path.starts_with('/') => format!("{flag}={}", last_part(Path::new(path))),
        _ if word.starts_with('/') => last_part(Path::new(word)),
        _ => word.into(),
    }
}

/// Settings with only the last part of every absolute path.
fn short_paths(value: Value) -> Value {
    match value {
        Value::Object(entries) => {
            Value::Object(entries.into_iter().map(|(key, value)| (key, short_paths(value))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(short_paths).collect()),
        Value::String(text) => Value::String(short_path(&text)),
        other => other,
    }
}
