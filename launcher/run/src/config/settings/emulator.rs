//! `[emulator]`: compression of the middle layers of the LLM (GradOT).

use super::bounds::{Findings, MAX_ITEMS};
use gradtx_models::gradot::{Allocate, Score};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Compression of the middle layers of the LLM into an emulator (GradOT), see docs/gradot.md. Defaults are ours: the
/// paper's are not known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EmulatorConfig {
    /// First and last layers that stay whole, which clients train: the edge.
    pub edge: [usize; 2],
    /// Parameters of the matrices between that are kept, as a share. The smaller it is, the less the emulator can do
    /// for its client, and the worse an edge that was trained through it fits the LLM.
    pub ratio: f64,
    /// Weight of the first-order term of the score, relative to the other term: with more, the emulator's loss is
    /// higher, and the edge's gradient is less like the LLM's. 0: none.
    pub lambda: f64,
    /// Share of the ranks with the largest singular values, and of the channels with the highest scores, that every
    /// matrix keeps in any case.
    pub keep: f64,
    /// What shares the budget of parameters: `global` for all layers together, `layer`, `matrix`.
    pub allocate: Allocate,
    /// How ranks and channels are chosen: `gcs`, the gradient-preserving compression score; for comparison
    /// `magnitude`, `activation` or `random`.
    pub score: Score,
    /// Tokens of public examples for the statistics that scores are computed from, and the loss of the emulator; an
    /// eighth of the examples is held out for the latter.
    pub num_tokens: usize,
}

impl Default for EmulatorConfig {
    fn default() -> Self {
        Self {
            edge: [2, 2],
            ratio: 0.6,
            lambda: 0.25,
            keep: 0.05,
            allocate: Allocate::Global,
            score: Score::Gcs,
            num_tokens: 128 * 2048,
        }
    }
}

impl EmulatorConfig {
    pub(super) fn check(&self, findings: &mut Findings) {
        let Self { edge: [first, last], ratio, .. } = *self;
        findings.expect(
            first.saturating_add(last) > 0,
            "emulator.edge = [0, 0]: expected at least one layer that clients can train",
        );
        findings.expect(
            ratio > 0.0 && ratio <= 1.0,
            format!("emulator.ratio = {ratio}: expected a number above 0 and at most 1"),
        );
        findings.real("emulator.lambda", self.lambda, 0.0..=1e6);
        findings.real("emulator.keep", self.keep, 0.0..=1.0);
        findings.whole("emulator.num_tokens", self.num_tokens, 16..=MAX_ITEMS);
    }
}
