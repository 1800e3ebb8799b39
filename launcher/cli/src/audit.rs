//! `audit`: what an update vector reveals about the examples that it was trained on.
//!
//! In: an update, and canaries of which it is known which were trained on; or examples that were and
//! examples that were not. Out: how well three attacks tell them apart, and for canaries a lower bound
//! on ε. Also: a client's data with canaries in it.

use crate::model_args::{Model, ModelArgs};
use anyhow::Result;
use gradtx_pipeline::canaries::{Insertion, Key, key_beside};
use gradtx_run::config::{Config, DeviceKind, DtypeKind};
use gradtx_run::context::Context;
use gradtx_run::dispatch::dispatch;
use gradtx_run::failure::{failed, unusable, unusable_with};
use gradtx_run::role::Role;
use gradtx_runtime::artifact::{Privacy, UpdateFile, UpdateVector, write_json};
use gradtx_runtime::data::Record;
use gradtx_runtime::text::shown;
use gradtx_train::audit::scores::{Attack, Scores, Scoring};
use gradtx_train::audit::statistics::{EpsilonBound, area_under_curve, epsilon_bound, true_positive_rate};
use gradtx_train::examples::Data;
use gradtx_train::prompts::Prompts;
use serde::Serialize;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Confidence of the bound on ε.
const CONFIDENCE: f64 = 0.95;
/// δ of the bound where the update states none.
const DELTA: f64 = 1e-5;

/// Measure what an update reveals about its training examples, with canaries or known members.
#[derive(Debug, clap::Args)]
pub struct Job {
    /// The model that the update is of.
    #[command(flatten)]
    model: ModelArgs,
    /// Write a client's data (--data) to --out with a random half of N canaries among it, and the key beside it.
    #[arg(long, value_name = "N", requires_all = ["data", "out"], conflicts_with_all = ["update", "members", "delta"])]
    insert_canaries: Option<usize>,
    /// The client's data, for --insert-canaries.
    #[arg(long, value_name = "FILE", requires = "insert_canaries")]
    data: Option<PathBuf>,
    /// Seed of the canaries and of the coins that decide which are put in (default: from the system).
    #[arg(long, value_name = "N", requires = "insert_canaries")]
    seed: Option<u64>,
    /// Key of the canaries: written with --insert-canaries (default: OUT with the ending key.json), else read.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The update vector to attack.
    #[arg(long, value_name = "FILE", required_unless_present = "insert_canaries")]
    update: Option<PathBuf>,
    /// Examples that the update was trained on, in the place of canaries.
    #[arg(long, value_name = "FILE", requires = "non_members", conflicts_with = "key")]
    members: Option<PathBuf>,
    /// Examples of the same kind that it was not trained on.
    #[arg(long, value_name = "FILE", requires = "members")]
    non_members: Option<PathBuf>,
    /// δ at which ε is bounded (default: the update's own, or 1e-5).
    #[arg(long, value_name = "DELTA")]
    delta: Option<f64>,
    /// The data with canaries; or a file (JSON) of the results.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Where to compute; the same as `--set device.kind=…`.
    #[arg(long, value_enum)]
    device: Option<DeviceKind>,
    /// Type of activations and weights; the same as `--set device.dtype=…`.
    #[arg(long, value_enum)]
    dtype: Option<DtypeKind>,
}

/// What attacks found.
#[derive(Debug, Serialize)]
struct Audit {
    /// Scored examples that were trained on.
    members: usize,
    /// Scored examples that were not.
    others: usize,
    /// The guarantee that the update states.
    privacy: Privacy,
    /// The attacks.
    attacks: Vec<Found>,
    /// The largest lower bound on ε; none where members are not chosen by coins.
    epsilon: Option<Epsilon>,
    /// The update promises less than this bound, at a δ that is no smaller.
    refutes_statement: bool,
}

/// What one attack found.
#[derive(Debug, Serialize)]
struct Found {
    attack: &'static str,
    auc: f64,
    tpr_at_fpr_0_001: f64,
    tpr_at_fpr_0_01: f64,
    bound: Option<EpsilonBound>,
}

/// A lower bound on ε.
#[derive(Debug, Serialize)]
struct Epsilon {
    at_least: f64,
    delta: f64,
    confidence: f64,
}

/// Inserts canaries, or attacks.
pub(crate) fn run(context: &Context, job: &Job) -> Result<()> {
    match (job.insert_canaries, &job.data, &job.out, &job.update) {
        (Some(count), Some(data), Some(out), _) => insert(context, job, count, data, out),
        (None, _, _, Some(update)) => attack(context, job, update),
        _ => Err(unusable("expected --insert-canaries N with --data and --out, or --update")),
    }
}

fn insert(context: &Context, job: &Job, count: usize, data: &Path, out: &Path) -> Result<()> {
    let ModelArgs { run, config, set, .. } = &job.model;
    let config = match (run, config) {
        (None, None) => {
            let config = Config::default().with_overrides(set)?;
            config.check()?;
            config
        }
        _ => Config::look(run.as_deref(), config.as_deref(), None, set)?,
    };
    let key_path = job.key.clone().unwrap_or_else(|| key_beside(out));
    let key = Insertion { data, out, key: &key_path, count, seed: job.seed }.run(&config.data)?;
    let included = key.canaries.iter().filter(|canary| canary.included).count();
    context.ui.line(format!(
        "audit: {included} of {count} canaries among the data, {}; the key, which nobody else may see: {}",
        shown(out),
        shown(&key_path)
    ));
    context.ui.result_object("audit", json!({ "canaries": count, "included": included, "out": shown(out) }));
    Ok(())
}

fn attack(context: &Context, job: &Job, path: &Path) -> Result<()> {
    if job.delta.is_some_and(|delta| !(delta > 0.0 && delta < 1.0)) {
        return Err(unusable("--delta: expected a number above 0 and below 1"));
    }
    let mut model = job.model.resolve(Role::Tiny)?;
    model.config.device.kind = job.device.unwrap_or(model.config.device.kind);
    model.config.device.dtype = job.dtype.unwrap_or(model.config.device.dtype);
    let spec = model.spec(None, context.threads)?;
    let file = UpdateFile::open(path)?;
    spec.space.expect_same(&file.meta().space, &shown(path)).map_err(|error| {
        failed(error.to_string(), "use the run or the package that the update was made in")
    })?;
    let update = file.read()?;
    let (records, is_member) = job.targets(&model)?;
    let prompts = Prompts::new(&model.config.data, &spec.dir, &spec.model, records.first())?;
    let examples = prompts.examples(&records, context.threads)?.0.examples;
    let scoring = Scoring { context, side: &spec, update: &update.values, examples: &examples };
    let scores = dispatch(&model.config.device, context, scoring)?;
    let audit = job.judge(&scores, &is_member, &update);
    if let Some(out) = &job.out {
        write_json(out, &audit)?;
    }
    if !context.ui.is_json() {
        context.ui.result(audit.text());
    }
    context.ui.result_object("audit", serde_json::to_value(&audit)?);
    Ok(())
}

impl Job {
    /// What is scored, and which of it was trained on.
    fn targets(&self, model: &Model) -> Result<(Vec<Record>, Vec<bool>)> {
        let config = &model.config.data;
        match (&self.key, &self.members, &self.non_members) {
            (Some(path), _, _) => {
                let key = Key::read(path)?;
                let is_member = key.canaries.iter().map(|canary| canary.included).collect();
                Ok((key.records(path, config)?, is_member))
            }
            (None, Some(members), Some(others)) => {
                let read = |path: &PathBuf, option| Data::read(std::slice::from_ref(path), config, option);
                let mut records = read(members, "--members")?.records;
                let count = records.len();
                records.extend(read(others, "--non-members")?.records);
                let is_member = (0..records.len()).map(|i| i < count).collect();
                Ok((records, is_member))
            }
            _ => {
                let hint = "give --key with the key of canaries, or --members and --non-members";
                Err(unusable_with("nothing says what was trained on", Some(hint.into())))
            }
        }
    }

    fn judge(&self, scores: &[Scores], is_member: &[bool], update: &UpdateVector) -> Audit {
        let privacy = update.meta.privacy.clone();
        let stated = match &privacy {
            Privacy::None => None,
            Privacy::DpSgd { epsilon, delta, .. } => Some((*epsilon, *delta)),
        };
        let delta = self.delta.or(stated.map(|(_, delta)| delta)).unwrap_or(DELTA);
        let by_coins = self.key.is_some();
        let found = |(i, attack): (usize, Attack)| {
            let of = |wanted: bool| -> Vec<f64> {
                let chosen = scores.iter().zip(is_member).filter(|(_, member)| **member == wanted);
                chosen.map(|(scores, _)| scores[i]).collect()
            };
            let (members, others) = (of(true), of(false));
            let all: Vec<(f64, bool)> = scores.iter().map(|s| s[i]).zip(is_member.iter().copied()).collect();
            Found {
                attack: attack.name(),
                auc: area_under_curve(&members, &others),
                tpr_at_fpr_0_001: true_positive_rate(&members, &others, 0.001),
                tpr_at_fpr_0_01: true_positive_rate(&members, &others, 0.01),
                bound: by_coins.then(|| epsilon_bound(&all, delta, CONFIDENCE, Attack::ALL.len())),
            }
        };
        let attacks: Vec<Found> = Attack::ALL.into_iter().enumerate().map(found).collect();
        let largest =
            attacks.iter().filter_map(|found| found.bound.map(|bound| bound.epsilon)).reduce(f64::max);
        let refutes = |(epsilon, at): (f64, f64)| at <= delta && largest.is_some_and(|bound| bound > epsilon);
        Audit {
            members: is_member.iter().filter(|member| **member).count(),
            others: is_member.iter().filter(|member| !**member).count(),
            privacy,
            attacks,
            epsilon: largest.map(|at_least| Epsilon { at_least, delta, confidence: CONFIDENCE }),
            refutes_statement: stated.is_some_and(refutes),
        }
    }
}

impl Audit {
    fn text(&self) -> String {
        let mut text = format!(
            "audit: {} examples that were trained on, {} that were not\n\n{:<20} {:>6} {:>13} {:>12}",
            self.members, self.others, "attack", "AUC", "TPR at 0.1 %", "TPR at 1 %"
        );
        for found in &self.attacks {
            let Found { attack, auc, tpr_at_fpr_0_001, tpr_at_fpr_0_01, .. } = found;
            text += &format!("\n{attack:<20} {auc:>6.3} {tpr_at_fpr_0_001:>13.3} {tpr_at_fpr_0_01:>12.3}");
        }
        if self.others < 1000 {
            text += &format!("\nof {} examples that were not, a rate of 0.1 % allows none", self.others);
        }
        if let Some(Epsilon { at_least, delta, confidence }) = self.epsilon {
            let confidence = 100.0 * confidence;
            text += &format!(
                "\n\nε is at least {at_least:.3} at δ {delta:e}, with a confidence of {confidence} %"
            );
        }
        text += &format!("\nthe update states: {}", self.privacy);
        if self.refutes_statement {
            text += "\nthe bound refutes this statement: the update is not as private as it says";
        }
        text
    }
}
