//! Cross-validation over groups of shadows: how good is each translator for clients whose task no
//! shadow has?
//!
//! In: a run with its tuple store. Its groups (`curate.group_by`) are divided into folds; the shadows
//! of one fold are left out of every translator, and one shadow pair of each of its groups plays a
//! client: its TinyLM update is translated, and its LLM update is what the client's own data would have
//! given. Out, in `RUN/cross-validation`: everything that the stages write for real clients, scores on
//! the groups' test examples, and [`CLIENTS_FILE`].
//!
//! Clients may also differ from the shadows ([`Variant`]): trained for longer, on a mixture of groups, with noise
//! on the update, of groups that have a part of their name in common and are all left out together. The results
//! lie in directories of the variants in `RUN/cross-validation`.
//!
//! Private data has no part in it, so a translator, rounds of refinement and thresholds of warnings can be
//! chosen by it before the first client comes.

pub mod client;
mod groups;
pub mod variants;

use crate::aggregate::{Aggregation, Allow};
use crate::artifacts::{Tuples, open_pair, open_tuples};
use crate::fold::Fold;
use crate::products::Details;
use crate::stages::evaluate::{self, Score};
use crate::stages::refine::{REFINEMENT_FILE, Refinement};
use crate::stages::translate::DETAILS_FILE;
use crate::stages::{refine, train, translate};
use crate::variant::Variant;
use anyhow::{Context as _, Result};
use client::ShadowClient;
use gradtx_run::config::{Config, RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::paths::{ADAPTER_DIR, UPDATE_FILE};
use gradtx_run::role::Role;
use gradtx_run::stage;
use gradtx_runtime::artifact::{read_json, write_json};
use gradtx_runtime::data::Purpose;
use gradtx_runtime::text::shown;
use gradtx_train::baselines::Method;
use gradtx_train::examples::Data;
use gradtx_train::model_spec::ModelSpec;
use groups::{Examples, Unit};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use variants::ClientVariant;

/// Directory of a cross-validation in a run directory.
pub const CROSS_VALIDATION_DIR: &str = "cross-validation";
/// The held-out shadow pairs that played clients, with what is known of each before it is scored.
pub const CLIENTS_FILE: &str = "clients.json";

/// What to compare, and on what.
#[derive(Clone, Debug, Default)]
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
    /// How clients differ from the shadows; all that is asked for.
    pub variants: Vec<Variant>,
    /// For [`Variant::FewerPrompts`]: texts of the prompts that are not asked.
    pub without_prompts: Vec<String>,
    /// For [`Variant::UnseenValue`]: texts, for each of which the groups whose name contains it are held out.
    pub leave_out: Vec<String>,
}

/// The clients of one variant.
#[derive(Clone, Debug)]
pub struct Found {
    /// How they differ from the shadows.
    pub variant: Variant,
    /// Directory of the results.
    pub home: PathBuf,
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
    /// Its directory, relative to that of the clients.
    #[serde(default)]
    pub dir: PathBuf,
    /// Checksum of its test examples, as its scores have it.
    pub data: String,
    /// How far its update is from the other shadows' span, where it was translated by products.
    pub distance: Option<f64>,
    /// Answers on which TinyLM and the first refined translation agree, as a part of all.
    pub agreement: Option<f64>,
}

/// Runs what is missing; returns the directory of the results of every variant.
pub fn run(context: &Context, args: &RunArgs, job: &Job) -> Result<Vec<Found>> {
    let home = args.run.join(CROSS_VALIDATION_DIR);
    let mut settings = RunSettings::open(args)?;
    let validation = Validation::open(context, args, &mut settings, job, &home)?;
    let mut found = vec![];
    for &variant in &job.variants {
        let home = match variant {
            Variant::AsCurated => home.clone(),
            other => home.join(other.name()),
        };
        let clients = validation.run(variant, &home)?;
        write_json(&home.join(CLIENTS_FILE), &json!(clients))?;
        found.push(Found { variant, home });
    }
    Ok(found)
}

struct Validation<'a> {
    context: &'a Context,
    /// For the stages, of which there are hundreds.
    silent: Context,
    args: &'a RunArgs,
    /// The settings on this device.
    config: Config,
    job: &'a Job,
    home: &'a Path,
    tuples: Tuples,
    public: Data,
    /// Rows of prompts that [`Variant::FewerPrompts`] does not ask.
    not_asked: Vec<usize>,
    models: [ModelSpec; 2],
    /// The file of the test examples.
    test: Vec<PathBuf>,
    /// Examples that a shadow was trained on.
    trained_on: usize,
    folds: Vec<Vec<Unit>>,
    /// The folds of [`Variant::UnseenValue`].
    left_out: Vec<Vec<Unit>>,
}

impl<'a> Validation<'a> {
    fn open(
        context: &'a Context,
        args: &'a RunArgs,
        settings: &mut RunSettings,
        job: &'a Job,
        home: &'a Path,
    ) -> Result<Self> {
        let config = settings.config().clone().on_device(context, home)?;
        let models = open_pair(&config, context.threads)?;
        let tuples = open_tuples(settings, [Some(&models[0].space), Some(&models[1].space)])?;
        tuples.verify()?;
        let public = Data::read(config.data.public.as_slice(), &config.data, "data.public")?;
        let test = match &job.data {
            Some(path) => vec![path.clone()],
            None => config.data.public.as_slice().to_vec(),
        };
        let units = groups::units(&config, &tuples, &public, job)?;
        let left_out = groups::left_out(&units, job)?;
        let folds = groups::folds(units, job.folds, config.seed)?;
        let not_asked = groups::not_asked(&public, job)?;
        let silent = context.with_ui(context.ui.for_many());
        let trained_on = config.curate.examples_per_subset;
        Ok(Self {
            context,
            silent,
            args,
            config,
            job,
            home,
            tuples,
            public,
            not_asked,
            models,
            test,
            trained_on,
            folds,
            left_out,
        })
    }

    fn run(&self, variant: Variant, home: &Path) -> Result<Vec<Client>> {
        let (folds, translators) = match variant {
            Variant::UnseenValue => (&self.left_out[..], home),
            _ => (&self.folds[..self.job.first.unwrap_or(usize::MAX).min(self.folds.len())], self.home),
        };
        let names: HashSet<&str> = folds.iter().flatten().map(|unit| unit.name.as_str()).collect();
        let what = match variant {
            Variant::AsCurated => "cross-validate".to_string(),
            other => format!("cross-validate {}", other.name()),
        };
        let mut progress = self.context.ui.progress(&what, names.len() as u64);
        let mut clients = vec![];
        for (i, units) in folds.iter().enumerate() {
            let mut fold = fold(translators, i, units);
            if variant == Variant::FewerPrompts {
                fold.rows.extend(&self.not_asked);
                groups::expect_prompts(&fold.rows, self.public.records.len())?;
            }
            for method in self.job.methods.iter().filter(|method| method.is_trained()) {
                train::run_fold(&self.silent, self.args, &fold, method.targets())?;
            }
            for (at, unit) in units.iter().enumerate() {
                let examples = match variant {
                    Variant::Mixture => Examples::mixture(unit, groups::partner(units, at)?),
                    _ => Examples::of(unit),
                };
                // A group that several texts of --leave-out name plays one client.
                if clients.iter().any(|client: &Client| client.name == examples.name) {
                    continue;
                }
                clients.push(self.client(variant, home, (i, &fold), unit.shadows[0], &examples)?);
                progress.set(clients.len() as u64, &examples.name);
            }
        }
        Ok(clients)
    }

    fn client(
        &self,
        variant: Variant,
        all: &Path,
        (number, fold): (usize, &Fold),
        shadow: usize,
        examples: &Examples,
    ) -> Result<Client> {
        let dir = Path::new(&format!("fold-{}", number + 1)).join(format!("shadow-{shadow:05}"));
        let home = all.join(&dir);
        let finetuned = |role: Role| home.join("finetuned").join(role.name());
        let mut data = String::new();
        for (role, model) in [Role::Tiny, Role::Llm].into_iter().zip(&self.models) {
            self.finetune(variant, finetuned(role), fold, model, shadow, examples)?;
            let name = format!("finetuned-{}", role.name());
            data = self.evaluate(&home, &name, role, &finetuned(role), examples)?.data;
        }
        let update = finetuned(Role::Tiny).join(UPDATE_FILE);
        let (mut distance, mut agreement) = (None, None);
        for &method in &self.job.methods {
            let out = home.join("translated").join(method.name());
            self.translate(&update, &out, method, fold, false)?;
            self.evaluate(&home, method.name(), Role::Llm, &out, examples)?;
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
                self.evaluate(&home, &name, Role::Llm, &refined, examples)?;
                let found: Refinement = json_of(&refined.join(REFINEMENT_FILE))?;
                agreement = agreement.or(found.rounds.first().map(|round| round.share));
            }
        }
        if let Some(&method) = self.job.methods.iter().find(|method| method.is_trained()) {
            let out = home.join("translated").join("random-student");
            self.translate(&update, &out, method, fold, true)?;
            self.evaluate(&home, "random-student", Role::Llm, &out, examples)?;
        }
        let name = examples.name.clone();
        Ok(Client { name, fold: number + 1, shadow, dir, data, distance, agreement })
    }

    /// The update of one model of a client.
    fn finetune(
        &self,
        variant: Variant,
        out: PathBuf,
        fold: &Fold,
        model: &ModelSpec,
        shadow: usize,
        examples: &Examples,
    ) -> Result<()> {
        let tuples = &self.tuples;
        if !variant.changes(model.role) {
            let client = ShadowClient { out, tuples, model, shadow, examples: self.trained_on };
            return stage::run(&self.silent, &client).map(drop);
        }
        let client = ClientVariant {
            out,
            variant,
            config: &self.config,
            tuples,
            held_out: &fold.held_out,
            public: &self.public,
            model,
            shadow,
            rows: &examples.subset,
        };
        stage::run(&self.silent, &client).map(drop)
    }

    fn translate(&self, update: &Path, out: &Path, method: Method, fold: &Fold, noise: bool) -> Result<()> {
        let job = translate::Job {
            updates: vec![update.to_owned()],
            out: out.to_owned(),
            method,
            aggregation: Aggregation::default(),
            random_student: noise,
            // A client that differs from the shadows is what is to be seen here.
            allow: Allow { outliers: self.job.variants != [Variant::AsCurated], ..Allow::default() },
            fold: Some(fold.clone()),
        };
        translate::run(&self.silent, self.args, &job)
    }

    /// Which split of the test files is read: the public data's own examples are those for training.
    fn purpose(&self) -> Purpose {
        if self.job.data.is_some() { Purpose::Testing } else { Purpose::Training }
    }

    fn evaluate(
        &self,
        home: &Path,
        name: &str,
        role: Role,
        model: &Path,
        examples: &Examples,
    ) -> Result<Score> {
        let job = evaluate::Job {
            data: self.test.clone(),
            out: home.join("evaluated").join(name),
            role,
            base: None,
            adapter: Some(model.join(ADAPTER_DIR)),
            part: Some(evaluate::Part {
                name: examples.name.clone(),
                rows: examples.test.clone(),
                purpose: self.purpose(),
            }),
        };
        evaluate::run(&self.silent, self.args, &job)
    }
}

/// The shadows of these groups, left out; what is made without them lies in a directory of `home`.
fn fold(home: &Path, number: usize, units: &[Unit]) -> Fold {
    let mut held_out: Vec<usize> = units.iter().flat_map(|unit| unit.shadows.iter().copied()).collect();
    held_out.sort_unstable();
    let rows = units.iter().flat_map(|unit| unit.rows.iter().copied()).collect();
    Fold { held_out, rows, dir: home.join(format!("fold-{}", number + 1)) }
}

/// A finished file of a stage.
fn json_of<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_value(read_json(path)?).with_context(|| format!("{}: malformed", shown(path)))
}
