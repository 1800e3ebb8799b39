//! The training of one round: a fresh adapter beside the frozen translation.
//!
//! In: examples, both adapters. Out: both adapters with the second one trained, and the loss.

use anyhow::Result;
use gradtx_kernels::rng::{Stream, derive, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::Decoder;
use gradtx_models::lora::{MultiLora, Stacked};
use gradtx_run::config::{Config, Recipe, RefineConfig};
use gradtx_runtime::data::{BatchCapacity, Example, PackedBatch};
use gradtx_runtime::plan::Room;
use gradtx_train::examples::Streams;

/// The training of one round.
pub(super) struct Training<'a> {
    pub(super) config: &'a Config,
    pub(super) examples: &'a [Example],
    pub(super) key: u64,
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
    pub(super) fn begin<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        decoder: &Decoder<D, X>,
        whole: &Stacked,
        values: &[f32],
        memory: Room,
    ) -> Result<MultiLora<D, X>> {
        let recipe = self.recipe();
        let steps = (0..recipe.max_steps).map(|step| BatchCapacity::of(&self.streams(&recipe, step)));
        let room = steps.fold(BatchCapacity::default(), BatchCapacity::max);
        let mut plan = Decoder::<D, X>::plan(decoder.config(), false);
        plan.extend(MultiLora::<D, X>::plan(decoder.config(), whole.layout(), 1, room));
        plan.check(memory)?;
        Ok(MultiLora::new(decoder, whole.layout(), 1, values, room)?.with_frozen(whole.is_first())?)
    }

    /// Trains, and gives the adapter and the loss of the last step.
    pub(super) fn run<X: Real<Acc = f32>, D: Backend<X>>(
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
    use super::super::answers::example;
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
