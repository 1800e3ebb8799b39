//! The rounds of a refinement: the LLM answers, and is trained on what agrees.
//!
//! In: the TinyLM's answers, a translation. Out: the adapter, and how it went.

use super::answers::{Answer, Asked, Given, answers, capacity, end_token, example, limits};
use super::{Refinement, Round, TrainedOn, Translation};
use crate::score::{answer, exact_match, rouge1};
use anyhow::Result;
use gradtx_kernels::rng::{Stream, derive, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{AdapterView, Decoder, Generator};
use gradtx_models::lora::{BlockLayout, Factor, MultiLora, Stacked};
use gradtx_run::config::{Config, Recipe, RefineConfig};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, memory_for};
use gradtx_runtime::checkpoint::{self, Checkpoint, Values};
use gradtx_runtime::data::{BatchCapacity, Example, Metric, PackedBatch};
use gradtx_runtime::plan::Room;
use gradtx_train::examples::Streams;
use gradtx_train::model_spec::ModelSpec;
use gradtx_train::prompts::Prompts;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Below this share of answers that agree the translation is doubtful.
const DOUBTFUL: f64 = 0.1;

pub(super) struct Llm<'a> {
    pub(super) context: &'a Context,
    pub(super) config: &'a Config,
    pub(super) side: &'a ModelSpec,
    pub(super) prompts: &'a Prompts,
    pub(super) asked: &'a Asked,
    pub(super) given: &'a Given,
    pub(super) translation: &'a Translation,
    pub(super) metric: Metric,
    pub(super) checkpoint: PathBuf,
    /// What the work is: a checkpoint of anything else is not used.
    pub(super) of: Value,
}

impl Work for Llm<'_> {
    /// How it went; the adapter's factors and rank.
    type Output = (Refinement, Vec<f32>, usize);

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Self::Output> {
        let model = &self.side.model;
        let whole = Stacked::new(model, [&self.translation.layout, &self.side.layout])?;
        let layout = whole.layout();
        let memory = memory_for(device, &self.context.place)?;
        let mut plan = Decoder::<D, X>::plan(model, false);
        let limits = limits(self.config, self.prompts, &self.asked.llm);
        plan.extend(Generator::<D, X>::plan(model, limits, Some(layout)));
        plan.check(memory)?;
        let decoder = Decoder::<D, X>::load(device, &self.side.dir)?;
        let (surest, sure) = self.given.surest();
        let answered = self.given.answers.iter().filter(|a| a.ended).count();
        let started = Refinement { prompts: self.asked.llm.len(), answered, sure, rounds: vec![] };
        let (mut refinement, mut values) = match self.restore(&started, layout)? {
            Some(restored) => restored,
            None => (started, whole.join([&self.translation.values, &self.fresh()])),
        };
        let end = end_token(self.prompts, &self.asked.records[0])?;
        for round in refinement.rounds.len()..self.config.refine.num_rounds {
            let on_device = device.buffer_from(&values)?;
            let view = AdapterView { values: &on_device, layout, dropout: 0.0 };
            let own = answers(&decoder, self.config, self.prompts, &self.asked.llm, view)?;
            drop(on_device);
            let agreed = self.agreed(&own);
            let on = self.choose(round, &agreed, (&surest, sure));
            let examples = self.examples(on, (&agreed, &own), &surest, end)?;
            let mut loss = None;
            if on != TrainedOn::Nothing {
                let key = derive(derive_named(self.config.seed, "refinement"), round as u64);
                let training = Training { config: self.config, examples: &examples, key };
                let jobs = training.begin(&decoder, &whole, &values, memory)?;
                (values, loss) = training.run(&decoder, jobs)?;
            }
            let share = agreed.len() as f64 / own.len().max(1) as f64;
            refinement.rounds.push(Round { agreed: agreed.len(), share, trained_on: on, loss });
            self.tell(&refinement);
            self.save(&refinement, &values)?;
        }
        Ok((refinement, values, layout.lora().rank))
    }
}

impl Llm<'_> {
    /// The adapter that shadows start from, doing nothing.
    fn fresh(&self) -> Vec<f32> {
        let (layout, mut values) = (&self.side.layout, self.side.init.clone());
        for block in 0..layout.blocks() {
            for slice in layout.slices().iter().filter(|slice| slice.factor == Factor::B) {
                values[layout.range(block, slice)].fill(0.0);
            }
        }
        values
    }

    /// The prompts that both models answer alike; for summaries, the half of them whose two answers are
    /// most alike.
    fn agreed(&self, own: &[Answer]) -> Vec<usize> {
        let evaluate = &self.config.evaluate;
        let given = &self.given.answers;
        let both: Vec<usize> = (0..own.len()).filter(|&i| own[i].ended && given[i].ended).collect();
        if self.metric == Metric::Rouge1 {
            let alike = |i: usize| rouge1(&own[i].text, &given[i].text, evaluate.rouge_tokenizer);
            let mut both: Vec<(f64, usize)> = both.into_iter().map(|i| (alike(i), i)).collect();
            both.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            both.truncate(both.len().div_ceil(2));
            let mut chosen: Vec<usize> =
                both.into_iter().filter(|(score, _)| *score > 0.0).map(|(_, i)| i).collect();
            chosen.sort_unstable();
            return chosen;
        }
        let is_same = |i: &usize| {
            !answer(&own[*i].text, evaluate.answer_extraction).trim().is_empty()
                && exact_match(&given[*i].text, &own[*i].text, evaluate.answer_extraction)
        };
        both.into_iter().filter(is_same).collect()
    }

    fn choose(&self, round: usize, agreed: &[usize], (surest, sure): (&[usize], f64)) -> TrainedOn {
        let RefineConfig { min_agreements: least, min_confidence: enough, .. } = self.config.refine;
        match agreed.len() >= least {
            true => TrainedOn::Agreed,
            false if round == 0 && sure >= enough && surest.len() >= least => TrainedOn::Surest,
            false => TrainedOn::Nothing,
        }
    }

    /// The LLM's own words where both agree; those of the TinyLM where only it is asked.
    fn examples(
        &self,
        on: TrainedOn,
        (agreed, own): (&[usize], &[Answer]),
        surest: &[usize],
        end: Option<u32>,
    ) -> Result<Vec<Example>> {
        let prompts = &self.asked.llm;
        match on {
            TrainedOn::Nothing => Ok(vec![]),
            TrainedOn::Agreed => {
                Ok(agreed.iter().map(|&i| example(&prompts[i], &own[i].tokens, end)).collect())
            }
            TrainedOn::Surest => {
                let of_tiny = |&i: &usize| {
                    let answer = self.prompts.tokenizer.encode(&self.given.answers[i].text)?.ids;
                    Ok(example(&prompts[i], &answer, end))
                };
                surest.iter().map(of_tiny).collect()
            }
        }
    }

    fn tell(&self, refinement: &Refinement) {
        let Some(Round { agreed, share, trained_on, .. }) = refinement.rounds.last() else { return };
        let number = refinement.rounds.len();
        let on = match trained_on {
            TrainedOn::Agreed => "trained on them".to_string(),
            TrainedOn::Surest => "too few: trained on the answers that the TinyLM is surest of".to_string(),
            TrainedOn::Nothing => {
                format!(
                    "fewer than refine.min_agreements = {}: not trained",
                    self.config.refine.min_agreements
                )
            }
        };
        let all = refinement.prompts;
        let percent = 100.0 * share;
        self.context
            .ui
            .line(format!("refine: round {number}: {agreed} of {all} answers agree ({percent:.0} %), {on}"));
        if number == 1 && *share < DOUBTFUL {
            self.context.ui.notice(&format!(
                "refine: warning: only {percent:.0} % of the answers agree: the translation is doubtful. The \
                 client's task may be unlike all shadows', or its update is not what it seems"
            ));
        }
    }

    fn save(&self, refinement: &Refinement, values: &[f32]) -> Result<()> {
        let state = json!({ "of": self.of, "refinement": refinement });
        Ok(checkpoint::save(&self.checkpoint, &[("adapter", Values::F32(values))], &state)?)
    }

    /// What an earlier process has done, if it is of the same work.
    fn restore(&self, started: &Refinement, layout: &BlockLayout) -> Result<Option<(Refinement, Vec<f32>)>> {
        if !self.checkpoint.is_file() {
            return Ok(None);
        }
        let saved = match Checkpoint::load(&self.checkpoint) {
            Ok(saved) if saved.state()["of"] == self.of => saved,
            Ok(_) => return Ok(None),
            Err(error) => {
                tracing::warn!("{error}; the refinement starts over");
                return Ok(None);
            }
        };
        let found = serde_json::from_value::<Refinement>(saved.state()["refinement"].clone());
        let is_same = |found: &Refinement| Refinement { rounds: vec![], ..found.clone() } == *started;
        match found.ok().filter(is_same) {
            Some(found) if saved.len_of("adapter")? == layout.total() => {
                let mut values = vec![0.0; layout.total()];
                saved.read_f32("adapter", &mut values)?;
                Ok(Some((found, values)))
            }
            _ => Ok(None),
        }
    }
}

/// The training of one round.
struct Training<'a> {
    config: &'a Config,
    examples: &'a [Example],
    key: u64,
}

impl Training<'_> {
    /// As the shadows of the LLM are trained, over the steps of a round.
    fn recipe(&self) -> Recipe {
        let RefineConfig { steps_per_round: steps, global_batch_size: batch, .. } = self.config.refine;
        let of_shadows = self.config.curate.llm.clone();
        let round =
            Recipe { max_steps: steps, num_train_epochs: 0.0, global_batch_size: batch, ..of_shadows };
        let round = round.resolved(self.examples.len());
        Recipe { warmup_steps: round.warmup_steps.min(steps), ..round }
    }

    /// The packed streams of a step; its examples are drawn with replacement.
    fn streams(&self, recipe: &Recipe, step: u32) -> Vec<PackedBatch> {
        let mut random = Stream::new(derive(derive_named(self.key, "examples"), u64::from(step)));
        let drawn: Vec<&Example> = (0..recipe.global_batch_size)
            .map(|_| &self.examples[random.below(self.examples.len())])
            .collect();
        let mut streams = Streams::new(self.config.device.max_tokens_per_microbatch);
        streams.push_step(&drawn, recipe, 0, self.key, step);
        streams.finish()
    }

    /// Buffers for it, with the translation frozen.
    fn begin<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        decoder: &Decoder<D, X>,
        whole: &Stacked,
        values: &[f32],
        memory: Room,
    ) -> Result<MultiLora<D, X>> {
        let recipe = self.recipe();
        let mut room = BatchCapacity::default();
        for step in 0..recipe.max_steps {
            let own = capacity(&self.streams(&recipe, step));
            room.tokens = room.tokens.max(own.tokens);
            room.segments = room.segments.max(own.segments);
            room.labels = room.labels.max(own.labels);
        }
        let mut plan = Decoder::<D, X>::plan(decoder.config(), false);
        plan.extend(MultiLora::<D, X>::plan(decoder.config(), whole.layout(), 1, room));
        plan.check(memory)?;
        Ok(MultiLora::new(decoder, whole.layout(), 1, values, room)?.with_frozen(whole.is_first())?)
    }

    /// Trains, and gives the adapter and the loss of the last step.
    fn run<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        decoder: &Decoder<D, X>,
        mut jobs: MultiLora<D, X>,
    ) -> Result<(Vec<f32>, Option<f64>)> {
        let recipe = self.recipe();
        let optimizer = recipe.optimizer();
        let mut last = 0.0;
        for step in 0..recipe.max_steps {
            last = 0.0;
            for stream in self.streams(&recipe, step) {
                last += jobs.accumulate(decoder, &stream)?.iter().sum::<f64>();
            }
            jobs.apply(optimizer.step(step), optimizer.max_grad_norm)?;
        }
        Ok((jobs.adapter(0)?, Some(last)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_draw_other_examples_and_the_same_again() {
        let config = Config::default();
        let examples: Vec<Example> = (0..50).map(|i| example(&[i, i], &[i], None)).collect();
        let training = Training { config: &config, examples: &examples, key: 3 };
        let recipe = training.recipe();
        assert_eq!(
            (recipe.max_steps, recipe.global_batch_size, recipe.learning_rate),
            (40, 16, config.curate.llm.learning_rate)
        );
        let [first, again, second] = [0, 0, 1].map(|step| training.streams(&recipe, step));
        assert_eq!(first, again);
        assert_ne!(first, second);
        assert_eq!(first.iter().map(PackedBatch::segments).sum::<usize>(), 16);
    }
}
