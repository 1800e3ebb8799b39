//! What is asked, and what both models answer.
//!
//! In: public prompts, a model, an adapter. Out: answers, and for the TinyLM how sure it is of each. They
//! stay in the memory of the ranks.

use super::shares::Shares;
use super::synthetic::with_prompt;
use crate::fold::Fold;
use crate::stages::evaluate::without_prefix;
use anyhow::Result;
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{
    Activations, AdapterView, Continuation, Decoder, GenerateLimits, Generator, Mode, Prompt,
};
use gradtx_run::config::{Config, Recipe};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, memory_for};
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, Example, Record};
use gradtx_train::examples::{Data, Streams};
use gradtx_train::model_spec::ModelSpec;
use gradtx_train::prompts::Prompts;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// The prompts, for both models.
pub(super) struct Asked {
    pub(super) records: Vec<Record>,
    pub(super) tiny: Vec<Vec<u32>>,
    pub(super) llm: Vec<Vec<u32>>,
}

impl Asked {
    pub(super) fn choose(
        config: &Config,
        public: &Data,
        prompts: &[Prompts; 2],
        fold: Option<&Fold>,
    ) -> Result<Self> {
        let key = derive_named(config.seed, "prompts of refinement");
        let order = Stream::new(key).permutation(public.records.len());
        let held_out: HashSet<usize> = fold.iter().flat_map(|fold| fold.rows.iter().copied()).collect();
        let chosen = order.into_iter().filter(|row| !held_out.contains(row)).take(config.refine.num_prompts);
        let records: Vec<Record> = chosen.map(|row| public.records[row].clone()).collect();
        let tokens =
            |prompts: &Prompts| records.iter().map(|r| prompts.prompt(r)).collect::<Result<Vec<_>>>();
        Ok(Self { tiny: tokens(&prompts[0])?, llm: tokens(&prompts[1])?, records })
    }
}

impl Asked {
    /// Asks more, in the form of the first record.
    pub(super) fn add(&mut self, prompts: &[Prompts; 2], texts: &[String]) -> Result<()> {
        for text in texts {
            let record = with_prompt(&self.records[0], text, "");
            self.tiny.push(prompts[0].prompt(&record)?);
            self.llm.push(prompts[1].prompt(&record)?);
            self.records.push(record);
        }
        Ok(())
    }
}

/// An answer, which never leaves the memory of the ranks.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(super) struct Answer {
    pub(super) tokens: Vec<u32>,
    /// Without what the prompt form writes before an answer.
    pub(super) text: String,
    /// It ended by itself.
    pub(super) ended: bool,
}

/// Room for answers to these prompts.
pub(super) fn limits(config: &Config, prompts: &Prompts, tokens: &[Vec<u32>]) -> GenerateLimits {
    let settings = &config.evaluate;
    let longest = tokens.iter().map(Vec::len).max().unwrap_or(1);
    GenerateLimits {
        rows: settings.per_device_eval_batch_size.min(tokens.len()),
        prompt_tokens: longest
            .max(config.device.max_tokens_per_microbatch.min(longest * settings.per_device_eval_batch_size)),
        context: (longest + settings.max_new_tokens).min(prompts.context()),
    }
}

/// A model with an adapter, ready to answer prompts.
pub(super) struct Answering<'a, X: Real<Acc = f32>, D: Backend<X>> {
    decoder: &'a Decoder<D, X>,
    generator: Generator<D, X>,
    view: AdapterView<'a, D, f32>,
    prompts: &'a Prompts,
    max_new: usize,
    /// What the prompt form writes before an answer.
    prefix: String,
}

impl<'a, X: Real<Acc = f32>, D: Backend<X>> Answering<'a, X, D> {
    /// With room for these prompts.
    pub(super) fn new(
        decoder: &'a Decoder<D, X>,
        config: &Config,
        prompts: &'a Prompts,
        tokens: &[Vec<u32>],
        view: AdapterView<'a, D, f32>,
    ) -> Result<Self> {
        let limits = limits(config, prompts, tokens);
        let generator = Generator::new(decoder, limits, Some(view.layout))?.within(prompts.context());
        let tokenizer = &prompts.tokenizer;
        let prefix = tokenizer.decode(&tokenizer.encode(prompts.check.prefix())?.ids, true)?;
        Ok(Self { decoder, generator, view, prompts, max_new: config.evaluate.max_new_tokens, prefix })
    }

    /// Answers some of them.
    pub(super) fn answers(&mut self, tokens: &[Vec<u32>]) -> Result<Vec<Answer>> {
        let asked: Vec<Prompt> =
            tokens.iter().map(|tokens| Prompt { tokens: tokens.clone(), adapter: Some(0) }).collect();
        let stops = self.prompts.check.stops();
        let found = self.generator.generate(self.decoder, Some(self.view), &asked, self.max_new, stops)?;
        let answer = |Continuation { tokens, ended }| {
            let text = self.prompts.tokenizer.decode(&tokens, true)?;
            Ok(Answer { text: without_prefix(&text, &self.prefix).to_string(), tokens, ended })
        };
        found.into_iter().map(answer).collect()
    }
}

/// The token that ends an answer in training examples.
pub(super) fn end_token(prompts: &Prompts, record: &Record) -> Result<Option<u32>> {
    let (data, _) = prompts.examples(std::slice::from_ref(record), 1)?;
    let last = data.examples.first().and_then(|example| {
        let trained = example.tokens.iter().zip(&example.trained).filter(|(_, is_trained)| **is_trained);
        trained.map(|(&token, _)| token).find(|token| prompts.check.stops().contains(token))
    });
    Ok(last.or(prompts.check.stops().first().copied()))
}

/// A prompt with an answer to be learned.
pub(super) fn example(prompt: &[u32], answer: &[u32], end: Option<u32>) -> Example {
    let tokens: Vec<u32> = prompt.iter().chain(answer).copied().chain(end).collect();
    let trained = (0..tokens.len()).map(|i| i >= prompt.len()).collect();
    Example { tokens, trained }
}

/// What the TinyLM answers, and how sure it is.
pub(super) struct Given {
    pub(super) answers: Vec<Answer>,
    /// Probability of every answer; 0 of those that did not end.
    pub(super) probability: Vec<f64>,
}

impl Given {
    /// Answers with the bits of their probabilities.
    fn of(all: Vec<(Answer, u64)>) -> Self {
        let (answers, bits): (Vec<Answer>, Vec<u64>) = all.into_iter().unzip();
        let of_ended = |(answer, bits): (&Answer, u64)| if answer.ended { f64::from_bits(bits) } else { 0.0 };
        let probability = answers.iter().zip(bits).map(of_ended).collect();
        Self { answers, probability }
    }

    /// The half of the ended answers that the TinyLM is surest of, in the prompts' order, and their mean
    /// probability.
    pub(super) fn surest(&self) -> (Vec<usize>, f64) {
        let mut ended: Vec<usize> = (0..self.answers.len()).filter(|&i| self.answers[i].ended).collect();
        ended.sort_by(|&i, &j| self.probability[j].total_cmp(&self.probability[i]).then(i.cmp(&j)));
        ended.truncate(ended.len().div_ceil(2));
        ended.sort_unstable();
        let sum = ended.iter().fold(0.0, |sum, &i| sum + self.probability[i]);
        let mean = sum / ended.len().max(1) as f64;
        (ended, mean)
    }
}

pub(super) struct Tiny<'a> {
    pub(super) context: &'a Context,
    pub(super) shares: Shares<'a>,
    pub(super) config: &'a Config,
    pub(super) side: &'a ModelSpec,
    pub(super) prompts: &'a Prompts,
    pub(super) asked: &'a Asked,
    pub(super) adapter: &'a [f32],
}

impl Work for Tiny<'_> {
    /// On rank 0.
    type Output = Option<Given>;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Option<Given>> {
        let Self { config, side, prompts, asked, .. } = self;
        let mut plan = Decoder::<D, X>::plan(&side.model, false);
        let limits = limits(config, prompts, &asked.tiny);
        plan.extend(Generator::<D, X>::plan(&side.model, limits, Some(&side.layout)));
        plan.check(memory_for(device, &self.context.place)?)?;
        let decoder = Decoder::<D, X>::load(device, &side.dir)?;
        let values = device.buffer_from(self.adapter)?;
        let view = AdapterView { values: &values, layout: &side.layout, dropout: 0.0 };
        let mut answering = Answering::new(&decoder, config, prompts, &asked.tiny, view)?;
        let end = end_token(prompts, &asked.records[0])?;
        // As bits: a decimal number in JSON may lose its last digit.
        let all = self.shares.gather(asked.tiny.len(), |chunk| {
            let prompts = &asked.tiny[chunk];
            let answers = answering.answers(prompts)?;
            let examples: Vec<Example> =
                prompts.iter().zip(&answers).map(|(prompt, a)| example(prompt, &a.tokens, end)).collect();
            let probability =
                probabilities(&decoder, view, &examples, config.device.max_tokens_per_microbatch)?;
            Ok(answers.into_iter().zip(probability.into_iter().map(f64::to_bits)).collect())
        })?;
        Ok(all.map(Given::of))
    }
}

/// The probability of the answer of every example.
fn probabilities<X: Real<Acc = f32>, D: Backend<X>>(
    decoder: &Decoder<D, X>,
    view: AdapterView<'_, D, f32>,
    examples: &[Example],
    stream_tokens: usize,
) -> Result<Vec<f64>> {
    let mut streams = Streams::new(stream_tokens);
    let recipe = Recipe::default();
    let all: Vec<&Example> = examples.iter().collect();
    streams.push_step(&all, &recipe, 0, 0, 0);
    let streams = streams.finish();
    let capacity = BatchCapacity::of(&streams);
    let device = decoder.device();
    let mut acts = Activations::new(decoder, capacity, Mode::Inference(Some(view.layout)))?;
    let mut batch = DeviceBatch::new(device, capacity)?;
    let mut sums = vec![];
    for stream in &streams {
        batch.load(device, stream)?;
        decoder.loss(&mut acts, &batch, Some(view))?;
        let losses = device.to_host(acts.losses())?;
        let first = sums.len();
        sums.resize(first + stream.segments(), 0.0f64);
        for (segment, loss) in stream.label_segment.iter().zip(losses) {
            sums[first + *segment as usize] += f64::from(loss);
        }
    }
    Ok(sums.into_iter().map(|sum| (-sum).exp()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_surest_half_is_of_those_that_ended() {
        let answer = |ended| Answer { ended, ..Answer::default() };
        let given = Given {
            answers: [true, false, true, true, true, true].map(answer).to_vec(),
            probability: vec![0.2, 0.0, 0.9, 0.4, 0.9, 0.1],
        };
        let (surest, mean) = given.surest();
        assert_eq!(surest, [2, 3, 4]);
        assert!((mean - (0.9 + 0.9 + 0.4) / 3.0).abs() < 1e-12);
        let nothing = Given { answers: vec![answer(false); 3], probability: vec![0.0; 3] };
        assert_eq!(nothing.surest(), (vec![], 0.0));
    }

    #[test]
    fn examples_train_on_the_answer_and_its_end() {
        let found = example(&[1, 2], &[5, 6], Some(9));
        assert_eq!(found.tokens, [1, 2, 5, 6, 9]);
        assert_eq!(found.trained, [false, false, true, true, true]);
    }
}
