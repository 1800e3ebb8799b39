//! Cross-validation over groups of shadows: how good is each translator for clients whose task no
//! shadow has?
//!
//! In: a run with its tuple store. Its groups (`curate.group_by`) are divided into folds; the shadows
//! of one fold are left out of every translator, and one shadow pair of each of its groups plays a
//! client: its TinyLM update is translated, and its LLM update is what the client's own data would have
//! given. Out, in `RUN/cross-validation`: everything that the stages write for real clients, scores on
//! the groups' test examples, and [`CLIENTS_FILE`].
//!
//! Private data has no part in it, so a translator, rounds of refinement and thresholds of warnings can be
//! chosen by it before the first client comes.

pub mod client;

use crate::aggregate::{Aggregation, Allow};
use crate::artifacts::{Tuples, open_side, open_tuples};
use crate::fold::Fold;
use crate::products::Details;
use crate::stages::evaluate::{self, Score};
use crate::stages::refine::{REFINEMENT_FILE, Refinement};
use crate::stages::translate::DETAILS_FILE;
use crate::stages::{refine, train, translate};
use anyhow::{Context as _, Result};
use client::ShadowClient;
use gradtx_kernels::rng::{Stream, derive, derive_named};
use gradtx_run::config::{Config, GroupBy, RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::failure::{failed, unusable};
use gradtx_run::paths::{ADAPTER_DIR, UPDATE_FILE};
use gradtx_run::role::Role;
use gradtx_run::stage;
use gradtx_runtime::artifact::{read_json, write_json};
use gradtx_runtime::data::Purpose;
use gradtx_runtime::text::shown;
use gradtx_train::baselines::Method;
use gradtx_train::examples::{Data, Group};
use gradtx_train::model_spec::ModelSpec;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

/// Directory of a cross-validation in a run directory.
pub(crate) const CROSS_VALIDATION_DIR: &str = "cross-validation";
/// The held-out shadow pairs that played clients, with what is known of each before it is scored.
pub const CLIENTS_FILE: &str = "clients.json";

/// What to compare, and on what.
#[derive(Clone, Debug)]
pub struct Job {
    /// Parts of the groups, of which one at a time is left out.
    pub folds: usize,
    /// So many of the folds alone.
    pub first: Option<usize>,
    /// The translators.
    pub methods: Vec<Method>,
    /// Those whose translations are refined as well.
    pub refined: Vec<Method>,
    /// Test examples with the column `curate.group_by`; without, a group's public examples that its
    /// client was not trained on.
    pub data: Option<PathBuf>,
    /// Test examples of a group at most.
    pub examples: usize,
}

/// A held-out shadow pair that played a client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Client {
    /// Its group.
    pub name: String,
    /// Its fold, from 1.
    pub fold: usize,
    /// Shadow index.
    pub shadow: usize,
    /// Checksum of its test examples, as its scores have it.
    pub data: String,
    /// How far its update is from the other shadows' span, where it was translated by products.
    pub distance: Option<f64>,
    /// Answers on which TinyLM and the first refined translation agree, as a part of all.
    pub agreement: Option<f64>,
}

/// Runs what is missing; returns the directory of the results.
pub fn run(context: &Context, args: &RunArgs, job: &Job) -> Result<PathBuf> {
    let home = args.run.join(CROSS_VALIDATION_DIR);
    let mut settings = RunSettings::open(args)?;
    let validation = Validation::open(context, args, &mut settings, job, &home)?;
    let clients = validation.run()?;
    write_json(&home.join(CLIENTS_FILE), &json!(clients))?;
    Ok(home)
}

/// A group of shadows with its rows of the public data and of the test data.
struct Unit {
    name: String,
    shadows: Vec<usize>,
    rows: Vec<usize>,
    test: Vec<usize>,
}

struct Validation<'a> {
    context: &'a Context,
    /// For the stages, of which there are hundreds.
    silent: Context,
    args: &'a RunArgs,
    job: &'a Job,
    home: &'a Path,
    tuples: Tuples,
    models: [ModelSpec; 2],
    /// The file of the test examples.
    test: Vec<PathBuf>,
    /// Examples that a shadow was trained on.
    trained_on: usize,
    folds: Vec<Vec<Unit>>,
}

impl<'a> Validation<'a> {
    fn open(
        context: &'a Context,
        args: &'a RunArgs,
        settings: &mut RunSettings,
        job: &'a Job,
        home: &'a Path,
    ) -> Result<Self> {
        let config = &settings.config().clone().on_device(context, home)?;
        let models = [Role::Tiny, Role::Llm].map(|role| open_side(config, role, context.threads));
        let [tiny, llm] = models;
        let models = [tiny?, llm?];
        let tuples = open_tuples(settings, [Some(&models[0].space), Some(&models[1].space)])?;
        tuples.verify()?;
        let public = Data::read(config.data.public.as_slice(), &config.data, "data.public")?;
        let test = match &job.data {
            Some(path) => vec![path.clone()],
            None => config.data.public.as_slice().to_vec(),
        };
        let units = units(config, &tuples, &public, job)?;
        let folds = folds(units, job.folds, config.seed)?;
        let silent = context.with_ui(context.ui.for_many());
        let trained_on = config.curate.examples_per_subset;
        Ok(Self { context, silent, args, job, home, tuples, models, test, trained_on, folds })
    }

    fn run(&self) -> Result<Vec<Client>> {
        let count = self.job.first.unwrap_or(self.folds.len()).min(self.folds.len());
        let all: usize = self.folds[..count].iter().map(Vec::len).sum();
        let mut progress = self.context.ui.progress("cross-validate", all as u64);
        let mut clients = vec![];
        for (i, units) in self.folds[..count].iter().enumerate() {
            let fold = self.fold(i, units);
            for method in self.job.methods.iter().filter(|method| method.is_trained()) {
                train::run_fold(&self.silent, self.args, &fold, method.targets())?;
            }
            for unit in units {
                clients.push(self.client(i, &fold, unit)?);
                progress.set(clients.len() as u64, &unit.name);
            }
        }
        Ok(clients)
    }

    fn fold(&self, number: usize, units: &[Unit]) -> Fold {
        let mut held_out: Vec<usize> = units.iter().flat_map(|unit| unit.shadows.iter().copied()).collect();
        held_out.sort_unstable();
        let rows = units.iter().flat_map(|unit| unit.rows.iter().copied()).collect();
        Fold { held_out, rows, dir: self.home.join(format!("fold-{}", number + 1)) }
    }

    fn client(&self, number: usize, fold: &Fold, unit: &Unit) -> Result<Client> {
        let (shadow, home) = (unit.shadows[0], fold.dir.join(format!("shadow-{:05}", unit.shadows[0])));
        let finetuned = |role: Role| home.join("finetuned").join(role.name());
        let mut data = String::new();
        for (role, model) in [Role::Tiny, Role::Llm].into_iter().zip(&self.models) {
            let (out, tuples, examples) = (finetuned(role), &self.tuples, self.trained_on);
            stage::run(&self.silent, &ShadowClient { out, tuples, model, shadow, examples })?;
            let name = format!("finetuned-{}", role.name());
            data = self.evaluate(&home, &name, role, &finetuned(role), unit)?.data;
        }
        let update = finetuned(Role::Tiny).join(UPDATE_FILE);
        let (mut distance, mut agreement) = (None, None);
        for &method in &self.job.methods {
            let out = home.join("translated").join(method.name());
            self.translate(&update, &out, method, fold, false)?;
            self.evaluate(&home, method.name(), Role::Llm, &out, unit)?;
            if method == Method::Products {
                distance = json_of::<Details>(&out.join(DETAILS_FILE))?.distance.first().copied();
            }
            if self.job.refined.contains(&method) {
                let name = format!("{}-refined", method.name());
                let refined = home.join("translated").join(&name);
                let job = refine::Job {
                    updates: vec![update.clone()],
                    translated: out,
                    out: refined.clone(),
                    fold: Some(fold.clone()),
                };
                refine::run(&self.silent, self.args, &job)?;
                self.evaluate(&home, &name, Role::Llm, &refined, unit)?;
                let found: Refinement = json_of(&refined.join(REFINEMENT_FILE))?;
                agreement = agreement.or(found.rounds.first().map(|round| round.share));
            }
        }
        if let Some(&method) = self.job.methods.iter().find(|method| method.is_trained()) {
            let out = home.join("translated").join("random-student");
            self.translate(&update, &out, method, fold, true)?;
            self.evaluate(&home, "random-student", Role::Llm, &out, unit)?;
        }
        Ok(Client { name: unit.name.clone(), fold: number + 1, shadow, data, distance, agreement })
    }

    fn translate(&self, update: &Path, out: &Path, method: Method, fold: &Fold, noise: bool) -> Result<()> {
        let job = translate::Job {
            updates: vec![update.to_owned()],
            out: out.to_owned(),
            method,
            aggregation: Aggregation::default(),
            random_student: noise,
            allow: Allow::default(),
            fold: Some(fold.clone()),
        };
        translate::run(&self.silent, self.args, &job)
    }

    /// Which split of the test files is read: the public data's own examples are those for training.
    fn purpose(&self) -> Purpose {
        if self.job.data.is_some() { Purpose::Testing } else { Purpose::Training }
    }

    fn evaluate(&self, home: &Path, name: &str, role: Role, model: &Path, unit: &Unit) -> Result<Score> {
        let job = evaluate::Job {
            data: self.test.clone(),
            out: home.join("evaluated").join(name),
            role,
            base: None,
            adapter: Some(model.join(ADAPTER_DIR)),
            part: Some(evaluate::Part {
                name: unit.name.clone(),
                rows: unit.test.clone(),
                purpose: self.purpose(),
            }),
        };
        evaluate::run(&self.silent, self.args, &job)
    }
}

/// A finished file of a stage.
fn json_of<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_value(read_json(path)?).with_context(|| format!("{}: malformed", shown(path)))
}

/// The groups of the shadow pairs, with their rows.
fn units(config: &Config, tuples: &Tuples, public: &Data, job: &Job) -> Result<Vec<Unit>> {
    let known = &tuples.store.manifest().provenance["data"];
    if *known != *public.checksum {
        let what = format!("data.public: is not the data that the tuples were made of ({known})");
        return Err(failed(what, "give the same files; see `gradtx inspect` of the tuple store"));
    }
    let Some(labels) = tuples.groups()? else {
        let what = "the tuple store does not say which shadows are of one group: an older version made it";
        return Err(failed(what, "run `gradtx curate` again in a new directory"));
    };
    let subsets = tuples.subsets()?;
    let column = match &config.curate.group_by {
        GroupBy::Column(column) if config.curate.dirichlet_alpha == 0.0 => Some(column.as_str()),
        _ => None,
    };
    let by_column = column.map(|column| public.groups(column)).transpose()?;
    let tests = match &job.data {
        None => None,
        Some(path) => {
            let test = Data::read_for_test(std::slice::from_ref(path), &config.data, "--data")?;
            Some((column.map(|column| test.groups(column)).transpose()?, test.records.len()))
        }
    };
    let mut shadows: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (pair, label) in labels.iter().enumerate() {
        shadows.entry(*label).or_default().push(pair);
    }
    let key = derive_named(config.seed, "test examples of groups");
    let mut units = vec![];
    for (label, pairs) in shadows {
        let (name, rows) = match &by_column {
            Some(groups) => {
                let group: &Group = groups.get(label).with_context(|| {
                    format!("groups.json names group {label}; data.public has {}", groups.len())
                })?;
                (group.name.clone(), group.rows.clone())
            }
            None => (format!("shadow {label}"), subsets[pairs[0]].clone()),
        };
        let candidates: Vec<usize> = match &tests {
            Some((Some(groups), _)) => {
                groups.iter().find(|group| group.name == name).map_or(vec![], |group| group.rows.clone())
            }
            Some((None, count)) => (0..*count).collect(),
            None => {
                let seen: HashSet<usize> = subsets[pairs[0]].iter().copied().collect();
                rows.iter().copied().filter(|row| !seen.contains(row)).collect()
            }
        };
        if candidates.is_empty() {
            let what = match &job.data {
                Some(path) => format!("{}: no test example of group `{name}`", shown(path)),
                None => format!("group `{name}`: its client was trained on all of its examples"),
            };
            return Err(failed(what, "give test examples of every group with --data"));
        }
        let order = Stream::new(derive(key, label as u64)).permutation(candidates.len());
        let mut test: Vec<usize> = order.into_iter().take(job.examples).map(|i| candidates[i]).collect();
        test.sort_unstable();
        let shadows = pairs.iter().map(|&pair| tuples.store.shadow(pair)).collect();
        units.push(Unit { name, shadows, rows, test });
    }
    Ok(units)
}

/// The groups in folds, drawn by the seed.
fn folds(units: Vec<Unit>, count: usize, seed: u64) -> Result<Vec<Vec<Unit>>> {
    if count < 2 || units.len() < count {
        return Err(unusable(format!(
            "--folds is {count}: expected 2 to {}, the number of groups of shadows",
            units.len()
        )));
    }
    let order = Stream::new(derive_named(seed, "folds of cross-validation")).permutation(units.len());
    let mut at: Vec<(usize, Unit)> = order.into_iter().zip(units).collect();
    at.sort_by_key(|(place, _)| *place);
    let mut folds: Vec<Vec<Unit>> = (0..count).map(|_| vec![]).collect();
    at.into_iter().enumerate().for_each(|(i, (_, unit))| folds[i % count].push(unit));
    Ok(folds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(i: usize) -> Unit {
        Unit { name: format!("t{i}"), shadows: vec![i], rows: vec![], test: vec![] }
    }

    #[test]
    fn every_group_is_in_one_fold() {
        let folds = folds((0..10).map(unit).collect(), 4, 7).unwrap();
        assert_eq!(folds.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 2, 2]);
        let mut all: Vec<usize> = folds.iter().flatten().map(|unit| unit.shadows[0]).collect();
        assert_ne!(all, (0..10).collect::<Vec<_>>());
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
        assert!(super::folds(vec![unit(0)], 2, 7).is_err());
    }
}
