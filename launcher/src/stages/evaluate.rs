//! `evaluate`: how good are a model's answers?
//!
//! In: a file of examples, a model, and perhaps an adapter. Out: `predictions.jsonl`, one
//! line per example in its order, and `score.json`. Decoding is greedy.

use crate::args::{Role, RunArgs};
use crate::config::{AnswerForm, Config};
use crate::dispatch::{Work, dispatch};
use crate::record::{self, State};
use crate::score::exact_match;
use crate::stages::Context;
use crate::stages::examples::Data;
use crate::stages::side::model_dir;
use anyhow::{Context as _, Result};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{AdapterView, Decoder, GenerateLimits, Generator, Prompt};
use gradtx_models::lora::read_peft;
use gradtx_runtime::artifact::{checksum_file, fingerprint, write_atomic, write_json};
use gradtx_runtime::data::{Renderer, TextTokenizer, prompt_tokens};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};

/// What to evaluate, on what, to where.
pub struct Job {
    /// JSONL file of examples.
    pub data: PathBuf,
    /// Directory of the results.
    pub out: PathBuf,
    /// Which model.
    pub role: Role,
    /// PEFT adapter directory.
    pub adapter: Option<PathBuf>,
}

/// The content of score.json.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Score {
    /// Examples.
    pub examples: usize,
    /// Right answers.
    pub right: usize,
    /// Right answers as a part of all.
    pub exact_match: f64,
    /// Continuations that ended by themselves, as a part of all.
    pub ended: f64,
    /// Which part of a text was the answer.
    pub answer: AnswerForm,
}

/// Evaluates, unless that is done; returns the score.
pub fn run(context: &Context, args: &RunArgs, job: &Job) -> Result<Score> {
    let config = Config::of_run(args)?;
    let dir = model_dir(&config, job.role)?;
    let data = Data::read(&job.data, "--data")?;
    let adapter = job.adapter.as_ref().map(|dir| {
        let sum = |file| checksum_file(&dir.join(file));
        Ok::<_, anyhow::Error>(json!([sum("adapter_config.json")?, sum("adapter_model.safetensors")?]))
    });
    let settings = json!({
        "data": data.checksum,
        "prompt": config.data.prompt,
        "evaluate": config.evaluate,
        "model": fingerprint(dir, context.threads)?,
        "adapter": adapter.transpose()?,
        "device": config.device,
    });
    let score_file = job.out.join("score.json");
    let State::Open(output) = record::open(&job.out, "evaluate", settings)? else {
        let text = std::fs::read_to_string(&score_file)?;
        let score =
            serde_json::from_str(&text).with_context(|| format!("{}: not a score", score_file.display()))?;
        let text = format!("evaluate: {} is finished", job.out.display());
        context.ui.done("evaluate", &job.out, json!(score), text);
        return Ok(score);
    };
    let work = Evaluate { context, config: &config, dir, data: &data, adapter: job.adapter.as_deref() };
    let answers = dispatch(&config.device, context.threads, work)?;
    let right = answers.iter().filter(|a| a.right).count();
    let ended = answers.iter().filter(|a| a.ended).count();
    let part = |count: usize| count as f64 / answers.len() as f64;
    let score = Score {
        examples: answers.len(),
        right,
        exact_match: part(right),
        ended: part(ended),
        answer: config.evaluate.answer,
    };
    write_atomic(&job.out.join("predictions.jsonl"), |out| {
        answers.iter().try_for_each(|answer| writeln!(out, "{}", json!(answer)))
    })?;
    write_json(&score_file, &score)?;
    output.finish(&["predictions.jsonl".into(), "score.json".into()])?;
    let text = format!(
        "evaluate: {:.1} % of {} right, {}",
        100.0 * score.exact_match,
        score.examples,
        job.out.display()
    );
    context.ui.done("evaluate", &job.out, json!(score), text);
    Ok(score)
}

/// One line of predictions.jsonl.
#[derive(Debug, Serialize)]
struct Answer {
    line: usize,
    prediction: String,
    reference: String,
    right: bool,
    ended: bool,
}

struct Evaluate<'a> {
    context: &'a Context,
    config: &'a Config,
    dir: &'a Path,
    data: &'a Data,
    adapter: Option<&'a Path>,
}

impl Work for Evaluate<'_> {
    type Output = Vec<Answer>;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Vec<Answer>> {
        let settings = &self.config.evaluate;
        let decoder = Decoder::<D, X>::load(device, self.dir)?;
        let adapter = self.adapter.map(|dir| read_peft(dir, decoder.config())).transpose()?;
        let tokenizer = TextTokenizer::load(self.dir)?;
        let renderer = Renderer::new(self.config.data.prompt, &tokenizer)?;
        let prompts = self.data.records.iter().map(|record| {
            let tokens = prompt_tokens(record, &renderer, &tokenizer)?;
            Ok(Prompt { tokens, adapter: adapter.as_ref().map(|_| 0) })
        });
        let prompts = prompts.collect::<Result<Vec<_>>>()?;
        let longest = prompts.iter().map(|p| p.tokens.len()).max().unwrap_or(1);
        let limits = GenerateLimits {
            rows: settings.batch.min(prompts.len()),
            prompt_tokens: longest.max(self.config.device.stream_tokens.min(longest * settings.batch)),
            context: longest + settings.max_new_tokens,
        };
        let mut generator = Generator::new(&decoder, limits, adapter.as_ref().map(|a| &a.layout))?;
        let values = adapter.as_ref().map(|a| device.buffer_from(&a.values)).transpose()?;
        let view = adapter.as_ref().zip(values.as_ref()).map(|(adapter, values)| AdapterView {
            values,
            layout: &adapter.layout,
            dropout: 0.0,
        });
        let mut progress = self.context.ui.progress("evaluate", prompts.len() as u64);
        let mut answers = Vec::with_capacity(prompts.len());
        let ends = end_texts(&tokenizer)?;
        // By parts, to have something to report; slots of a part fill up as others end.
        for (part, records) in
            prompts.chunks(8 * settings.batch).zip(self.data.records.chunks(8 * settings.batch))
        {
            let max_new = settings.max_new_tokens;
            for (found, record) in
                generator.generate(&decoder, view, part, max_new, tokenizer.eos())?.iter().zip(records)
            {
                let prediction = tokenizer.decode(&found.tokens, true)?;
                let reference = without_end(record.content.answer(), &ends).to_string();
                let right = exact_match(&prediction, &reference, settings.answer);
                let line = record.origin.line;
                answers.push(Answer { line, prediction, reference, right, ended: found.ended });
            }
            progress.set(answers.len() as u64, "");
        }
        Ok(answers)
    }
}

/// What the tokens that end a text look like in a reference.
fn end_texts(tokenizer: &TextTokenizer) -> Result<Vec<String>> {
    let text = |&id: &u32| Ok(tokenizer.decode(&[id], false)?.trim().to_string());
    tokenizer.eos().iter().map(text).collect()
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
}
