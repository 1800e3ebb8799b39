//! `evaluate`: how good are a model's answers?
//!
//! In: a file of examples, a model, and perhaps an adapter. Out: `predictions.jsonl`, one
//! line per example in its order, and `score.json`. Decoding is greedy. Exact match and
//! ROUGE-1 are both computed; the setting `evaluate.metric` says which is the score.
//!
//! Predictions are private data's relatives: they stand in their file and nowhere else.

use crate::artifacts::expect_run_model;
use crate::lineage::{Lineage, adapter_sums};
use crate::multiple_choice::{ScoreChoices, likeliest};
use crate::records::EvaluateInputs;
use crate::score::{exact_match, has_words, rouge1};
use anyhow::{Context as _, Result};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{AdapterView, Decoder, DecoderConfig, GenerateLimits, Generator, Prompt};
use gradtx_models::lora::{PeftAdapter, read_peft};
use gradtx_run::config::{AnswerForm, Config, MetricChoice, RougeTokens, RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, dispatch, memory_for};
use gradtx_run::failure::failed;
use gradtx_run::role::Role;
use gradtx_run::stage::{self, Stage};
use gradtx_runtime::artifact::{
    MAX_CONFIG_BYTES, TensorSource, checksum, fingerprint, read_text, write_atomic, write_json,
};
use gradtx_runtime::data::{Metric, Purpose as Split, Record, TextTokenizer};
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use gradtx_train::examples::Data;
use gradtx_train::model_spec::model_dir;
use gradtx_train::prompts::Prompts;
use serde::{Deserialize, Serialize};
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

/// The content of score.json.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Score {
    /// Examples.
    pub examples: usize,
    /// Which number is the score.
    pub metric: Metric,
    /// The score, from 0 to 1.
    pub score: f64,
    /// Right answers as a part of all.
    pub exact_match: f64,
    /// Mean ROUGE-1 F1.
    pub rouge1: f64,
    /// Right answers.
    pub right: usize,
    /// Continuations that ended by themselves, as a part of all.
    pub ended: f64,
    /// What ROUGE-1 takes for a word.
    #[serde(default)]
    pub rouge_tokens: RougeTokens,
    /// References in which ROUGE-1 sees no word.
    #[serde(default)]
    pub wordless_references: usize,
    /// Predictions in which ROUGE-1 sees no word.
    #[serde(default)]
    pub wordless_predictions: usize,
    /// Which part of a text was the answer.
    pub answer: AnswerForm,
    /// Which of the two models.
    pub model: Role,
    /// What was done to it.
    #[serde(flatten)]
    pub lineage: Lineage,
    /// Questions whose right choice is the likeliest, as a part of all; where choices were scored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acc: Option<f64>,
    /// The same by likelihood per character.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acc_norm: Option<f64>,
    /// Checksum of the examples.
    pub data: String,
    /// The examples by their place: directory and file without extension.
    pub data_name: String,
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
                let (recorded, told) = Lineage::of_model(base)?;
                (recorded.unwrap_or(job.role), told, base.as_path())
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
            lineage = Lineage::of_adapter(adapter, sums, &weights)?;
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

impl Evaluation<'_> {
    /// The likeliest choices as answers; `log_likelihoods` has a list for every record.
    fn chosen(&self, log_likelihoods: &[Vec<f64>]) -> Result<Vec<Answer>> {
        let scored = self.data.records.iter().zip(log_likelihoods);
        let with_choices =
            scored.filter_map(|(record, found)| Some((record, record.choices.as_ref()?, found)));
        let answers = with_choices.map(|(record, choices, found)| {
            let by = [false, true].map(|per_character| likeliest(choices, found, per_character));
            let chosen = by[usize::from(self.metric == Metric::MultipleChoiceNorm)];
            let (prediction, reference) = (choices.texts[chosen].clone(), choices.answer().to_owned());
            Ok(Answer {
                line: record.origin.line,
                prompt: self.prompts.tokenizer.decode(&self.prompts.prompt(record)?, false)?,
                right: chosen == choices.right,
                rouge1: rouge1(&prediction, &reference, self.config.evaluate.rouge_tokenizer),
                prediction,
                reference,
                ended: true,
                choices: Some(ScoredChoices {
                    texts: choices.texts.clone(),
                    log_likelihoods: found.clone(),
                    right: by.map(|likeliest| likeliest == choices.right),
                }),
            })
        });
        answers.collect()
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

impl Score {
    /// All answers in numbers.
    fn of(
        config: &Config,
        metric: Metric,
        answers: &[Answer],
        role: Role,
        lineage: Lineage,
        checksum: &str,
        name: String,
    ) -> Self {
        let part = |count: usize| count as f64 / answers.len() as f64;
        let right = answers.iter().filter(|a| a.right).count();
        let rouge1 = answers.iter().map(|a| a.rouge1).sum::<f64>() / answers.len() as f64;
        let accuracy = |way: usize| {
            let scored: Vec<&ScoredChoices> = answers.iter().filter_map(|a| a.choices.as_ref()).collect();
            (!scored.is_empty()).then(|| part(scored.iter().filter(|choices| choices.right[way]).count()))
        };
        let wordless = |text: fn(&Answer) -> &str| {
            answers.iter().filter(|a| !has_words(text(a), config.evaluate.rouge_tokenizer)).count()
        };
        Self {
            examples: answers.len(),
            metric,
            score: match metric {
                Metric::ExactMatch | Metric::MultipleChoice | Metric::MultipleChoiceNorm => part(right),
                Metric::Rouge1 => rouge1,
            },
            exact_match: part(right),
            rouge1,
            right,
            ended: part(answers.iter().filter(|a| a.ended).count()),
            rouge_tokens: config.evaluate.rouge_tokenizer,
            wordless_references: wordless(|a| &a.reference),
            wordless_predictions: wordless(|a| &a.prediction),
            answer: config.evaluate.answer_extraction,
            model: role,
            lineage,
            acc: accuracy(0),
            acc_norm: accuracy(1),
            data: checksum.into(),
            data_name: name,
        }
    }

    fn in_words(&self) -> String {
        let percent = 100.0 * self.score;
        let score = match self.metric {
            Metric::ExactMatch => format!("{percent:.1} % of {} right", self.examples),
            Metric::Rouge1 => format!("ROUGE-1 {percent:.2} over {}", self.examples),
            Metric::MultipleChoice | Metric::MultipleChoiceNorm => {
                let [acc, acc_norm] = [self.acc, self.acc_norm].map(|a| 100.0 * a.unwrap_or_default());
                return format!("acc {acc:.1} %, acc_norm {acc_norm:.1} % of {}", self.examples);
            }
        };
        format!("{score}, {} ended by themselves", self.ended_by_themselves())
    }

    fn ended_by_themselves(&self) -> usize {
        (self.ended * self.examples as f64).round() as usize
    }

    /// What makes the score mean less than it seems to.
    fn warnings(&self, config: &Config) -> Vec<String> {
        let mut warnings = vec![];
        let ended = self.ended_by_themselves();
        if 2 * ended < self.examples {
            warnings.push(format!(
                "{ended} of {} predictions ended by themselves, the others were cut at evaluate.max_new_tokens = \
                 {}: right answers among them may count as wrong. Raise it; or the model was not trained to end \
                 its answers in this prompt form (data.prompt)",
                self.examples, config.evaluate.max_new_tokens
            ));
        }
        if self.metric == Metric::Rouge1 && self.wordless_references > 0 {
            let hint = match self.rouge_tokens {
                RougeTokens::RougeScore => {
                    "; evaluate.rouge_tokenizer = \"unicode\" sees the letters of every script"
                }
                RougeTokens::Unicode => "",
            };
            warnings.push(format!(
                "ROUGE-1 sees no word in {} of {} references (and in {} predictions), which score 0 even where \
                 both texts are equal{hint}",
                self.wordless_references, self.examples, self.wordless_predictions
            ));
        }
        warnings
    }
}

/// One line of predictions.jsonl.
#[derive(Debug, Serialize)]
struct Answer {
    line: usize,
    /// What the model was given, with its special tokens.
    prompt: String,
    prediction: String,
    reference: String,
    /// Exact match.
    right: bool,
    rouge1: f64,
    /// It ended by itself; otherwise it reached the limit.
    ended: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    choices: Option<ScoredChoices>,
}

/// The choices of a question, and how likely they are.
#[derive(Debug, Serialize)]
struct ScoredChoices {
    texts: Vec<String>,
    /// ln p of each, given the context.
    log_likelihoods: Vec<f64>,
    /// Whether the right one is the likeliest, and the likeliest per character.
    right: [bool; 2],
}

struct Evaluate<'a> {
    context: &'a Context,
    config: &'a Config,
    dir: &'a Path,
    model: DecoderConfig,
    prompts: &'a Prompts,
    data: &'a Data,
    adapter: Option<&'a Path>,
}

impl Work for Evaluate<'_> {
    type Output = Vec<Answer>;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Vec<Answer>> {
        let settings = &self.config.evaluate;
        let adapter = self.adapter.map(|dir| read_peft(dir, &self.model)).transpose()?;
        let tokenizer = &self.prompts.tokenizer;
        let prompts = self.data.records.iter().map(|record| {
            let tokens = self.prompts.prompt(record)?;
            Ok(Prompt { tokens, adapter: adapter.as_ref().map(|_| 0) })
        });
        let prompts = prompts.collect::<Result<Vec<_>>>()?;
        self.warn_of_long_prompts(&prompts);
        let limits = self.limits(&prompts);
        plan::<X, D>(&self.model, limits, adapter.as_ref())
            .check(memory_for(device, &self.context.place)?)?;

        let decoder = Decoder::<D, X>::load(device, self.dir)?;
        let generator = Generator::new(&decoder, limits, adapter.as_ref().map(|a| &a.layout))?;
        let mut generator = generator.within(self.prompts.context());
        let values = adapter.as_ref().map(|a| device.buffer_from(&a.values)).transpose()?;
        let view = adapter.as_ref().zip(values.as_ref()).map(|(adapter, values)| AdapterView {
            values,
            layout: &adapter.layout,
            dropout: 0.0,
        });
        let mut progress = self.context.ui.progress("evaluate", prompts.len() as u64);
        let mut answers = Vec::with_capacity(prompts.len());
        let stops = self.prompts.check.stops();
        let ends = end_texts(tokenizer, stops)?;
        let prefix = tokenizer.decode(&tokenizer.encode(self.prompts.check.prefix())?.ids, true)?;
        // By parts, to have something to report; slots of a part fill up as others end.
        for (part, records) in prompts
            .chunks(8 * settings.per_device_eval_batch_size)
            .zip(self.data.records.chunks(8 * settings.per_device_eval_batch_size))
        {
            let max_new = settings.max_new_tokens;
            let generated = generator.generate(&decoder, view, part, max_new, stops)?;
            for ((found, asked), record) in generated.iter().zip(part).zip(records) {
                let prediction = tokenizer.decode(&found.tokens, true)?;
                let reference = without_end(record.content.answer(), &ends).to_string();
                let answer = without_prefix(&prediction, &prefix);
                answers.push(Answer {
                    line: record.origin.line,
                    prompt: tokenizer.decode(&asked.tokens, false)?,
                    right: exact_match(answer, &reference, settings.answer_extraction),
                    rouge1: rouge1(answer, &reference, settings.rouge_tokenizer),
                    prediction,
                    reference,
                    ended: found.ended,
                    choices: None,
                });
            }
            progress.set(answers.len() as u64, "");
        }
        Ok(answers)
    }
}

impl Evaluate<'_> {
    /// Says how many prompts leave less room than the settings ask for.
    fn warn_of_long_prompts(&self, prompts: &[Prompt]) {
        let (max_new, context) = (self.config.evaluate.max_new_tokens, self.prompts.context());
        let is_long = |prompt: &Prompt| prompt.tokens.len() + max_new > context;
        let long = prompts.iter().filter(|prompt| is_long(prompt)).count();
        if let Some(first) = prompts.iter().position(is_long) {
            self.context.ui.notice(&format!(
                "evaluate: warning: {long} of {} prompts leave room for fewer than evaluate.max_new_tokens = \
                 {max_new} tokens in the model's {context} positions; their answers end there (first: {}, {} tokens)",
                prompts.len(),
                self.data.records[first].origin,
                prompts[first].tokens.len()
            ));
        }
    }

    /// What the generator needs room for.
    fn limits(&self, prompts: &[Prompt]) -> GenerateLimits {
        let settings = &self.config.evaluate;
        let longest = prompts.iter().map(|p| p.tokens.len()).max().unwrap_or(1);
        GenerateLimits {
            rows: settings.per_device_eval_batch_size.min(prompts.len()),
            prompt_tokens: longest.max(
                self.config
                    .device
                    .max_tokens_per_microbatch
                    .min(longest * settings.per_device_eval_batch_size),
            ),
            context: (longest + settings.max_new_tokens).min(self.prompts.context()),
        }
    }
}

/// Everything that generation allocates.
fn plan<X: Real<Acc = f32>, D: Backend<X>>(
    model: &DecoderConfig,
    limits: GenerateLimits,
    adapter: Option<&PeftAdapter>,
) -> MemoryPlan {
    let mut plan = Decoder::<D, X>::plan(model, false);
    if let Some(adapter) = adapter {
        plan.add(Purpose::Frozen, "adapter", &[adapter.values.len()], size_of::<f32>());
    }
    plan.extend(Generator::<D, X>::plan(model, limits, adapter.map(|a| &a.layout)));
    plan
}

/// What the tokens that end a text look like in a reference.
fn end_texts(tokenizer: &TextTokenizer, stops: &[u32]) -> Result<Vec<String>> {
    let text = |&id: &u32| Ok(tokenizer.decode(&[id], false)?.trim().to_string());
    stops.iter().map(text).collect()
}

/// A prediction without what the prompt form itself writes before an answer.
pub(crate) fn without_prefix<'a>(prediction: &'a str, prefix: &str) -> &'a str {
    match prefix.trim() {
        "" => prediction,
        prefix => prediction.trim_start().strip_prefix(prefix).unwrap_or(prediction),
    }
}

/// A reference without the text of the token that ends it: predictions come without it.
fn without_end<'a>(reference: &'a str, ends: &[String]) -> &'a str {
    let text = reference.trim_end();
    ends.iter().filter(|end| !end.is_empty()).find_map(|end| text.strip_suffix(end.as_str())).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_token_is_no_part_of_a_reference() {
        let ends = ["<end>".to_string(), String::new()];
        assert_eq!(without_end(" a b <end>\n", &ends), " a b ");
        assert_eq!(without_end("a <end> b", &ends), "a <end> b");
    }

    #[test]
    fn what_the_template_writes_is_no_part_of_an_answer() {
        let prefix = "<think>\n\n</think>\n\n";
        assert_eq!(without_prefix("<think>\n\n</think>\n\n7", prefix).trim(), "7");
        assert_eq!(without_prefix("\n<think>\n\n</think>7", prefix), "7");
        assert_eq!(without_prefix("<think>\n6+1\n</think>7", prefix), "<think>\n6+1\n</think>7");
        assert_eq!(without_prefix(" 7", ""), " 7");
    }

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

    #[test]
    fn a_score_reads_back_as_it_was_written() {
        let lineage = Lineage::of_adapter(Path::new("nowhere"), &[], "").unwrap();
        let answer = |right, rouge1| {
            let text = String::new();
            let (prompt, prediction) = (text.clone(), text.clone());
            Answer {
                line: 1,
                prompt,
                prediction,
                reference: text,
                right,
                rouge1,
                ended: right,
                choices: None,
            }
        };
        let answers = [answer(true, 1.0), answer(false, 0.5), answer(false, 0.0), answer(false, 0.1)];
        let config = Config::default();
        let path = Path::new("client-2/test.jsonl");
        for (metric, name, want) in
            [(Metric::ExactMatch, "exact_match", 0.25), (Metric::Rouge1, "rouge1", 0.4)]
        {
            let score = json!(Score::of(&config, metric, &answers, Role::Tiny, lineage, "c", name_of(path)));
            assert_eq!((&score["metric"], &score["score"]), (&json!(name), &json!(want)));
            assert_eq!(
                (&score["right"], &score["model"], &score["kind"]),
                (&json!(1), &json!("tiny"), &json!("adapter"))
            );
            assert_eq!((&score["method"], &score["data_name"]), (&json!(null), &json!("client-2/test")));
            let again: Score = serde_json::from_value(score.clone()).unwrap();
            assert_eq!(json!(again), score);
        }
    }
}
