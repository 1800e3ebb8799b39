//! The mean of all shadow teachers, whatever the client sends.

use super::baseline::{About, Baseline, Kind, Pairs, mean_of};
use anyhow::Result;

/// The mean of all teachers.
pub struct Mean;

impl Baseline for Mean {
    fn about(&self) -> &'static About {
        &About {
            name: "mean",
            help: "The mean of the LLM's shadow updates: a constant",
            label: "mean of teachers",
            kind: Kind::Control,
            called: "the mean of the LLM's shadow updates",
            what: "The mean of the LLM's shadow updates, a constant that knows nothing of the client,",
            as_good: "A constant is enough here, so this comparison shows nothing about translation.",
            worse: "a constant is not enough",
        }
    }

    fn translate(&self, pairs: &dyn Pairs, _: &[f32]) -> Result<Vec<f32>> {
        let all: Vec<usize> = (0..pairs.count()).collect();
        mean_of(&all, |pair| pairs.teacher(pair))
    }
}
