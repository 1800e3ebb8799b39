//! [`StepStreams`]: the packed streams of the optimizer steps of some jobs.
//!
//! In: jobs of examples, each with a key. Out: for every step the streams of its examples, job by job, and how well
//! they are filled over all steps. All of it is a function of examples, keys and recipe.

use crate::examples::Streams;
use anyhow::Result;
use gradtx_kernels::rng::derive_named;
use gradtx_run::config::Recipe;
use gradtx_runtime::data::{BatchCapacity, Example, Order, PackedBatch};
use std::fmt;

/// One training of its own: an adapter, or some layers.
pub struct Job<'a> {
    /// Its examples.
    pub examples: Vec<&'a Example>,
    /// Key of its order and its dropout.
    pub key: u64,
}

/// How examples are put into streams.
#[derive(Clone, Copy)]
pub(crate) struct StepStreams<'a> {
    /// The recipe of every job.
    pub recipe: &'a Recipe,
    /// Most tokens of one packed stream.
    pub stream_tokens: usize,
}

/// How the examples of jobs fill their packed streams, over all steps.
#[derive(Clone, Copy, Debug, Default)]
pub struct Packing {
    /// What the largest stream needs.
    pub capacity: BatchCapacity,
    /// Streams of all steps.
    pub streams: usize,
    /// Tokens in them.
    pub tokens: usize,
    /// Most tokens that a stream may have.
    pub limit: usize,
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let used = 100.0 * self.tokens as f64 / (self.streams * self.limit).max(1) as f64;
        write!(f, "{} packed streams of {} tokens, {used:.1} % used", self.streams, self.limit)
    }
}

impl StepStreams<'_> {
    /// The order of every job's examples.
    pub fn orders(&self, jobs: &[Job<'_>]) -> Result<Vec<Order>> {
        let batch = self.recipe.global_batch_size;
        let order = |job: &Job<'_>| Order::new(job.examples.len(), batch, derive_named(job.key, "order"));
        Ok(jobs.iter().map(order).collect::<gradtx_runtime::Result<_>>()?)
    }

    /// The packed streams of a step: every job's examples, job by job.
    pub fn of_step(&self, orders: &mut [Order], jobs: &[Job<'_>], step: u32) -> Vec<PackedBatch> {
        let mut streams = Streams::new(self.stream_tokens);
        for (row, (job, order)) in jobs.iter().zip(orders).enumerate() {
            let indices = order.step(step as usize);
            let examples: Vec<&Example> = indices.iter().map(|&i| job.examples[i]).collect();
            streams.push_step(&examples, self.recipe, row, job.key, step);
        }
        streams.finish()
    }

    /// The streams of all steps, counted.
    pub fn packing(&self, orders: &mut [Order], jobs: &[Job<'_>]) -> Packing {
        let mut packing = Packing { limit: self.stream_tokens, ..Packing::default() };
        for step in 0..self.recipe.max_steps {
            for stream in self.of_step(orders, jobs, step) {
                packing.capacity = packing.capacity.max(BatchCapacity::of([&stream]));
                packing.streams += 1;
                packing.tokens += stream.len();
            }
        }
        packing
    }

    /// Tokens of all steps of these jobs.
    pub fn tokens(&self, jobs: &[Job<'_>]) -> Result<u64> {
        let mut orders = self.orders(jobs)?;
        let mut tokens = 0;
        for step in 0..self.recipe.max_steps {
            tokens += tokens_of_step(&mut orders, jobs, step).iter().sum::<u64>();
        }
        Ok(tokens)
    }
}

/// Tokens of a step, of every job.
pub(crate) fn tokens_of_step(orders: &mut [Order], jobs: &[Job<'_>], step: u32) -> Vec<u64> {
    let of_job = |(order, job): (&mut Order, &Job<'_>)| {
        let examples = order.step(step as usize);
        examples.iter().map(|&i| job.examples[i].tokens.len() as u64).sum()
    };
    orders.iter_mut().zip(jobs).map(of_job).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_is_told_as_a_share_of_the_room() {
        let packing = Packing { streams: 3, tokens: 300, limit: 400, ..Packing::default() };
        assert_eq!(packing.to_string(), "3 packed streams of 400 tokens, 25.0 % used");
    }
}
