//! From a JSONL file to the batches of optimizer steps.
//!
//! In: a file of examples and a model's tokenizer. Out: [`Examples`], and for every
//! optimizer step of a job the segments of one packed stream. Which examples a job sees
//! at which step depends on its key and on nothing else.

use crate::config::{Config, LossNormalization, PromptForm, Recipe};
use crate::stages::side::Side;
use anyhow::{Result, ensure};
use gradtx_kernels::rng::{derive, derive_named};
use gradtx_runtime::data::{Example, ExampleOrder, PackedBatch, SegmentInfo};
use std::path::Path;

/// The packed streams of one optimizer step, each of at most so many tokens.
///
/// Where a stream ends is decided by the examples alone, never by the device.
pub struct Streams {
    limit: usize,
    done: Vec<PackedBatch>,
    open: PackedBatch,
}

impl Streams {
    /// Empty; a stream holds at most `limit` tokens, or one longer example.
    pub fn new(limit: usize) -> Self {
        Self { limit, done: vec![], open: PackedBatch::default() }
    }

    /// Puts in the examples of one job's optimizer step. `row` is the job's row of the
    /// adapter and gradient matrices, `key` its own key.
    pub fn push_step(&mut self, examples: &[&Example], recipe: &Recipe, row: usize, key: u64, step: u32) {
        let key = derive(derive_named(key, "dropout"), step as u64);
        let all: usize = examples.iter().map(|e| e.labels()).sum();
        for (i, example) in examples.iter().enumerate() {
            let weight = match recipe.normalization {
                LossNormalization::Sequence => 1.0 / (example.labels().max(1) * examples.len()) as f64,
                LossNormalization::Token => 1.0 / all.max(1) as f64,
            };
            if !self.open.is_empty() && self.open.len() + example.tokens.len() > self.limit {
                self.done.push(std::mem::take(&mut self.open));
            }
            let info = SegmentInfo { adapter: row as u32, grad_row: row as u32, key: derive(key, i as u64) };
            self.open.push(example, info, weight);
        }
    }

    /// The streams.
    pub fn finish(mut self) -> Vec<PackedBatch> {
        if !self.open.is_empty() {
            self.done.push(self.open);
        }
        self.done
    }
}
