//! The answers that a model gives to the examples.

use super::choices::ScoredChoices;
use crate::score::{exact_match, rouge1};
use anyhow::Result;
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{AdapterView, Decoder, DecoderConfig, GenerateLimits, Generator, Prompt};
use gradtx_models::lora::{PeftAdapter, read_peft};
use gradtx_run::config::Config;
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, memory_for};
use gradtx_runtime::data::TextTokenizer;
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use gradtx_train::examples::Data;
use gradtx_train::prompts::Prompts;
use serde::Serialize;
use std::path::Path;

/// One line of predictions.jsonl.
#[derive(Debug, Serialize)]
pub(super) struct Answer {
    pub(super) line: usize,
    /// What the model was given, with its special tokens.
    pub(super) prompt: String,
    pub(super) prediction: String,
    pub(super) reference: String,
    /// Exact match.
    pub(super) right: bool,
    pub(super) rouge1: f64,
    /// It ended by itself; otherwise it reached the limit.
    pub(super) ended: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) choices: Option<ScoredChoices>,
}

pub(super) struct Evaluate<'a> {
    pub(super) context: &'a Context,
    pub(super) config: &'a Config,
    pub(super) dir: &'a Path,
    pub(super) model: DecoderConfig,
    pub(super) prompts: &'a Prompts,
    pub(super) data: &'a Data,
    pub(super) adapter: Option<&'a Path>,
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
}
