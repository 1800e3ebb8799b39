//! `evaluate`: how good are a model's answers?
//!
//! In: a file of examples, a model, and perhaps an adapter. Out: `predictions.jsonl`, one
//! line per example in its order, and `score.json`. Decoding is greedy, and exact match and
//! ROUGE-1 are both computed; of questions with choices the likeliest is taken, and nothing is
//! generated. The setting `evaluate.metric` says which number is the score.
//!
//! Predictions are private data's relatives: they stand in their file and nowhere else.

mod answers;
mod choices;
mod score;

pub(crate) use answers::without_prefix;
pub use score::Score;

use crate::artifacts::expect_run_model;
use crate::lineage::{Lineage, adapter_sums};
use crate::records::EvaluateInputs;
use answers::Evaluate;
use anyhow::{Context as _, Result};
use choices::ScoreChoices;
use gradtx_models::decoder::DecoderConfig;
use gradtx_run::config::{Config, MetricChoice, RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::dispatch::dispatch;
use gradtx_run::failure::failed;
use gradtx_run::role::Role;
use gradtx_run::stage::{self, Stage};
use gradtx_runtime::artifact::{
    MAX_CONFIG_BYTES, TensorSource, checksum, fingerprint, read_text, write_atomic, write_json,
};
use gradtx_runtime::data::{Metric, Purpose as Split, Record};
use gradtx_train::examples::Data;
use gradtx_train::model_spec::model_dir;
use gradtx_train::prompts::Prompts;
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The answers, a line per example.
pub const PREDICTIONS_FILE: &str = "predictions.jsonl";
/// The score.
const SCORE_FILE: &str = "score.json";

/// What to evaluate, on what, to where.
pub struct Job {
    /// Files of examples.
    pub data: Vec<PathBuf>,
    /// Directory of the results.
    pub out: PathBuf,
    /// Which model.
    pub role: Role,
    /// Model directory in the place of the run's.
    pub base: Option<PathBuf>,
    /// PEFT adapter directory.
    pub adapter: Option<PathBuf>,
    /// These examples of the file alone.
    pub part: Option<Part>,
}

/// Some examples of a file, with a name of their own.
#[derive(Clone, Debug)]
pub struct Part {
    /// What they are, such as a task.
    pub name: String,
    /// Their numbers, from 0.
    pub rows: Vec<usize>,
    /// Which split they are numbered in, where files have several.
    pub purpose: Split,
}

impl Part {
    /// These examples alone. Their checksum is of the file and of which they are.
    fn of(&self, data: Data) -> Data {
        let records = self.rows.iter().map(|&row| data.records[row].clone()).collect();
        let checksum = checksum(format!("{} {:?}", data.checksum, self.rows).as_bytes());
        Data { checksum, records, ..data }
    }
}

impl Job {
    /// A short name of the examples.
    fn name(&self) -> String {
        match (&self.part, self.data.first()) {
            (Some(part), _) => part.name.clone(),
            (None, first) => first.map_or_else(String::new, |path| name_of(path)),
        }
    }
}

/// Evaluates, unless that is done; returns the score.
pub fn run(context: &Context, args: &RunArgs, job: &Job) -> Result<Score> {
    let settings = RunSettings::open(args)?;
    let config = settings.config().clone().on_device(context, &job.out)?;
    let stage = Evaluation::open(context, &settings, &config, job)?;
    if let Some(score) = stage::run(context, &stage)? {
        return Ok(score);
    }
    let path = job.out.join(SCORE_FILE);
    let score: Score = serde_json::from_str(&read_text(&path, MAX_CONFIG_BYTES)?)
        .with_context(|| format!("{}: not a score", path.display()))?;
    let text = format!("evaluate: {} is finished", job.out.display());
    context.ui.done("evaluate", &job.out, json!(score), text);
    Ok(score)
}

/// An evaluation that is ready to begin.
pub struct Evaluation<'a> {
    job: &'a Job,
    settings: &'a RunSettings,
    /// The settings on this device.
    config: &'a Config,
    role: Role,
    /// Directory of the model.
    dir: &'a Path,
    model: DecoderConfig,
    /// Fingerprint of the model.
    weights: String,
    /// Checksums of the adapter's files.
    sums: Option<Vec<String>>,
    lineage: Lineage,
    data: Data,
    metric: Metric,
    prompts: Prompts,
}

impl<'a> Evaluation<'a> {
    /// Opens what a job needs.
    pub fn open(
        context: &Context,
        settings: &'a RunSettings,
        config: &'a Config,
        job: &'a Job,
    ) -> Result<Self> {
        let (role, mut lineage, dir) = match &job.base {
            None => (job.role, Lineage::BASE, model_dir(config, job.role)?),
            Some(base) => {
                let (recorded, lineage) = Lineage::of_model(base)?;
                (recorded.unwrap_or(job.role), lineage, base.as_path())
            }
        };
        let data = match &job.part {
            Some(part) => part.of(Data::read_as(&job.data, &config.data, "--data", part.purpose)?),
            None => Data::read_for_test(&job.data, &config.data, "--data")?,
        };
        let metric = metric(config.evaluate.metric, &data.records)?;
        let model = DecoderConfig::read(dir)?;
        model.check_weights(&TensorSource::open(dir)?)?;
        let prompts = Prompts::new(&config.data, dir, &model, data.records.first())?;
        let sums = job.adapter.as_deref().map(adapter_sums).transpose()?;
        let weights = fingerprint(dir, context.threads)?;
        if job.base.is_none() {
            expect_run_model(settings, role, &weights)?;
        }
        if let (Some(adapter), Some(sums)) = (&job.adapter, &sums) {
            let of_adapter = Lineage::of_adapter(adapter, sums, &weights)?;
            // Of the layers of an emulator, only those of the edge can be trained.
            let edge = of_adapter.edge || model.emulator.is_some();
            lineage = Lineage { edge, ..of_adapter }.on(lineage);
        }
        Ok(Self { job, settings, config, role, dir, model, weights, sums, lineage, data, metric, prompts })
    }
}

impl Stage for Evaluation<'_> {
    type Inputs = EvaluateInputs;
    type Output = Score;

    fn dir(&self) -> &Path {
        &self.job.out
    }

    fn settings(&self) -> Option<&RunSettings> {
        Some(self.settings)
    }

    fn inputs(&self) -> Result<EvaluateInputs> {
        let config = self.config;
        Ok(EvaluateInputs {
            data: self.data.inputs(&config.data, &[&self.prompts]),
            evaluate: (&config.evaluate).into(),
            role: self.role,
            model: self.weights.clone(),
            adapter: self.sums.clone(),
            lineage: self.lineage,
            device: config.device.clone(),
            reading: config.data.reading_inputs(),
        })
    }

    fn assumed(&self) -> Vec<String> {
        let (context, most) = (self.prompts.context(), self.config.evaluate.max_new_tokens);
        let mut lines = vec![self.data.facts.line()];
        lines.extend(self.prompts.lines());
        if matches!(self.metric, Metric::ExactMatch | Metric::Rouge1) {
            lines.push(format!(
                "limit: answers of {most} tokens (evaluate.max_new_tokens), {context} with the prompt"
            ));
        }
        lines.push(format!("score: {}", self.metric.label()));
        lines
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, Score)> {
        let Self { job, config, dir, data, prompts, .. } = self;
        data.announce_left_out(context);
        let (model, adapter) = (self.model.clone(), job.adapter.as_deref());
        let answers = match self.metric {
            Metric::ExactMatch | Metric::Rouge1 => {
                let work = Evaluate { context, config, dir, model, prompts, data, adapter };
                dispatch(&config.device, context, work)?
            }
            Metric::MultipleChoice | Metric::MultipleChoiceNorm => {
                let work = ScoreChoices { context, config, dir, model, prompts, data, adapter };
                self.chosen(&dispatch(&config.device, context, work)?)?
            }
        };
        write_atomic(&job.out.join(PREDICTIONS_FILE), |out| {
            answers.iter().try_for_each(|answer| writeln!(out, "{}", json!(answer)))
        })?;
        let (metric, role, lineage) = (self.metric, self.role, self.lineage);
        let score = Score::of(config, metric, &answers, role, lineage, &data.checksum, job.name());
        write_json(&job.out.join(SCORE_FILE), &score)?;
        Ok((vec![PREDICTIONS_FILE.into(), SCORE_FILE.into()], score))
    }

    fn report(&self, context: &Context, score: &Score) -> Result<()> {
        for warning in score.warnings(self.config) {
            context.ui.notice(&format!("evaluate: warning: {warning}"));
        }
        let text = format!("evaluate: {}, {}", score.in_words(), self.job.out.display());
        context.ui.done("evaluate", &self.job.out, json!(score), text);
        Ok(())
    }

    /// The score is reported with it, by who reads it.
    fn was_finished(&self, _: &Context) -> Result<()> {
        Ok(())
    }
}

/// The metric that the settings or the examples ask for.
pub(crate) fn metric(choice: MetricChoice, records: &[Record]) -> Result<Metric> {
    let of_choices = |metric| match records.iter().find(|record| record.choices.is_none()) {
        None => Ok(metric),
        Some(other) => {
            let what = format!("{}: {} has no choices to score", other.origin, other.schema.name());
            Err(failed(
                what,
                "set evaluate.metric to exact_match or rouge1, or data.format to what the data is",
            ))
        }
    };
    match choice {
        MetricChoice::ExactMatch => Ok(Metric::ExactMatch),
        MetricChoice::Rouge1 => Ok(Metric::Rouge1),
        MetricChoice::MultipleChoice => of_choices(Metric::MultipleChoice),
        MetricChoice::MultipleChoiceNorm => of_choices(Metric::MultipleChoiceNorm),
        MetricChoice::Auto => {
            let first = records.first().map_or(Metric::ExactMatch, |record| record.schema.metric());
            match records.iter().find(|record| record.schema.metric() != first) {
                None => Ok(first),
                Some(other) => {
                    let why = format!(
                        "{}: {} has another metric than the examples before it",
                        other.origin,
                        other.schema.name()
                    );
                    Err(failed(
                        why,
                        "set evaluate.metric to exact_match or rouge1, or evaluate the tasks apart",
                    ))
                }
            }
        }
    }
}

/// `client-1/test` for `…/client-1/test.jsonl`: distinguishes clients and parts, and keeps
/// what lies above them out of results.
fn name_of(path: &Path) -> String {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let parent = path.parent().and_then(Path::file_name);
    let names = parent.into_iter().chain(path.file_stem());
    names.map(|name| name.to_string_lossy()).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_named_by_its_place() {
        assert_eq!(name_of(Path::new("/a/b/client-1/test.jsonl")), "client-1/test");
        assert!(name_of(Path::new("test.jsonl")).ends_with("/test"));
    }

    #[test]
    fn the_metric_is_the_examples_and_must_be_one() {
        let record = |row: &str| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("d.jsonl");
            std::fs::write(&path, row).unwrap();
            Data::read(&[path], &Config::default().data, "--data").unwrap().records.remove(0)
        };
        let summary = record("{\"id\": 1, \"dialogue\": \"a\", \"summary\": \"b\"}");
        let problem = record("{\"question\": \"a\", \"answer\": \"b\"}");
        assert_eq!(metric(MetricChoice::Auto, std::slice::from_ref(&summary)).unwrap(), Metric::Rouge1);
        assert_eq!(metric(MetricChoice::Auto, std::slice::from_ref(&problem)).unwrap(), Metric::ExactMatch);
        let both = [problem, summary];
        assert!(metric(MetricChoice::Auto, &both).unwrap_err().to_string().contains("samsum"));
        assert_eq!(metric(MetricChoice::ExactMatch, &both).unwrap(), Metric::ExactMatch);
    }
}
