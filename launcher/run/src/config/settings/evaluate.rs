//! `[evaluate]`: generation and scoring.

use super::bounds::{Findings, MAX_ITEMS, MAX_TOKENS};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Generation and scoring.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluateConfig {
    /// Which number is the score. Exact match and ROUGE-1 are both computed of generated answers, `acc` and
    /// `acc_norm` both of the likelihoods of choices.
    pub metric: MetricChoice,
    /// Which part of a text is the answer that exact match compares.
    pub answer_extraction: AnswerForm,
    /// What ROUGE-1 takes for a word. Set it to `unicode` for languages other than English.
    pub rouge_tokenizer: RougeTokens,
    /// Tokens generated for one example, at most. Long reasoning needs more, and takes longer.
    pub max_new_tokens: usize,
    /// Examples that a device generates at once. Smaller takes less memory.
    pub per_device_eval_batch_size: usize,
}

impl Default for EvaluateConfig {
    fn default() -> Self {
        Self {
            metric: MetricChoice::Auto,
            answer_extraction: AnswerForm::AfterHashes,
            rouge_tokenizer: RougeTokens::default(),
            max_new_tokens: 512,
            per_device_eval_batch_size: 32,
        }
    }
}

impl EvaluateConfig {
    pub(super) fn check(&self, findings: &mut Findings) {
        let batch = self.per_device_eval_batch_size;
        findings.whole("evaluate.per_device_eval_batch_size", batch, 1..=MAX_ITEMS);
        findings.whole("evaluate.max_new_tokens", self.max_new_tokens, 1..=MAX_TOKENS);
    }
}

/// Which number is the score.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MetricChoice {
    /// ROUGE-1 for summaries of dialogues, `multiple_choice` for data sets with choices, exact match for
    /// everything else.
    Auto,
    /// Right answers as a fraction of all.
    ExactMatch,
    /// Mean ROUGE-1 F1.
    Rouge1,
    /// Questions whose right choice is the likeliest, as a fraction of all: acc of lm-evaluation-harness.
    MultipleChoice,
    /// The same by likelihood per character: acc_norm.
    MultipleChoiceNorm,
}

/// What ROUGE-1 takes for a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RougeTokens {
    /// Runs of a–z and 0–9, as the Python package rouge_score has it.
    #[default]
    RougeScore,
    /// Runs of letters and digits of any script, and single characters of scripts that put no spaces
    /// between words.
    Unicode,
}

/// Which part of a text is the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AnswerForm {
    /// What follows the last `####`.
    AfterHashes,
    /// All of it.
    Whole,
}
