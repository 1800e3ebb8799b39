//! Fine-tuning of several adapters of one model at once: what curation and clients share.
//!
//! In: a model, and jobs of examples in an order of their own. Out: for every job its
//! losses and the snapshots of its update. The jobs share the packed streams
//! of an optimizer step; a job's numbers do not depend on which others share it.

use crate::config::Recipe;
use crate::stages::examples::Streams;
use crate::stages::side::Side;
use anyhow::Result;
use gradtx_kernels::rng::derive_named;
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::Decoder;
use gradtx_models::lora::LoraJobs;
use gradtx_runtime::data::{BatchCapacity, Example, Order};

/// One adapter to be trained.
pub struct Job<'a> {
    /// Its examples.
    pub examples: Vec<&'a Example>,
    /// Key of its order and its dropout.
    pub key: u64,
}

/// Which steps' updates are kept: `count` of them, `every` steps apart, the last of the last step.
#[derive(Clone, Copy, Debug)]
pub struct Snapshots {
    /// Number of them.
    pub count: usize,
    /// Steps from one to the next.
    pub every: u32,
}

impl Snapshots {
    /// Whether the update after this step (from 0, of `steps`) is kept.
    fn at(&self, step: u32, steps: u32) -> bool {
        let back = steps - 1 - step;
        back.is_multiple_of(self.every) && ((back / self.every) as usize) < self.count
    }
}

/// What came of a job.
#[derive(Clone, Debug, Default)]
pub struct Trained {
    /// Loss of every optimizer step, averaged as the recipe says.
    pub losses: Vec<f64>,
    /// `[snapshots, L, d]`
    pub updates: Vec<f32>,
}

/// Trains jobs together, in streams of at most `limit` tokens.
pub fn train<X: Real<Acc = f32>, D: Backend<X>>(
    decoder: &Decoder<D, X>,
    side: &Side,
    recipe: &Recipe,
    jobs: &[Job<'_>],
    snapshots: Snapshots,
    limit: usize,
    mut progress: impl FnMut(u32),
) -> Result<Vec<Trained>> {
    let order = |job: &Job<'_>| Order::new(job.examples.len(), recipe.batch, derive_named(job.key, "order"));
    let mut orders = jobs.iter().map(order).collect::<gradtx_runtime::Result<Vec<_>>>()?;
    let mut streams_of = |step: u32| {
        let mut streams = Streams::new(limit);
        for (row, (job, order)) in jobs.iter().zip(&mut orders).enumerate() {
            let indices = order.step(step as usize);
            let examples: Vec<&Example> = indices.iter().map(|&i| job.examples[i]).collect();
            streams.push_step(&examples, recipe, row, job.key, step);
        }
        streams.finish()
    };
    let mut capacity = BatchCapacity::default();
    for stream in (0..recipe.steps).flat_map(&mut streams_of) {
        capacity.tokens = capacity.tokens.max(stream.len());
        capacity.segments = capacity.segments.max(stream.segments());
        capacity.labels = capacity.labels.max(stream.labels());
    }
    let mut adapters = LoraJobs::new(decoder, &side.layout, jobs.len(), &side.init, capacity)?;
    let mut trained = vec![Trained::default(); jobs.len()];
    for step in 0..recipe.steps {
        let mut losses = vec![0.0; jobs.len()];
        for stream in streams_of(step) {
            let part = adapters.accumulate(decoder, &stream)?;
            losses.iter_mut().zip(part).for_each(|(sum, loss)| *sum += loss);
        }
        adapters.apply(recipe.step(step), recipe.clip())?;
        for (job, (result, loss)) in trained.iter_mut().zip(losses).enumerate() {
            result.losses.push(loss);
            if snapshots.at(step, recipe.steps) {
                result.updates.extend(adapters.update(job)?);
            }
        }
        progress(step + 1);
    }
    Ok(trained)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_end_with_the_last_step() {
        let kept = |count, every| {
            let snapshots = Snapshots { count, every };
            (0..10).filter(|&step| snapshots.at(step, 10)).collect::<Vec<u32>>()
        };
        assert_eq!(kept(3, 2), [5, 7, 9]);
        assert_eq!(kept(1, 4), [9]);
        assert_eq!(kept(10, 1), (0..10).collect::<Vec<_>>());
    }
}
