//! From a JSONL file to the packed streams of optimizer steps.
//!
//! In: a file of examples and a model's tokenizer. Out: [`Data`] with its examples
//! for one model, and for every optimizer step of a job the segments of packed streams.

use crate::config::{Config, LossNormalization, Recipe};
use crate::failure::unusable;
use crate::stages::side::Side;
use anyhow::Result;
use gradtx_kernels::rng::{derive, derive_named};
use gradtx_runtime::artifact::checksum_file;
use gradtx_runtime::data::{
    self, Example, PackedBatch, Record, Renderer, SegmentInfo, TextTokenizer, build_examples,
    expect_vocabulary, read_jsonl,
};
use std::path::{Path, PathBuf};

/// The examples of a file, as they were read.
pub struct Data {
    /// The file.
    pub path: PathBuf,
    /// Checksum of its bytes.
    pub checksum: String,
    /// Its examples.
    pub records: Vec<Record>,
}

impl Data {
    /// Reads a JSONL file.
    pub fn read(path: &Path, setting: &str) -> Result<Self> {
        if path.as_os_str().is_empty() {
            return Err(unusable(format!("{setting}: not set; expected a JSONL file")));
        }
        Ok(Self { path: path.to_owned(), checksum: checksum_file(path)?, records: read_jsonl(path)? })
    }

    /// Rows by their value in a column, in the order in which the values first appear.
    pub fn groups(&self, column: &str) -> Result<Vec<Vec<usize>>> {
        let mut groups: Vec<(&serde_json::Value, Vec<usize>)> = vec![];
        for (row, record) in self.records.iter().enumerate() {
            let value = record
                .extra
                .get(column)
                .ok_or_else(|| record.origin.error(format!("there is no `{column}`")))?;
            match groups.iter_mut().find(|(known, _)| *known == value) {
                Some((_, rows)) => rows.push(row),
                None => groups.push((value, vec![row])),
            }
        }
        Ok(groups.into_iter().map(|(_, rows)| rows).collect())
    }

    /// The examples as one model sees them.
    pub fn examples(&self, config: &Config, side: &Side, threads: usize) -> Result<data::Dataset> {
        let tokenizer = TextTokenizer::load(&side.dir)?;
        let renderer = Renderer::new(config.data.prompt, &tokenizer)?;
        let length = Some(config.data.max_length);
        let examples = build_examples(&self.records, &renderer, &tokenizer, length, threads)?;
        expect_vocabulary(&examples.examples, side.model.vocab)?;
        Ok(examples)
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    fn example(tokens: usize, trained: usize) -> Example {
        let trained = (0..tokens).map(|i| i >= tokens - trained).collect();
        Example { tokens: vec![1; tokens], trained }
    }

    #[test]
    fn weights_of_a_step_sum_to_one_however_it_is_cut() {
        let examples = [example(5, 1), example(9, 4), example(3, 2)];
        let examples: Vec<&Example> = examples.iter().collect();
        for (normalization, first) in
            [(LossNormalization::Sequence, 1.0 / 3.0), (LossNormalization::Token, 1.0 / 7.0)]
        {
            let recipe = Recipe { normalization, ..Recipe::default() };
            for (limit, count) in [(100, 1), (14, 2), (1, 3)] {
                let mut streams = Streams::new(limit);
                streams.push_step(&examples, &recipe, 0, 7, 0);
                let streams = streams.finish();
                assert_eq!(streams.len(), count);
                let sum: f64 = streams.iter().flat_map(|s| &s.weights).sum();
                assert!((sum - 1.0).abs() < 1e-12);
                assert!((streams[0].weights[0] - first).abs() < 1e-12);
            }
        }
    }
}
