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
    /// Train LoRA adapters. `false`: the full weights of the layers that `lora.layers_to_transform` names (empty: all;
    /// of an emulator, those of its edge), biases and norms included; the result is `layers.safetensors`, for `gradtx
    /// plugin` and `gradtx merge`, and no update vector. It takes 16 bytes per trained value beside the model.
    pub use_peft: bool,
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
        Self { use_peft: true, tiny: client.clone(), llm: client }
    }
}

impl FinetuneConfig {
    pub(super) fn check(&self, findings: &mut Findings) {
        self.tiny.check("finetune.tiny", findings);
        self.llm.check("finetune.llm", findings);
    }
}
