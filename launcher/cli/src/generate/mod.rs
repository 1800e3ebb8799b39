//! `generate`: texts of a model, with an adapter or an update vector on top.
//!
//! In: a model, and a prompt, a file of examples, or a person at a terminal. Out: answers, on
//! standard output as they grow; everything else goes to standard error. Prompts are rendered as for
//! training and evaluation, so an adapter is asked in the form in which it learned. Writes no file.

mod chat;
mod text;

use crate::model_args::{Model, ModelArgs, spec_of_update};
use anyhow::Result;
use chat::Chat;
use clap::builder::RangedU64ValueParser;
use gradtx_kernels::rng::derive;
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{
    AdapterView, Continuation, Decoder, Decoding, GenerateLimits, Generator, Prompt, Sampling,
};
use gradtx_models::lora::PeftAdapter;
use gradtx_run::config::{DeviceKind, DtypeKind};
use gradtx_run::context::Context;
use gradtx_run::device::take;
use gradtx_run::dispatch::{Work, dispatch, memory_for};
use gradtx_run::failure::unusable;
use gradtx_run::role::Role;
use gradtx_run::ui::say;
use gradtx_runtime::artifact::UpdateFile;
use gradtx_runtime::data::{Content, Origin, Record, Schema, Unit};
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use gradtx_train::examples::Data;
use gradtx_train::prompts::Prompts;
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use text::{Growing, answer_text};

/// Generate from a prompt, for a file of examples, or in a chat.
///
/// The model is one of a run's, or a directory; --adapter or --update puts an adapter on top. Without
/// --prompt and --data, lines of standard input are the turns of a conversation.
#[derive(Debug, clap::Args)]
pub struct Job {
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// PEFT adapter directory to put on the model.
    #[arg(long, value_name = "DIR", conflicts_with = "update")]
    pub adapter: Option<PathBuf>,
    /// Update vector file to put on the model, as `finetune` and `translate` write it.
    #[arg(long, value_name = "FILE")]
    pub update: Option<PathBuf>,
    /// PEFT directory of the adapter that the update is counted from (default: the run's).
    #[arg(long, value_name = "DIR", requires = "update")]
    pub init: Option<PathBuf>,
    /// The prompt; without it and --data, a chat.
    #[arg(long, value_name = "TEXT", conflicts_with = "data")]
    pub prompt: Option<String>,
    /// File of examples (JSONL, JSON, CSV, TSV or Parquet): an answer for each.
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// System message; the same as `--set data.system_prompt=…`.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// New tokens of an answer at most.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    pub max_new_tokens: usize,
    /// Tokens of a conversation at most: its memory is taken at the start.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = RangedU64ValueParser::<usize>::new().range(8..=1 << 20))]
    pub context: usize,
    /// Draw tokens at this temperature; 0 takes the likeliest token.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f64,
    /// Draw only among the likeliest tokens that have this probability together.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f64,
    /// Seed of the draws.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Where to compute; the same as `--set device.kind=…`.
    #[arg(long, value_enum)]
    pub device: Option<DeviceKind>,
    /// Type of activations and weights; the same as `--set device.dtype=…`.
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeKind>,
}

/// Generates.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    let sampling = job.sampling()?;
    let mut model = job.model.resolve(Role::Llm)?;
    if let Some(system) = &job.system {
        model.config.data.system_prompt.clone_from(system);
    }
    model.config.device.kind = job.device.unwrap_or(model.config.device.kind);
    model.config.device.dtype = job.dtype.unwrap_or(model.config.device.dtype);
    let data = match &job.data {
        Some(path) => Some(Data::read_for_test(std::slice::from_ref(path), &model.config.data, "--data")?),
        None => None,
    };
    let first = data.as_ref().and_then(|data| data.records.first());
    let prompts = Prompts::new(&model.config.data, &model.dir, &model.decoder, first)?;
    let adapter = job.adapter_on(&model, context.threads)?;
    let taken = take(&model.config.device, &context.place)?;
    context.ui.status(format!("device: {}", taken.what));
    if let Some(warning) = &taken.warning {
        context.ui.notice(warning);
    }
    prompts.lines().iter().for_each(|line| context.ui.status(line));
    let device = taken.settings.clone();
    let answering =
        Answering { context, job, model: &model, data: data.as_ref(), prompts: &prompts, adapter, sampling };
    dispatch(&device, context, answering)
}

impl Job {
    fn sampling(&self) -> Result<Option<Sampling>> {
        let &Self { temperature, top_p, seed, .. } = self;
        if !(0.0..=100.0).contains(&temperature) {
            return Err(unusable(format!("--temperature {temperature}: expected a number from 0 to 100")));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(unusable(format!("--top-p {top_p}: expected a number above 0 and at most 1")));
        }
        if temperature == 0.0 && top_p < 1.0 {
            return Err(unusable(
                "--top-p has no effect without --temperature above 0: the likeliest token is taken",
            ));
        }
        Ok((temperature > 0.0).then_some(Sampling { temperature, top_p, seed }))
    }

    /// The adapter that was asked for.
    fn adapter_on(&self, model: &Model, threads: usize) -> Result<Option<PeftAdapter>> {
        if let Some(dir) = &self.adapter {
            return model.adapter(dir, threads).map(Some);
        }
        let Some(path) = &self.update else { return Ok(None) };
        let file = UpdateFile::open(path)?;
        let spec = spec_of_update(model.spec(self.init.as_deref(), threads)?, &file, path)?;
        let update = file.read()?;
        let values = spec.adapter_of(&update.values);
        Ok(Some(PeftAdapter { layout: spec.layout, values, base_model: None }))
    }
}

/// A prompt from the command line, as an example without its answer.
fn record(content: Content) -> Record {
    let origin = Origin { file: Arc::new(PathBuf::from("the prompt")), line: 1, unit: Unit::Line };
    Record {
        origin,
        schema: Schema::Pair,
        content,
        choices: None,
        learned: vec![],
        extra: Default::default(),
    }
}

/// What a prompt asks; the answer stands for the one that is generated.
fn question(prompt: &str) -> Content {
    Content::Pair { prompt: prompt.into(), response: PLACEHOLDER.into() }
}

/// Stands where the answer will be: templates are rendered with it, and cut before it.
const PLACEHOLDER: &str = "-";

/// Everything that answers are made with.
struct Answering<'a> {
    context: &'a Context,
    job: &'a Job,
    model: &'a Model,
    data: Option<&'a Data>,
    prompts: &'a Prompts,
    adapter: Option<PeftAdapter>,
    sampling: Option<Sampling>,
}

impl Work for Answering<'_> {
    type Output = ();

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<()> {
        let records = match (self.data, &self.job.prompt) {
            (Some(data), _) => data.records.clone(),
            (None, Some(prompt)) => vec![record(question(prompt))],
            (None, None) => vec![],
        };
        let adapter = self.adapter.as_ref();
        let tokens = records.iter().map(|record| self.prompts.prompt(record)).collect::<Result<Vec<_>>>()?;
        let limits = self.limits(&tokens);
        let mut plan = Decoder::<D, X>::plan(&self.model.decoder, false);
        if let Some(adapter) = adapter {
            plan.add(Purpose::Frozen, "adapter", &[adapter.values.len()], size_of::<f32>());
        }
        plan.extend(Generator::<D, X>::plan(&self.model.decoder, limits, adapter.map(|a| &a.layout)));
        self.check(&plan, device)?;
        let decoder = Decoder::<D, X>::load(device, &self.model.dir)?;
        let generator = Generator::new(&decoder, limits, adapter.map(|a| &a.layout))?;
        let values = adapter.map(|a| device.buffer_from(&a.values)).transpose()?;
        let view = adapter.zip(values.as_ref()).map(|(adapter, values)| AdapterView {
            values,
            layout: &adapter.layout,
            dropout: 0.0,
        });
        let positions = if records.is_empty() { limits.context } else { self.prompts.context() };
        let mut session = Session {
            of: &self,
            decoder: &decoder,
            generator: generator.within(positions),
            adapter: view,
            asked: 0,
        };
        match (self.data, tokens.into_iter().next()) {
            (Some(_), _) => session.all(&records),
            (None, Some(tokens)) => session.one(tokens),
            (None, None) => Chat::new(self.prompts, limits.context).run(&mut session),
        }
    }
}

impl Answering<'_> {
    fn check<D: Backend<X>, X: Real>(&self, plan: &MemoryPlan, device: &D) -> Result<()> {
        Ok(plan.check(memory_for(device, &self.context.place)?)?)
    }

    /// What the generator needs room for.
    fn limits(&self, prompts: &[Vec<u32>]) -> GenerateLimits {
        let most = self.prompts.context();
        let Some(longest) = prompts.iter().map(Vec::len).max() else {
            let context = self.job.context.min(most);
            return GenerateLimits { rows: 1, prompt_tokens: context, context };
        };
        let rows = self.model.config.evaluate.per_device_eval_batch_size.min(prompts.len());
        let stream = self.model.config.device.max_tokens_per_microbatch.min(longest * rows);
        GenerateLimits {
            rows,
            prompt_tokens: longest.max(stream),
            context: (longest + self.job.max_new_tokens).min(most),
        }
    }
}

/// A loaded model that answers.
struct Session<'a, D: Backend<X>, X: Real<Acc = f32>> {
    of: &'a Answering<'a>,
    decoder: &'a Decoder<D, X>,
    generator: Generator<D, X>,
    adapter: Option<AdapterView<'a, D, f32>>,
    /// Calls so far: each draws other tokens.
    asked: u64,
}

impl<D: Backend<X>, X: Real<Acc = f32>> Session<'_, D, X> {
    /// Continues prompts; every new token is given to `on_token`, with the number of its prompt.
    fn continued(
        &mut self,
        prompts: &[Prompt],
        on_token: &mut dyn FnMut(usize, u32),
    ) -> Result<Vec<Continuation>> {
        let sampling = self.of.sampling.map(|s| Sampling { seed: derive(s.seed, self.asked), ..s });
        self.asked += 1;
        let (max_new, stops) = (self.of.job.max_new_tokens, self.of.prompts.check.stops());
        let mut decoding = Decoding { sampling, on_token };
        Ok(self.generator.generate_as(self.decoder, self.adapter, prompts, max_new, stops, &mut decoding)?)
    }

    fn prompt(&self, tokens: Vec<u32>) -> Prompt {
        Prompt { tokens, adapter: self.adapter.as_ref().map(|_| 0) }
    }

    /// One answer, shown while it grows; its text.
    fn answer(&mut self, tokens: Vec<u32>) -> Result<(String, Continuation)> {
        let (prompts, ui) = (self.of.prompts, &self.of.context.ui);
        let mut growing = Growing::new(&prompts.tokenizer, !ui.is_json());
        let prompt = self.prompt(tokens);
        let began = Instant::now();
        let found = self.continued(&[prompt], &mut |_, token| growing.push(token))?.remove(0);
        let text = growing.finish()?;
        let seconds = began.elapsed().as_secs_f64();
        let end = if found.ended { "ended by itself" } else { "cut at the limit" };
        let count = found.tokens.len();
        ui.status(format!(
            "{count} tokens in {seconds:.1} s ({:.1} tokens/s), {end}",
            count as f64 / seconds
        ));
        Ok((text, found))
    }

    /// The answer to a prompt.
    fn one(&mut self, tokens: Vec<u32>) -> Result<()> {
        let (text, found) = self.answer(tokens)?;
        let result = json!({ "text": text, "tokens": found.tokens.len(), "ended": found.ended });
        self.of.context.ui.result_object("generate", result);
        Ok(())
    }

    /// An answer for every example, in order.
    fn all(&mut self, records: &[Record]) -> Result<()> {
        let Answering { context, prompts, model, .. } = *self.of;
        for part in records.chunks(8 * model.config.evaluate.per_device_eval_batch_size) {
            let asked = part.iter().map(|record| Ok(self.prompt(prompts.prompt(record)?)));
            let asked = asked.collect::<Result<Vec<_>>>()?;
            let found = self.continued(&asked, &mut |_, _| {})?;
            for (record, found) in part.iter().zip(found) {
                let text = answer_text(prompts, &found.tokens)?;
                if !context.ui.is_json() {
                    say(&format!("--- {}\n{text}", record.origin));
                }
                context.ui.result_object(
                    "generate",
                    json!({ "line": record.origin.line, "text": text, "tokens": found.tokens.len(),
                        "ended": found.ended }),
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        job: Job,
    }

    fn sampling(words: &[&str]) -> Result<Option<Sampling>> {
        Line::try_parse_from([&["generate"], words].concat()).unwrap().job.sampling()
    }

    #[test]
    fn numbers_of_sampling_are_checked() {
        assert_eq!(sampling(&[]).unwrap(), None);
        let found = sampling(&["--temperature", "0.5", "--top-p", "0.9", "--seed", "7"]).unwrap();
        assert_eq!(found, Some(Sampling { temperature: 0.5, top_p: 0.9, seed: 7 }));
        for (words, say) in [
            (&["--temperature=-1"][..], "--temperature -1"),
            (&["--temperature=NaN"], "--temperature NaN"),
            (&["--top-p", "0", "--temperature", "1"], "--top-p 0"),
            (&["--top-p", "0.5"], "without --temperature"),
        ] {
            let message = sampling(words).unwrap_err().to_string();
            assert!(message.contains(say), "{message}");
        }
    }
}
