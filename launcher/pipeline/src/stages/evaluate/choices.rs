//! Multiple-choice questions: which of its choices does a model take for the likeliest?
//!
//! In: records with choices, a model, and perhaps an adapter. Out: ln p of every choice, given its context,
//! as lm-evaluation-harness has it: acc takes the largest, acc_norm the largest per character.

use super::Evaluation;
use super::answers::Answer;
use crate::score::rouge1;
use anyhow::Result;
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{Activations, AdapterView, Decoder, DecoderConfig, Mode};
use gradtx_models::lora::read_peft;
use gradtx_run::config::{Config, Recipe};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, memory_for};
use gradtx_runtime::data::{BatchCapacity, Choices, DeviceBatch, Example, Metric, PackedBatch};
use gradtx_runtime::plan::Purpose;
use gradtx_train::examples::{Data, Streams};
use gradtx_train::prompts::Prompts;
use serde::Serialize;
use std::path::Path;

/// Records whose choices are scored between two lines of progress.
const RECORDS: usize = 256;

/// The choices of a question, and how likely they are.
#[derive(Debug, Serialize)]
pub(super) struct ScoredChoices {
    texts: Vec<String>,
    /// ln p of each, given the context.
    log_likelihoods: Vec<f64>,
    /// Whether the right one is the likeliest, and the likeliest per character.
    pub(super) right: [bool; 2],
}

/// The likeliest of some choices (the first among equals), by ln p or by ln p per character.
fn likeliest(choices: &Choices, log_likelihoods: &[f64], per_character: bool) -> usize {
    let score = |i: usize| match per_character {
        true => log_likelihoods[i] / choices.texts[i].chars().count() as f64,
        false => log_likelihoods[i],
    };
    (1..log_likelihoods.len()).fold(0, |best, i| if score(i) > score(best) { i } else { best })
}

impl Evaluation<'_> {
    /// The likeliest choices as answers; `log_likelihoods` has a list for every record.
    pub(super) fn chosen(&self, log_likelihoods: &[Vec<f64>]) -> Result<Vec<Answer>> {
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

/// Scores the choices of all records: ln p of each, a list for each record.
pub(super) struct ScoreChoices<'a> {
    pub(super) context: &'a Context,
    pub(super) config: &'a Config,
    /// Directory of the model.
    pub(super) dir: &'a Path,
    pub(super) model: DecoderConfig,
    pub(super) prompts: &'a Prompts,
    pub(super) data: &'a Data,
    pub(super) adapter: Option<&'a Path>,
}

impl ScoreChoices<'_> {
    /// The choices of every record as packed streams, some records at a time.
    fn streams(&self) -> Result<Vec<Vec<PackedBatch>>> {
        let part = |records: &[_]| {
            let choices = records.iter().map(|record| self.prompts.choices(record));
            let examples: Vec<Example> = choices.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
            let mut streams = Streams::new(self.config.device.max_tokens_per_microbatch);
            streams.push_step(&examples.iter().collect::<Vec<_>>(), &Recipe::default(), 0, 0, 0);
            Ok(streams.finish())
        };
        self.data.records.chunks(RECORDS).map(part).collect()
    }
}

impl Work for ScoreChoices<'_> {
    type Output = Vec<Vec<f64>>;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Vec<Vec<f64>>> {
        let parts = self.streams()?;
        let capacity = BatchCapacity::of(parts.iter().flatten());
        let adapter = self.adapter.map(|dir| read_peft(dir, &self.model)).transpose()?;
        let mode = Mode::Inference(adapter.as_ref().map(|a| &a.layout));
        let mut plan = Decoder::<D, X>::plan(&self.model, false);
        if let Some(adapter) = &adapter {
            plan.add(Purpose::Frozen, "adapter", &[adapter.values.len()], size_of::<f32>());
        }
        plan.extend(Activations::<D, X>::plan(&self.model, capacity, mode));
        plan.check(memory_for(device, &self.context.place)?)?;

        let decoder = Decoder::<D, X>::load(device, self.dir)?;
        let mut acts = Activations::new(&decoder, capacity, mode)?;
        let mut batch = DeviceBatch::new(device, capacity)?;
        let values = adapter.as_ref().map(|a| device.buffer_from(&a.values)).transpose()?;
        let view = adapter.as_ref().zip(values.as_ref()).map(|(adapter, values)| AdapterView {
            values,
            layout: &adapter.layout,
            dropout: 0.0,
        });
        let mut progress = self.context.ui.progress("evaluate", self.data.records.len() as u64);
        let mut scored = Vec::with_capacity(self.data.records.len());
        for (streams, records) in parts.iter().zip(self.data.records.chunks(RECORDS)) {
            let mut sums = vec![];
            for stream in streams {
                batch.load(device, stream)?;
                decoder.loss(&mut acts, &batch, view)?;
                let first = sums.len();
                sums.resize(first + stream.segments(), 0.0f64);
                for (segment, loss) in stream.label_segment.iter().zip(device.to_host(acts.losses())?) {
                    sums[first + *segment as usize] -= f64::from(loss);
                }
            }
            let mut sums = sums.into_iter();
            for record in records {
                let count = record.choices.as_ref().map_or(0, |choices| choices.texts.len());
                scored.push(sums.by_ref().take(count).collect());
            }
            progress.set(scored.len() as u64, "");
        }
        Ok(scored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likeliest_choice_with_and_without_its_length() {
        let texts = ["no", "a long answer", "naïve"].map(String::from).to_vec();
        let choices = Choices { texts, right: 1 };
        let found = [-4.0, -6.0, -5.0];
        assert_eq!(likeliest(&choices, &found, false), 0);
        assert_eq!(likeliest(&choices, &found, true), 1);
        assert_eq!(likeliest(&choices, &[-1.0, -0.5, -0.5], false), 1, "the first among equals");
    }
}
