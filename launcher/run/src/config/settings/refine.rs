//! `[refine]`: refinement of translations on public prompts.

use super::bounds::{Findings, MAX_ITEMS};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Refinement of translations on public prompts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RefineConfig {
    /// Rounds: answers of both models, training on those that agree.
    pub num_rounds: usize,
    /// Public prompts that both models answer in a round.
    pub num_prompts: usize,
    /// Prompts that the LLM writes in the style of public ones, which are asked as well: for public
    /// prompts that do not cover those of the client. 0: none.
    pub synthetic_prompts: usize,
    /// Optimizer steps of one round.
    pub steps_per_round: u32,
    /// Examples of one optimizer step, drawn with replacement.
    pub global_batch_size: usize,
    /// Answers that must agree; with fewer there is no training.
    pub min_agreements: usize,
    /// Where too few agree, the first round is trained on the half of the TinyLM's answers that it is
    /// surest of, if their mean probability is at least this. 1: never.
    pub min_confidence: f64,
}

impl Default for RefineConfig {
    fn default() -> Self {
        Self {
            num_rounds: 2,
            num_prompts: 384,
            synthetic_prompts: 0,
            steps_per_round: 40,
            global_batch_size: 16,
            min_agreements: 16,
            min_confidence: 0.3,
        }
    }
}

impl RefineConfig {
    pub(super) fn check(&self, findings: &mut Findings) {
        findings.whole("refine.num_rounds", self.num_rounds, 1..=100);
        findings.whole("refine.num_prompts", self.num_prompts, 2..=MAX_ITEMS);
        findings.whole("refine.synthetic_prompts", self.synthetic_prompts, 0..=1_000_000);
        findings.whole("refine.steps_per_round", self.steps_per_round, 1..=1_000_000);
        findings.whole("refine.global_batch_size", self.global_batch_size, 1..=MAX_ITEMS);
        findings.whole("refine.min_agreements", self.min_agreements, 1..=MAX_ITEMS);
        findings.real("refine.min_confidence", self.min_confidence, 0.0..=1.0);
    }
}
