//! `[finetune]`: fine-tuning on private data.

use super::bounds::Findings;
use super::recipe::Recipe;
use gradtx_runtime::optim::Decay;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Fine-tuning on private data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FinetuneConfig {
    /// A client's fine-tuning of the TinyLM.
    pub tiny: Recipe,
    /// Fine-tuning of the LLM on the same data, for comparison.
    pub llm: Recipe,
}

impl Default for FinetuneConfig {
    fn default() -> Self {
        let client = Recipe {
            max_steps: 1250,
            learning_rate: 4e-5,
            lr_scheduler_type: Decay::Linear,
            ..Recipe::default()
        };
        Self { tiny: client.clone(), llm: client }
    }
}

impl FinetuneConfig {
    pub(super) fn check(&self, findings: &mut Findings) {
        self.tiny.check("finetune.tiny", findings);
        self.llm.check("finetune.llm", findings);
    }
}
