//! `[emulator]`: compression of the middle layers of the LLM (GradOT).

use super::bounds::{Findings, MAX_ITEMS, MAX_REAL};
use gradtx_models::gradot::{Allocate, Score};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A weight that another setting decides.
const UNSET: f64 = -1.0;

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
    /// Whether `lambda` is λ itself, in the units of the two terms, and not relative to their mean sizes.
    pub lambda_absolute: bool,
    /// Share of the ranks with the largest singular values, and of the channels with the highest scores, that every
    /// matrix keeps in any case.
    pub keep: f64,
    /// What shares the budget of parameters: `global` for all layers together, `layer`, `matrix`.
    pub allocate: Allocate,
    /// How ranks and channels are chosen: `gcs`, the gradient-preserving compression score; for comparison
    /// `magnitude`, `activation` or `random`.
    pub score: Score,
    /// Where the labels of the second-order term are from: `empirical`, those of the data, which takes one forward and
    /// backward pass; `sampled`, drawn from the LLM's own probabilities, which takes a forward pass more to draw them,
    /// and another forward and backward pass.
    pub fisher: Fisher,
    /// Tokens of public examples for the statistics that scores are computed from, and the loss of the emulator; an
    /// eighth of the examples is held out for the latter.
    pub num_tokens: usize,
    /// What holds for the attention's matrices in the place of `emulator.ratio` and `emulator.lambda`.
    pub attention: KindConfig,
    /// What holds for the MLPs in the place of `emulator.ratio` and `emulator.lambda`.
    pub mlp: KindConfig,
}

/// Where the labels of the Fisher matrix are from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Fisher {
    /// The data.
    #[default]
    Empirical,
    /// The LLM's own probabilities, drawn from the seed.
    Sampled,
}

/// Settings of one kind of matrices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KindConfig {
    /// Parameters of these matrices that are kept, as a share. 0: `emulator.ratio`.
    pub ratio: f64,
    /// Weight of the first-order term in the score of these matrices. -1: `emulator.lambda`.
    pub lambda: f64,
}

impl Default for KindConfig {
    fn default() -> Self {
        Self { ratio: 0.0, lambda: UNSET }
    }
}

impl Default for EmulatorConfig {
    fn default() -> Self {
        Self {
            edge: [2, 2],
            ratio: 0.6,
            lambda: 0.25,
            lambda_absolute: false,
            keep: 0.05,
            allocate: Allocate::Global,
            score: Score::Gcs,
            fisher: Fisher::Empirical,
            num_tokens: 128 * 2048,
            attention: KindConfig::default(),
            mlp: KindConfig::default(),
        }
    }
}

impl EmulatorConfig {
    /// Parameters that attention and MLPs keep, as shares.
    pub fn ratios(&self) -> [f64; 2] {
        [&self.attention, &self.mlp].map(|kind| if kind.ratio > 0.0 { kind.ratio } else { self.ratio })
    }

    /// Weights of the first-order terms of attention and MLPs.
    pub fn lambdas(&self) -> [f64; 2] {
        [&self.attention, &self.mlp].map(|kind| if kind.lambda == UNSET { self.lambda } else { kind.lambda })
    }

    /// The same with one λ for all matrices.
    pub fn with_lambda(&self, lambda: f64) -> Self {
        let [attention, mlp] =
            [&self.attention, &self.mlp].map(|kind| KindConfig { lambda: UNSET, ..kind.clone() });
        Self { lambda, attention, mlp, ..self.clone() }
    }

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
        findings.real("emulator.lambda", self.lambda, 0.0..=MAX_REAL);
        for (kind, of_kind) in [("attention", &self.attention), ("mlp", &self.mlp)] {
            let KindConfig { ratio, lambda } = *of_kind;
            findings.expect(
                (0.0..=1.0).contains(&ratio),
                format!("emulator.{kind}.ratio = {ratio}: expected a number above 0 and at most 1, or 0 for emulator.ratio"),
            );
            findings.expect(
                lambda == UNSET || (0.0..=MAX_REAL).contains(&lambda),
                format!(
                    "emulator.{kind}.lambda = {lambda}: expected a number from 0, or -1 for emulator.lambda"
                ),
            );
        }
        findings.real("emulator.keep", self.keep, 0.0..=1.0);
        findings.whole("emulator.num_tokens", self.num_tokens, 16..=MAX_ITEMS);
    }
}
