//! What earlier stages made, opened for use by a later one: the one way to open a tuple
//! store, a translator, an update vector, an adapter or a merged model.
//!
//! In: a path, and the [`UpdateSpace`]s of the run that wants to use it. Out: the artifact,
//! if its stage has finished, every file that is used is what the stage wrote (by the
//! checksums of its record), and it is of the same base models, block layout and initial
//! adapters; otherwise an error that names what differs. The checksums of what is used go
//! into the settings of what is made from it.

use crate::aggregate::Norms;
use crate::fold::Fold;
use crate::lineage::{Lineage, adapter_sums};
use crate::records::{CurateInputs, TrainInputs};
use crate::staleness::Run;
use anyhow::{Context as _, Result};
use gradtx_models::grad_transformer::{Components, GradTransformerConfig, NormalizationMode, Targets};
use gradtx_run::config::{Config, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::failure::{failed, refused};
use gradtx_run::paths::{GROUPS_FILE, SUBSETS_FILE};
use gradtx_run::record::{self, RECORD_FILE, Record};
use gradtx_run::role::Role;
use gradtx_run::stage::Inputs;
use gradtx_run::text::quoted;
use gradtx_runtime::artifact::{
    MANIFEST, Role as Part, TupleStore, UpdateFile, UpdateSpace, UpdateVector, checksum_file, init_path,
    read_json,
};
use gradtx_runtime::text::shown;
use gradtx_train::model_spec::{ModelSpec, start_dir};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// What helps against a damaged tuple store.
const CURATE_AGAIN: &str = "run `gradtx curate` again: it rebuilds what is damaged";
/// What helps against a damaged translator.
const TRAIN_AGAIN: &str = "run `gradtx train` again: it rebuilds what is damaged";
/// What helps against an artifact of another run.
const OTHER_RUN: &str = "it was made from other models or another seed: use what this run's own stages made";

/// The model that a part of a tuple is of, for people.
fn model_of(role: Part) -> &'static str {
    match role {
        Part::Student => "TinyLM",
        Part::Teacher => "LLM",
    }
}

/// The directory of a stage that has finished.
struct Finished {
    dir: PathBuf,
    record: Record,
    again: &'static str,
}

impl Finished {
    /// Reads the record of a directory. Nothing is said of its files yet.
    fn open(dir: &Path, stage: &str, again: &'static str) -> Result<Self> {
        let path = dir.join(RECORD_FILE);
        let place = shown(dir);
        if !path.exists() {
            let what = format!("{place}: there is no {RECORD_FILE}: `{stage}` has not worked here");
            return Err(failed(what, format!("run `gradtx {stage}` first")));
        }
        let record = record::read(&path)?;
        if record.stage != stage {
            let what = format!("{place}: expected a result of `{stage}`, found one of `{}`", record.stage);
            return Err(failed(what, format!("run `gradtx {stage}` first")));
        }
        if record.outputs.is_empty() {
            let what = format!("{place}: `{stage}` has not finished here");
            return Err(failed(what, format!("run `gradtx {stage}` again: it does what is missing")));
        }
        Ok(Self { dir: dir.to_owned(), record, again })
    }

    /// What the result depends on.
    fn inputs<I: Inputs>(&self) -> Result<I> {
        let inputs = self.record.inputs(&self.dir)?;
        inputs.with_context(|| format!("{}: expected a result of `{}`", shown(&self.dir), I::STAGE))
    }

    /// The checksum of a finished file.
    fn sum(&self, name: &str) -> Result<&str> {
        let sum = self.record.outputs.get(name).map(String::as_str);
        sum.ok_or_else(|| {
            let stage = &self.record.stage;
            failed(format!("{}: is not among the files that `{stage}` wrote", self.path(name)), self.again)
        })
    }

    fn path(&self, name: &str) -> String {
        shown(&self.dir.join(name))
    }

    /// Fails unless every finished file that `used` names is as it was written.
    fn verify(&self, used: impl Fn(&str) -> bool) -> Result<()> {
        match self.record.problems(&self.dir, used).into_iter().next() {
            None => Ok(()),
            Some(problem) => Err(failed(problem, self.again)),
        }
    }
}

/// A tuple store that is complete and of the run that it is opened for.
pub struct Tuples {
    /// The store; its values are verified by [`Self::verify`].
    pub store: TupleStore,
    /// Checksum of the manifest, which lists the checksum of every shard.
    pub manifest: String,
    made: Finished,
}

/// Where a run has a result from: itself, or another run.
struct Source<'a> {
    /// What it is, as in the section `[reuse]`.
    what: &'static str,
    /// The other run; empty for itself.
    run: &'a Path,
    /// What the run found there when it first used it; empty before.
    checksum: &'a str,
}

impl Source<'_> {
    /// The error for a result that is not there.
    fn missing(&self, dir: &Path, result: &str, stage: &str) -> anyhow::Error {
        let Self { what, run, .. } = self;
        let place = shown(dir);
        if run.as_os_str().is_empty() {
            return failed(format!("{place}: there is no {result}"), format!("run `gradtx {stage}` first"));
        }
        let hint = format!(
            "run `gradtx {stage} --run {}` first; or, if that run was moved, give its new place: --{what} RUN",
            quoted(&run.to_string_lossy())
        );
        failed(format!("{place}: there is no {result}, and this run takes its {what} from there"), hint)
    }

    /// Fails when the result is another one than when the run first used it.
    fn expect(&self, dir: &Path, found: &str) -> Result<()> {
        let Self { what, run, checksum } = self;
        if run.as_os_str().is_empty() || checksum.is_empty() || *checksum == found {
            return Ok(());
        }
        let lines = format!("  - reuse.{what}_checksum = {checksum}\n  + reuse.{what}_checksum = {found}\n");
        let hint = format!(
            "restore what was there; or use what is there now, for results that are not there yet: --{what} {}",
            quoted(&run.to_string_lossy())
        );
        let problem = format!("{}: changed since this run began to use it", shown(dir));
        Err(refused(problem, lines, &hint))
    }
}

/// Opens the tuple store that a run uses; `expected` are the spaces of TinyLM and LLM as the run's own
/// models have them, where these are at hand.
pub fn open_tuples(settings: &mut RunSettings, expected: [Option<&UpdateSpace>; 2]) -> Result<Tuples> {
    let (dir, reuse) = (settings.tuples_dir(), &settings.config().reuse);
    let source = Source { what: "tuples", run: &reuse.tuples, checksum: &reuse.tuples_checksum };
    if !dir.join(MANIFEST).is_file() {
        return Err(source.missing(&dir, "tuple store", "curate"));
    }
    let made = Finished::open(&dir, "curate", CURATE_AGAIN)?;
    made.verify(|name| name == MANIFEST)?;
    let store = TupleStore::open(&dir).map_err(|e| failed(e.to_string(), CURATE_AGAIN))?;
    for (role, expected) in Part::BOTH.into_iter().zip(expected) {
        if let Some(expected) = expected {
            let what = format!("{}: {}", shown(&dir), model_of(role));
            expected.expect_same(store.space(role), &what).map_err(|e| failed(e.to_string(), OTHER_RUN))?;
        }
    }
    for (name, file) in store.manifest().files() {
        let name = name.to_string_lossy();
        if made.sum(&name)? != file.xxh3 {
            let what = format!("{}: manifest and record have other checksums of it", made.path(&name));
            return Err(failed(what, CURATE_AGAIN));
        }
    }
    let manifest = made.sum(MANIFEST)?.to_owned();
    source.expect(&dir, &manifest)?;
    settings.uses_tuples(&manifest);
    Ok(Tuples { store, manifest, made })
}

impl Tuples {
    /// The same without the shadow pairs of a fold.
    pub fn without(mut self, fold: Option<&Fold>) -> Self {
        self.store = self.store.without(&Fold::held_out(fold));
        self
    }

    /// The run that has them.
    pub fn run(&self) -> &Path {
        self.made.dir.parent().unwrap_or(&self.made.dir)
    }

    /// Reads every shard and initial adapter. Fails unless all are what `curate` wrote.
    pub fn verify(&self) -> Result<()> {
        let inits = Part::BOTH.map(|role| init_path(Path::new(""), role).to_string_lossy().into_owned());
        for name in &inits {
            self.made.sum(name)?;
        }
        self.made.verify(|name| name.starts_with("shards/") || inits.iter().any(|init| init == name))
    }

    /// Reads the shards of one of the models. Fails unless all are what `curate` wrote.
    pub fn verify_shards(&self, role: Part) -> Result<()> {
        let of_role = format!(".{role}.");
        self.made.verify(|name| name.starts_with("shards/") && name.contains(&of_role))
    }
}

/// Warns if the tuples that a run uses were made with other settings than it has now: they are used
/// as they are.
pub(crate) fn warn_of_changes(context: &Context, settings: &RunSettings, stage: &str) -> Result<()> {
    let run = Run { dir: settings.run(), config: settings.config() };
    let changes = run.changes_of_tuples()?;
    if !changes.is_empty() {
        let dir = shown(&settings.tuples_dir());
        let changes = changes.trim_end();
        context.ui.notice(&format!(
            "{stage}: warning: {dir} was made with other settings than this run has now, and is used as it is\n{changes}"
        ));
    }
    Ok(())
}

/// One of a run's models. The adapter that its training starts from is verified, if a stage wrote it.
pub fn open_side(config: &Config, role: Role, threads: usize) -> Result<ModelSpec> {
    let side = ModelSpec::new(config, role, threads)?;
    if let Some(start) = start_dir(config, role) {
        Lineage::of_adapter(start, &adapter_sums(start)?, &side.space.base_model)?;
    }
    Ok(side)
}

/// Both of a run's models, TinyLM and LLM: for what is made of pairs of updates, which emulators have none of.
///
/// # Errors
/// When one of them is an emulator.
pub fn open_pair(config: &Config, threads: usize) -> Result<[ModelSpec; 2]> {
    let [tiny, llm] = [Role::Tiny, Role::Llm].map(|role| open_side(config, role, threads));
    let [tiny, llm] = [tiny?, llm?];
    expect_tiny(&tiny)?;
    llm.model.expect_whole(&format!("models.llm = {}", llm.dir.display()))?;
    Ok([tiny, llm])
}

/// Fails for an emulator in the place of the TinyLM.
pub fn expect_tiny(tiny: &ModelSpec) -> Result<()> {
    if tiny.model.emulator.is_none() {
        return Ok(());
    }
    let what = format!("models.tiny = {}: expected the TinyLM; found a GradOT emulator", shown(&tiny.dir));
    let hint = "an emulator's clients use `gradtx finetune` alone, and their provider `gradtx plugin`; for \
                translation name the TinyLM's directory: --set models.tiny=DIR";
    Err(failed(what, hint))
}

impl Tuples {
    /// Group of every pair, for a store that gives; of stores that older versions made, none.
    pub fn groups(&self) -> Result<Option<Vec<usize>>> {
        if !self.made.record.outputs.contains_key(GROUPS_FILE) {
            return Ok(None);
        }
        let all: Vec<usize> = self.list(GROUPS_FILE)?;
        Ok(Some((0..self.store.pairs()).map(|pair| all[self.store.shadow(pair)]).collect()))
    }

    /// Rows of the public data that every pair was trained on.
    pub fn subsets(&self) -> Result<Vec<Vec<usize>>> {
        let mut all: Vec<Vec<usize>> = self.list(SUBSETS_FILE)?;
        Ok((0..self.store.pairs()).map(|pair| std::mem::take(&mut all[self.store.shadow(pair)])).collect())
    }

    /// A finished file of something for every shadow.
    fn list<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<Vec<T>> {
        self.made.verify(|file| file == name)?;
        let path = self.made.dir.join(name);
        let all: Vec<T> = serde_json::from_value(read_json(&path)?).with_context(|| self.made.path(name))?;
        let (want, found) = (self.store.manifest().plan.shadows, all.len());
        match want == found {
            true => Ok(all),
            false => {
                let what =
                    format!("{}: expected entries of {want} shadows, found {found}", self.made.path(name));
                Err(failed(what, self.made.again))
            }
        }
    }
}

/// A run's two models, as far as these are where the run says: training needs
/// tuples, not models, and may be done where these are not.
pub(crate) fn sides_at_hand(
    config: &Config,
    threads: usize,
    mut note: impl FnMut(String),
) -> Result<[Option<ModelSpec>; 2]> {
    let mut found = [None, None];
    for (role, dir) in [(Role::Tiny, &config.models.tiny), (Role::Llm, &config.models.llm)] {
        if dir.as_os_str().is_empty() || !dir.exists() {
            let name = role.name();
            note(format!("models.{name} is not here: whether the tuples are of it is not compared"));
            continue;
        }
        found[role as usize] = Some(open_side(config, role, threads)?);
    }
    Ok(found)
}

/// A translator that is intact and of the run that it is opened for.
pub struct Translator {
    /// Its directory.
    pub dir: PathBuf,
    /// Checksums of its files and of the manifest that it was trained on.
    pub sums: Map<String, Value>,
    /// Norms of the shadow students that it was trained on.
    pub students: Norms,
    /// What it predicts.
    pub targets: Targets,
    /// Blocks that it predicts, and values of each.
    shape: [usize; 2],
}

impl Translator {
    /// What its predictions mean, for one that predicts coordinates.
    pub fn components(&self, tuples: &Tuples) -> Result<Components> {
        let (pairs, own) = (tuples.store.pairs(), self.sums["tuples"].as_str());
        if own != Some(tuples.manifest.as_str()) {
            let [dir, other] = [&self.dir, &tuples.made.dir].map(|dir| shown(dir));
            let what = format!("{dir}: predicts coordinates among other tuples than those of {other}");
            return Err(failed(what, "name the run whose tuples it was trained on: --tuples RUN"));
        }
        Components::load(&self.dir, &tuples.manifest, self.shape, pairs)
            .map_err(|error| failed(error.to_string(), TRAIN_AGAIN))
    }
}

impl Translator {
    /// The tuples that it was trained on, those of the TinyLM verified; or why they are not there: a
    /// translator can do without.
    pub fn tuples_at_hand(
        &self,
        settings: &mut RunSettings,
        spaces: [&UpdateSpace; 2],
    ) -> Result<Tuples, String> {
        let plain = |error: anyhow::Error| format!("{error:#}").replace('\n', " ");
        let tuples = open_tuples(settings, spaces.map(Some)).map_err(plain)?;
        if self.sums.get("tuples").and_then(Value::as_str) != Some(&tuples.manifest) {
            let dir = shown(&tuples.made.dir);
            return Err(format!("{dir}: not the tuples that the translator was trained on"));
        }
        tuples.verify_shards(Part::Student).map_err(plain)?;
        Ok(tuples)
    }
}

/// Files of a translator that are used; the statistics where it has some.
const TRANSLATOR_FILES: [&str; 3] = ["config.json", "model.safetensors", "validation.json"];
const STATISTICS: &str = "normalization.safetensors";

/// Opens the translator that a run uses, or that of a fold; with these targets, if any are asked for.
pub(crate) fn open_translator(
    settings: &mut RunSettings,
    fold: Option<&Fold>,
    targets: Option<Targets>,
    student: &UpdateSpace,
    teacher: &UpdateSpace,
) -> Result<Translator> {
    let (dir, reuse) = (settings.translator_dir(), &settings.config().reuse);
    let dir = fold.map_or(dir, |fold| fold.translator_dir(targets));
    let source = Source { what: "translator", run: &reuse.translator, checksum: &reuse.translator_checksum };
    if !dir.join(TRANSLATOR_FILES[1]).is_file() {
        return Err(source.missing(&dir, "translator", "train"));
    }
    let made = Finished::open(&dir, "train", TRAIN_AGAIN)?;
    let mut sums = Map::new();
    for name in TRANSLATOR_FILES {
        sums.insert(name.into(), made.sum(name)?.into());
    }
    made.verify(|name| TRANSLATOR_FILES.contains(&name) || [STATISTICS, Components::FILE].contains(&name))?;
    let (config, mode) = GradTransformerConfig::open(&dir.join(TRANSLATOR_FILES[0]))?;
    if mode != NormalizationMode::None {
        sums.insert(STATISTICS.into(), made.sum(STATISTICS)?.into());
    }
    if config.targets != Targets::Factors {
        sums.insert(Components::FILE.into(), made.sum(Components::FILE)?.into());
    }
    if let Some(wanted) = targets.filter(|wanted| *wanted != config.targets) {
        let [wanted, found] = [wanted, config.targets].map(Targets::name);
        let what = format!("{}: expected a translator that predicts {wanted}, found {found}", shown(&dir));
        let hint = format!(
            "use it with --method grad-transformer, or train another: gradtx train --set train.targets={wanted}"
        );
        return Err(failed(what, hint));
    }
    let inputs: TrainInputs = made.inputs()?;
    if inputs.held_out != Fold::held_out(fold) {
        let what = format!("{}: was trained with other shadow pairs left out", shown(&dir));
        return Err(failed(what, TRAIN_AGAIN));
    }
    for (role, expected, trained) in
        [(Part::Student, student, &inputs.spaces.student), (Part::Teacher, teacher, &inputs.spaces.teacher)]
    {
        let what = format!("{}: {}", shown(&dir), model_of(role));
        expected.expect_same(trained, &what).map_err(|e| failed(e.to_string(), OTHER_RUN))?;
        let [blocks, width] = match role {
            Part::Student => [config.student_blocks, config.student_width],
            Part::Teacher => [config.teacher_blocks, config.teacher_width],
        };
        // As many coordinates as the components have, which are read later.
        let counts_coordinates = role == Part::Teacher && config.targets != Targets::Factors;
        if blocks != expected.blocks || (width != expected.width && !counts_coordinates) {
            let what = format!("{what}: its configuration has {blocks} blocks of {width} values");
            return Err(failed(what, TRAIN_AGAIN));
        }
    }
    let weights = made.sum(TRANSLATOR_FILES[1])?.to_owned();
    if fold.is_none() {
        source.expect(&dir, &weights)?;
    }
    let manifest = settings.tuples_dir().join(MANIFEST);
    // A translator of another run has tuples of its own.
    let is_own = fold.is_some() || reuse.translator.as_os_str().is_empty();
    if is_own && manifest.is_file() && inputs.tuples != checksum_file(&manifest)? {
        let what = format!("{}: was trained on other tuples than {}", shown(&dir), shown(&manifest));
        return Err(failed(what, "run `gradtx train` in a directory of its own for these tuples"));
    }
    if fold.is_none() {
        settings.uses_translator(&weights);
    }
    sums.insert("tuples".into(), inputs.tuples.into());
    let path = dir.join(TRANSLATOR_FILES[2]);
    let students = serde_json::from_value(read_json(&path)?["students"].clone())
        .with_context(|| format!("{}: norms of the TinyLM's shadow updates", shown(&path)))?;
    let shape = [config.teacher_blocks, config.teacher_width];
    Ok(Translator { dir, sums, students, targets: config.targets, shape })
}

/// Opens a client's update of the TinyLM.
pub(crate) fn open_update(student: &ModelSpec, teacher: &ModelSpec, path: &Path) -> Result<UpdateVector> {
    let file = UpdateFile::open(path)?;
    let space = file.meta().space.clone();
    let same = student.space.expect_same(&space, &shown(path));
    let same = same.map_err(|different| foreign(&different.to_string(), student, teacher, &space, path));
    // The values only if they are as many as they should be. Then damage is found before anything
    // else is said about the file.
    let fits = [space.blocks, space.width] == [student.space.blocks, student.space.width];
    if !fits && let Err(error) = same {
        return Err(error);
    }
    let update = file.read()?;
    same.map(|()| update)
}

/// Why an update of another space cannot be used, and who can help.
fn foreign(
    different: &str,
    student: &ModelSpec,
    teacher: &ModelSpec,
    space: &UpdateSpace,
    path: &Path,
) -> anyhow::Error {
    if teacher.space.base_model == space.base_model && student.space.base_model != space.base_model {
        return failed(
            format!("{}: an update of the LLM; expected one of the TinyLM (its base model)", shown(path)),
            "translate what `gradtx finetune --model tiny` has written",
        );
    }
    let other = match space.base_model == student.space.base_model {
        true => "this client used another seed, starting adapter or adapter settings",
        false => "this client used another TinyLM",
    };
    let hint = format!("{other}; send it the run.toml and the model of this run, and let it fine-tune again");
    failed(different, hint)
}

/// Fails when a model of the run is another one than its tuples were made with, as far as the
/// run has tuples.
pub fn expect_run_model(settings: &RunSettings, role: Role, fingerprint: &str) -> Result<()> {
    let dir = settings.tuples_dir();
    let Ok(record) = record::read(&dir.join(RECORD_FILE)) else { return Ok(()) };
    let Some(curated) = record.inputs::<CurateInputs>(&dir)? else { return Ok(()) };
    let (name, known) = (role.name(), curated.model(role));
    if known == fingerprint {
        return Ok(());
    }
    let what = format!(
        "models.{name}: not the model that this run's tuples were made with: expected the fingerprint \
         {known}, found {fingerprint}"
    );
    Err(failed(
        what,
        "the model is damaged, or was replaced: copy it again; or use a run directory of its own",
    ))
}
