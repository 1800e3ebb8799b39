//! Losses over steps: shadow jobs, clients, and the translator.
//!
//! In: the `metrics` files of the stages. Out: curves of at most `POINTS` points, each
//! the mean over its steps, and for many jobs the median and the middle 80 % over jobs. A
//! loss that is not a number is counted and left out.

use super::source::Source;
use crate::spread::Spread;
use crate::table::{display_name, natural};
use gradtx_pipeline::records::FinetuneInputs;
use gradtx_run::paths::UPDATE_FILE;
use gradtx_run::role::Role;
use gradtx_runtime::artifact::{Privacy, UpdateVector};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Most points of a curve.
pub(crate) const POINTS: u64 = 200;
/// What stages call the learning rate in their metrics.
const LEARNING_RATE: &str = "learning_rate";

/// (step from 1, value) of one job; values may be NaN.
type Losses = Vec<(u64, f64)>;

/// A curve.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Series {
    /// Last step that each point is the mean over.
    pub steps: Vec<u64>,
    /// The mean, `null` where no step had a number.
    pub values: Vec<Option<f64>>,
}

/// The losses of several jobs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct JobLosses {
    /// Jobs.
    pub jobs: usize,
    /// Steps of the longest.
    pub steps: u64,
    /// Last step that each point is the mean over.
    pub at: Vec<u64>,
    /// At each point, the spread over jobs.
    pub loss: Vec<Option<Spread>>,
    /// Spread over jobs of the mean loss in the first twentieth of the steps.
    pub first: Option<Spread>,
    /// The same in the last twentieth.
    pub last: Option<Spread>,
    /// Jobs whose loss was lower in the last twentieth than in the first.
    pub improved: usize,
    /// Losses that were not numbers.
    pub not_finite: usize,
    /// Learning rate of the first job, where it was written down: all jobs have the same schedule.
    pub learning_rate: Series,
}

impl JobLosses {
    fn of(jobs: &[Losses], rates: &[(u64, f64)]) -> Option<Self> {
        let steps = jobs.iter().flatten().map(|(step, _)| *step).max()?;
        let every: Vec<Series> = jobs.iter().map(|job| thin(job, steps)).collect();
        let at = every.iter().max_by_key(|s| s.steps.len())?.steps.clone();
        let loss = at.iter().map(|step| {
            Spread::of(every.iter().filter_map(|series| {
                let place = series.steps.iter().position(|s| s == step)?;
                series.values[place]
            }))
        });
        let ends: Vec<(f64, f64)> = jobs.iter().map(|job| ends(job, steps)).collect();
        Some(Self {
            jobs: jobs.len(),
            steps,
            loss: loss.collect(),
            at,
            first: Spread::of(ends.iter().map(|e| e.0)),
            last: Spread::of(ends.iter().map(|e| e.1)),
            improved: ends.iter().filter(|(first, last)| last < first).count(),
            not_finite: jobs.iter().flatten().filter(|(_, loss)| !loss.is_finite()).count(),
            learning_rate: thin(rates, steps),
        })
    }
}

/// A curve of at most `POINTS` points over so many steps.
pub fn thin(losses: &[(u64, f64)], steps: u64) -> Series {
    let width = steps.div_ceil(POINTS).max(1);
    let mut parts: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for &(step, loss) in losses {
        parts.entry(step.saturating_sub(1) / width).or_default().push(loss);
    }
    let step = |part: &u64| ((part + 1) * width).min(steps);
    Series {
        steps: parts.keys().map(step).collect(),
        values: parts.values().map(|values| mean(values.iter().copied())).collect(),
    }
}

/// Mean loss of the first and of the last twentieth of the steps; NaN where there is none.
fn ends(losses: &[(u64, f64)], steps: u64) -> (f64, f64) {
    let part = (steps / 20).max(1);
    let of = |keep: &dyn Fn(u64) -> bool| {
        mean(losses.iter().filter(|(step, _)| keep(*step)).map(|l| l.1)).unwrap_or(f64::NAN)
    };
    (of(&|step| step <= part), of(&|step| step > steps - part))
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0.0);
    for value in values.filter(|x| x.is_finite()) {
        sum += value;
        count += 1.0;
    }
    (count > 0.0).then(|| sum / count)
}

/// A number of a record; what is not one is NaN.
fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

/// Steps and one number of every record that has a step.
fn column(lines: &[Value], name: &str) -> Losses {
    let pair = |line: &Value| Some((line["step"].as_u64()?, number(&line[name])));
    lines.iter().filter_map(pair).collect()
}

/// The same of the records that have that number at all.
fn written(lines: &[Value], name: &str) -> Losses {
    column(lines, name).into_iter().filter(|(_, value)| value.is_finite()).collect()
}

/// Shadow fine-tuning.
#[derive(Debug, Serialize)]
pub struct Shadow {
    /// Of the TinyLM.
    pub tiny: Option<JobLosses>,
    /// Of the LLM.
    pub llm: Option<JobLosses>,
}

impl Shadow {
    /// From `RUN/shadow/metrics`.
    pub fn of(source: &mut Source) -> Self {
        let [tiny, llm] = [Role::Tiny, Role::Llm].map(|role| {
            let (jobs, rates) = shadow_jobs(source, role);
            let planned = source.config.as_ref().map(|config| config.curate.num_subsets);
            if let Some(planned) = planned.filter(|&planned| jobs.len() < planned) {
                let done = jobs.len();
                source.missing_for_translation(format!(
                    "Shadow fine-tuning, {}: {done} of {planned} jobs.",
                    display_name(role)
                ));
            }
            JobLosses::of(&jobs, &rates)
        });
        Self { tiny, llm }
    }
}

/// Losses of all jobs of a model, and the learning rates of the first.
fn shadow_jobs(source: &mut Source, role: Role) -> (Vec<Losses>, Losses) {
    let dir = source.tuples.join("metrics");
    let prefix = format!("{}-", role.name());
    let mut files: Vec<_> = std::fs::read_dir(&dir)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    files.retain(|path| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        name.starts_with(&prefix) && name.ends_with(".jsonl")
    });
    files.sort();
    let mut jobs: BTreeMap<u64, Losses> = BTreeMap::new();
    let mut rates: BTreeMap<u64, Losses> = BTreeMap::new();
    for line in files.iter().flat_map(|path| source.lines(path)) {
        if let (Some(subset), Some(step)) = (line["subset"].as_u64(), line["step"].as_u64()) {
            jobs.entry(subset).or_default().push((step, number(&line["loss"])));
            if line.get(LEARNING_RATE).is_some() {
                rates.entry(subset).or_default().push((step, number(&line[LEARNING_RATE])));
            }
        }
    }
    (jobs.into_values().collect(), rates.into_values().next().unwrap_or_default())
}

/// Fine-tuning on private data.
#[derive(Debug, Serialize)]
pub struct Clients {
    /// Losses of all clients' TinyLMs.
    pub tiny: Option<JobLosses>,
    /// Losses of all LLMs fine-tuned on private data.
    pub llm: Option<JobLosses>,
    /// Every fine-tuning by itself.
    pub each: Vec<Client>,
}

/// One model fine-tuned on one client's data.
#[derive(Debug, Serialize)]
pub struct Client {
    /// Its directory.
    pub name: String,
    /// Which model; unknown without the run's tuples.
    pub model: Option<Role>,
    /// Checksum of its data.
    pub data: Option<String>,
    /// Examples that it was trained on.
    pub examples: Option<u64>,
    /// Euclidean norm of its update.
    pub update_norm: Option<f64>,
    /// The guarantee that its update carries.
    pub privacy: Option<Privacy>,
    /// Its loss.
    pub loss: Series,
    /// Mean loss in the first twentieth of the steps.
    pub first: Option<f64>,
    /// Mean loss in the last twentieth of the steps.
    pub last: Option<f64>,
}

impl Clients {
    /// From every directory of `finetune`.
    pub fn of(source: &mut Source) -> Self {
        let found = source.inputs::<FinetuneInputs>();
        let found: Vec<_> = found.map(|(s, inputs)| (s.dir.clone(), s.name.clone(), inputs)).collect();
        if found.is_empty() {
            source.missing("No client: run `gradtx finetune`.");
        }
        let (mut each, mut losses) = (vec![], vec![]);
        for (dir, name, inputs) in found {
            let lines = source.lines(&dir.join("metrics.jsonl"));
            let (job, job_rates) = (column(&lines, "loss"), written(&lines, LEARNING_RATE));
            let model = source.role_of(&inputs.model);
            let update = read_update(source, &dir.join(UPDATE_FILE));
            let steps = job.iter().map(|l| l.0).max().unwrap_or(0);
            let (first, last) = ends(&job, steps);
            let square = |u: &UpdateVector| u.values.iter().map(|&x| (x as f64).powi(2)).sum::<f64>();
            each.push(Client {
                name,
                model,
                data: Some(inputs.data.data),
                examples: update.as_ref().map(|u| u.meta.examples),
                update_norm: update.as_ref().map(|u| square(u).sqrt()),
                privacy: update.map(|u| u.meta.privacy),
                loss: thin(&job, steps),
                first: Some(first).filter(|x| x.is_finite()),
                last: Some(last).filter(|x| x.is_finite()),
            });
            losses.push((model, job, job_rates));
        }
        each.sort_by_cached_key(|client: &Client| natural(&client.name));
        let of_role = |role| {
            let jobs = losses.iter().filter(|(model, job, _)| *model == Some(role) && !job.is_empty());
            let rates = jobs.clone().map(|(_, _, rates)| rates.as_slice()).find(|rates| !rates.is_empty());
            JobLosses::of(&jobs.map(|(_, job, _)| job.clone()).collect::<Vec<_>>(), rates.unwrap_or_default())
        };
        Self { tiny: of_role(Role::Tiny), llm: of_role(Role::Llm), each }
    }
}

fn read_update(source: &mut Source, path: &Path) -> Option<UpdateVector> {
    if !path.is_file() {
        return None;
    }
    UpdateVector::read(path).map_err(|error| source.note(path, error.to_string())).ok()
}

/// Training of the Grad-Transformer.
#[derive(Debug, Serialize)]
pub struct Translator {
    /// Steps done.
    pub steps: u64,
    /// Steps that the settings ask for.
    pub planned: Option<u64>,
    /// Training loss, in the units of the normalisation.
    pub loss: Series,
    /// Norm of the gradient before clipping.
    pub grad_norm: Series,
    /// Learning rate, where it was written down.
    pub learning_rate: Series,
    /// Every validation by generation.
    pub validations: Vec<Validation>,
    /// The one with the smallest relative error: the model that was kept.
    pub best: Option<Validation>,
    /// Losses that were not numbers.
    pub not_finite: usize,
}

/// A validation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Validation {
    /// After this step.
    pub step: u64,
    /// Squared error over that of always predicting the mean teacher.
    pub relative_error: Option<f64>,
    /// Mean squared error.
    pub mse: Option<f64>,
    /// Relative error of every block of the LLM; empty where it was not measured.
    pub relative_error_by_block: Vec<Option<f64>>,
}

impl Translator {
    /// From `RUN/translator`.
    pub fn of(source: &mut Source) -> Option<Self> {
        let path = source.translator.join("metrics.jsonl");
        let lines = source.lines(&path);
        let loss = column(&lines, "loss");
        let Some(steps) = loss.iter().map(|l| l.0).max() else {
            source.missing_for_translation("No translator: run `gradtx train`.");
            return None;
        };
        let validations: Vec<Validation> = lines.iter().filter_map(validation).collect();
        let measured = validations.iter().filter(|v| v.relative_error.is_some());
        let error = |v: &Validation| v.relative_error.unwrap_or(f64::INFINITY);
        Some(Self {
            steps,
            planned: source.config.as_ref().map(|config| config.expected().train.max_steps as u64),
            best: measured.min_by(|a, b| error(a).total_cmp(&error(b))).cloned(),
            validations,
            not_finite: loss.iter().filter(|l| !l.1.is_finite()).count(),
            loss: thin(&loss, steps),
            grad_norm: thin(&column(&lines, "grad_norm"), steps),
            learning_rate: thin(&written(&lines, LEARNING_RATE), steps),
        })
    }
}

fn validation(line: &Value) -> Option<Validation> {
    let found = line.get("validation").filter(|v| !v.is_null())?;
    let finite = |value: &Value| value.as_f64().filter(|x| x.is_finite());
    Some(Validation {
        step: line["step"].as_u64()?,
        relative_error: finite(&found["relative_error"]),
        mse: finite(&found["mse"]),
        relative_error_by_block: found["relative_error_by_block"]
            .as_array()
            .map(|blocks| blocks.iter().map(finite).collect())
            .unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn many_curves_become_a_band_and_nans_are_counted() {
        let job = |scale: f64| (1..=1000).map(|s| (s, scale / s as f64)).collect::<Losses>();
        let mut jobs = vec![job(1.0), job(2.0), job(4.0)];
        jobs[0][999].1 = f64::NAN;
        jobs[1].truncate(500);
        let found = JobLosses::of(&jobs, &[(1, 0.5)]).unwrap();
        assert_eq!((found.jobs, found.steps, found.not_finite), (3, 1000, 1));
        assert_eq!((found.at.len(), found.at[0], found.at[199]), (200, 5, 1000));
        let first: f64 = (1..=5).map(|s| 2.0 / s as f64).sum::<f64>() / 5.0;
        assert!((found.loss[0].unwrap().median - first).abs() < 1e-12);
        assert_eq!(found.learning_rate, Series { steps: vec![5], values: vec![Some(0.5)] });
        // The job that stopped half way has no last loss.
        assert_eq!(found.improved, 2);
        assert!(found.last.unwrap().high < found.first.unwrap().low);
        assert_eq!(JobLosses::of(&[], &[]), None);
        let nothing = JobLosses::of(&[vec![(1, f64::NAN)]], &[]).unwrap();
        assert_eq!((nothing.loss[0], nothing.first), (None, None));
    }

    #[test]
    fn validations_in_records() {
        let line = json!({"step": 3, "loss": null, "validation":
            {"mse": 0.5, "relative_error": 0.25, "relative_error_by_block": [0.1, null]}});
        let found = validation(&line).unwrap();
        assert_eq!((found.step, found.relative_error), (3, Some(0.25)));
        assert_eq!(found.relative_error_by_block, [Some(0.1), None]);
        assert_eq!(validation(&json!({"step": 4, "loss": 1.0})), None);
        assert!(column(&[line], "loss")[0].1.is_nan());
    }
}
