//! `[translate]`: translation by products.

use super::bounds::{Findings, MAX_ITEMS};
use gradtx_models::lora::MAX_RANK;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Translation by `--method products`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TranslateConfig {
    /// Rank of the LLM's adapter that a weighted sum of products is written as; it need not be
    /// `lora.r`. Not used with `lora.freeze_a`, where the sum is of rank `lora.r` as it is.
    pub lora_r: usize,
    /// Penalty of the regression: a number, as a multiple of the mean square of the shadow groups'
    /// TinyLM updates less their mean; or how one is chosen.
    pub penalty: PenaltyChoice,
    /// Public examples of a left-out group that the loss is measured on, where the penalty is chosen by
    /// it. More take longer and choose better.
    pub penalty_examples: usize,
}

impl Default for TranslateConfig {
    fn default() -> Self {
        Self { lora_r: 16, penalty: PenaltyChoice::By(PenaltyRule::Loss), penalty_examples: 24 }
    }
}

impl TranslateConfig {
    pub(super) fn check(&self, findings: &mut Findings) {
        findings.whole("translate.lora_r", self.lora_r, 1..=MAX_RANK as u64);
        if let PenaltyChoice::Fixed(penalty) = self.penalty {
            findings.positive("translate.penalty", penalty, 1e6);
        }
        findings.whole("translate.penalty_examples", self.penalty_examples, 1..=MAX_ITEMS);
    }
}

/// A penalty, or how it is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "translate.penalty: expected \"loss\", \"mse\" or a number")]
pub enum PenaltyChoice {
    /// This one.
    Fixed(f64),
    /// The best of several, by this measure.
    By(PenaltyRule),
}

/// What a penalty is chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PenaltyRule {
    /// The LLM's loss on public examples of groups that are left out.
    Loss,
    /// The squared error of the products of groups that are left out.
    Mse,
}
