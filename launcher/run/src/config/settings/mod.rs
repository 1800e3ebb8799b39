//! All settings with their defaults, as they stand in a run file. Each section has a file with its
//! types, their defaults, and the values that no stage can use.
//!
//! The doc comments of settings are what `gradtx config` and docs/configuration.md say about them:
//! meaning, unit, when to change it.

mod bounds;
mod curate;
mod data;
mod device;
mod emulator;
mod evaluate;
mod finetune;
mod lora;
mod privacy;
mod recipe;
mod refine;
#[cfg(test)]
mod tests;
mod train;
mod translate;
mod translator;

pub use curate::{CurateConfig, GroupBy};
pub use data::{DataConfig, DataPaths, ReadingInputs};
pub use device::{DeviceConfig, DeviceKind, DtypeKind};
pub use emulator::{EmulatorConfig, Fisher, KindConfig};
pub use evaluate::{AnswerForm, EvaluateConfig, MetricChoice, RougeTokens};
pub use finetune::FinetuneConfig;
pub use lora::{AdapterConfig, TargetModules};
pub use privacy::{Accountant, PrivacyConfig};
pub(super) use recipe::ALTERNATIVES;
pub use recipe::{LossNormalization, Recipe};
pub use refine::RefineConfig;
pub use train::{TrainConfig, ValidationSplit};
pub use translate::{PenaltyChoice, PenaltyRule, TranslateConfig};
pub use translator::TranslatorConfig;

use super::ReuseConfig;
use crate::failure::unusable;
use anyhow::Result;
use bounds::Findings;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Settings of a run. Defaults are those of the method's published scripts, with steps counted in
/// optimizer steps of 16 examples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Seed of every random choice: subsets, orders, dropout, initial adapters. Provider and clients
    /// need the same seed, for an update vector is a change of the initial adapter.
    pub seed: u64,
    /// The pair of base models.
    pub models: Models,
    /// Where to compute, and in what.
    pub device: DeviceConfig,
    /// The provider's public data, and how examples become tokens.
    pub data: DataConfig,
    /// The LoRA adapters of both models.
    pub lora: AdapterConfig,
    /// Curation: fine-tuning of both models on shadow subsets of the public data.
    pub curate: CurateConfig,
    /// The translator: a T5 encoder-decoder. Defaults are the sizes of Flan-T5-Large.
    pub translator: TranslatorConfig,
    /// Training of the translator.
    pub train: TrainConfig,
    /// Fine-tuning on private data.
    pub finetune: FinetuneConfig,
    /// Differentially private fine-tuning on private data (DP-SGD), see docs/privacy.md. Off unless
    /// `target_epsilon` or `noise_multiplier` is set.
    pub privacy: PrivacyConfig,
    /// Translation by `translate --method products`.
    pub translate: TranslateConfig,
    /// Refinement of translations on public prompts. The LLM trains as in `[curate.llm]`, without
    /// dropout.
    pub refine: RefineConfig,
    /// Compression of the LLM into an emulator (GradOT), see docs/gradot.md.
    pub emulator: EmulatorConfig,
    /// Generation and scoring.
    pub evaluate: EvaluateConfig,
    /// Results of other runs, used in the place of this run's own.
    pub reuse: ReuseConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            seed: 1,
            models: Models::default(),
            device: DeviceConfig::default(),
            data: DataConfig::default(),
            lora: AdapterConfig::default(),
            curate: CurateConfig::default(),
            translator: TranslatorConfig::default(),
            train: TrainConfig::default(),
            finetune: FinetuneConfig::default(),
            privacy: PrivacyConfig::default(),
            translate: TranslateConfig::default(),
            refine: RefineConfig::default(),
            emulator: EmulatorConfig::default(),
            evaluate: EvaluateConfig::default(),
            reuse: ReuseConfig::default(),
        }
    }
}

/// Directories of the base models, in Hugging Face form.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Models {
    /// Directory of the client's small model (TinyLM): config.json, weights as safetensors, tokenizer.
    pub tiny: PathBuf,
    /// Directory of the provider's large model (LLM).
    pub llm: PathBuf,
    /// Fields of `config.json` and `adapter_config.json` that gradtx does not know and that may
    /// be ignored all the same: for someone who knows that they do not change the result.
    pub ignore_fields: Vec<String>,
}

impl Config {
    /// Refuses values that no stage can use.
    ///
    /// # Errors
    /// One error that names every key, its value, and what is allowed.
    pub fn check(&self) -> Result<()> {
        let mut findings = Findings::default();
        findings.whole("seed", self.seed, 0..=i64::MAX as u64);
        self.device.check(&mut findings);
        self.data.check(&mut findings);
        self.lora.check(&mut findings);
        self.curate.check(&mut findings);
        self.finetune.check(&mut findings);
        self.privacy.check(&mut findings);
        self.translator.check(&mut findings);
        self.train.check(&mut findings);
        self.translate.check(&mut findings);
        self.refine.check(&mut findings);
        self.emulator.check(&mut findings);
        self.evaluate.check(&mut findings);
        match findings.wrong() {
            "" => Ok(()),
            wrong => Err(unusable(format!("the configuration:\n{wrong}"))),
        }
    }

    /// With steps in the place of epochs and ratios, as far as settings say how many examples there are;
    /// a client is taken to have as many as a shadow subset.
    pub fn expected(&self) -> Self {
        let [tuples, _] = self.tuples();
        let client = |recipe: &Recipe| recipe.resolved(self.curate.examples_per_subset);
        Self {
            curate: self.curate.resolved(),
            train: self.train.resolved(tuples),
            finetune: FinetuneConfig {
                tiny: client(&self.finetune.tiny),
                llm: client(&self.finetune.llm),
                ..self.finetune.clone()
            },
            ..self.clone()
        }
    }

    /// Tuples that the translator is trained on, and those that validation holds out; where these are chosen by group,
    /// as if groups were of one size.
    pub fn tuples(&self) -> [usize; 2] {
        let Self { curate, train, .. } = self;
        let part = |count: usize| (count as f64 * train.val_set_size).ceil() as usize;
        let held_out = match train.val_split_by {
            ValidationSplit::Subset | ValidationSplit::Group => {
                part(curate.num_subsets) * curate.num_snapshots
            }
            ValidationSplit::Tuple => part(curate.num_subsets * curate.num_snapshots),
        };
        [(curate.num_subsets * curate.num_snapshots).saturating_sub(held_out), held_out]
    }
}
