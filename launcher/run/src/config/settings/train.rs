//! `[train]`: training of the translator.

use super::bounds::{Findings, MAX_MINUTES, MAX_RATE};
use super::recipe::{Length, Optimizer, warmup};
use gradtx_models::grad_transformer::Targets;
use gradtx_runtime::optim::Decay;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Tuples of a step, in which some hundred thousand values each are held at once.
const MAX_TUPLES: u64 = 1_000_000;

/// Components of a block: beyond it, tuples are longer than updates.
const MAX_COMPONENTS: u64 = 100_000;

/// Training of the translator, with AdamW.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// What the Grad-Transformer predicts for a block of the LLM; compared in docs/translators.md.
    pub targets: Targets,
    /// Coordinates of a block at most, where `targets` are not factors. There are never more than
    /// groups of shadows (`curate.group_by`) less one.
    pub max_components: usize,
    /// Optimizer steps. 0: as many as `num_train_epochs` asks for.
    pub max_steps: u32,
    /// Passes over the tuples that are trained on, in the place of `max_steps`: tuples × epochs /
    /// `global_batch_size` steps, rounded up. 0: `max_steps` counts.
    pub num_train_epochs: f64,
    /// Tuples of one optimizer step, on all devices together; ranks share them.
    pub global_batch_size: usize,
    /// Tuples that a device computes at once, a divisor of `global_batch_size`; never more than its
    /// share of a step. Smaller takes less memory.
    pub per_device_train_batch_size: usize,
    /// Learning rate after warm-up. The method is sensitive to it: published are 2e-5 to 8e-5.
    pub learning_rate: f64,
    /// How the learning rate continues after warm-up.
    pub lr_scheduler_type: Decay,
    /// Optimizer steps of linear warm-up.
    pub warmup_steps: u32,
    /// Warm-up as a fraction of all steps, in the place of `warmup_steps`. 0: `warmup_steps` counts.
    pub warmup_ratio: f64,
    /// Learning rate at the end of a linear or cosine decay, as a fraction of `learning_rate`.
    pub min_lr_rate: f64,
    /// Decoupled weight decay of AdamW.
    pub weight_decay: f64,
    /// β₁ of AdamW, for the first moments.
    pub adam_beta1: f64,
    /// β₂ of AdamW, for the second moments.
    pub adam_beta2: f64,
    /// ε of AdamW, which keeps steps finite where gradients vanish.
    pub adam_epsilon: f64,
    /// Norm that the gradient is clipped to. 0: no clipping.
    pub max_grad_norm: f64,
    /// Fraction that is held out for validation, of what `val_split_by` says; at least one is.
    pub val_set_size: f64,
    /// What validation holds out a fraction of.
    pub val_split_by: ValidationSplit,
    /// Optimizer steps from one validation to the next. The translator with the smallest error is kept.
    pub eval_steps: u32,
    /// Validations without a smaller error after which training stops. 0: never.
    pub early_stopping_patience: u32,
    /// Minutes between two checkpoints. 0: one after every step.
    pub save_minutes: f64,
    /// Probability that a tuple of a step is replaced by an affine combination of three. Helps where
    /// there are few shadow subsets.
    pub mixup_prob: f64,
    /// Standard deviation of the weights of combinations.
    pub mixup_std: f64,
    /// Standard deviation of noise on the TinyLM's updates, in the translator's units.
    pub input_noise_std: f64,
}

/// What validation holds out a fraction of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ValidationSplit {
    /// Shadow subsets, with all of their tuples: shows how well unseen updates are translated.
    Subset,
    /// Tuples, near duplicates of which are then trained on, as in the published code.
    Tuple,
    /// Groups of shadow subsets (`curate.group_by`), with all of their tuples: shows how well updates of tasks that no
    /// shadow has are translated.
    Group,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            targets: Targets::Factors,
            max_components: 64,
            max_steps: 3656,
            num_train_epochs: 0.0,
            global_batch_size: 32,
            per_device_train_batch_size: 32,
            learning_rate: 4e-5,
            lr_scheduler_type: Decay::Constant,
            warmup_steps: 0,
            warmup_ratio: 0.0,
            min_lr_rate: 0.0,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            val_set_size: 0.05,
            val_split_by: ValidationSplit::Subset,
            eval_steps: 122,
            early_stopping_patience: 0,
            save_minutes: 10.0,
            mixup_prob: 0.0,
            mixup_std: 0.6,
            input_noise_std: 0.0,
        }
    }
}

impl TrainConfig {
    /// With steps in the place of epochs and ratios, for so many tuples to train on.
    pub fn resolved(&self, tuples: usize) -> Self {
        let length = Length { max_steps: self.max_steps, epochs: self.num_train_epochs };
        let max_steps = length.steps(tuples, self.global_batch_size);
        let warmup_steps = warmup(self.warmup_steps, self.warmup_ratio, max_steps);
        Self { max_steps, warmup_steps, ..self.clone() }
    }

    /// The same with the steps of one that was resolved, where epochs and ratios decide them.
    pub fn with_steps_of(&self, resolved: &Self) -> Self {
        let by = |share: f64, own: u32, other: u32| if share > 0.0 { other } else { own };
        Self {
            max_steps: by(self.num_train_epochs, self.max_steps, resolved.max_steps),
            warmup_steps: by(self.warmup_ratio, self.warmup_steps, resolved.warmup_steps),
            ..self.clone()
        }
    }

    /// What a number of epochs comes to, for people; nothing where steps are set.
    pub fn epochs_as_steps(&self, tuples: usize) -> Option<String> {
        let length = Length { max_steps: 0, epochs: self.num_train_epochs };
        length.shown(tuples, "tuples", self.global_batch_size)
    }

    pub(super) fn check(&self, findings: &mut Findings) {
        Length { max_steps: self.max_steps, epochs: self.num_train_epochs }.check("train", findings);
        findings.whole("train.global_batch_size", self.global_batch_size, 1..=MAX_TUPLES);
        let micro_batch = self.per_device_train_batch_size;
        findings.expect(
            micro_batch > 0 && self.global_batch_size.is_multiple_of(micro_batch.max(1)),
            format_args!(
                "train.per_device_train_batch_size = {micro_batch}: expected a divisor of \
                 train.global_batch_size"
            ),
        );
        Optimizer {
            learning_rate: self.learning_rate,
            decay: self.lr_scheduler_type,
            steps: self.max_steps,
            warmup: (self.warmup_steps, self.warmup_ratio),
            min_lr_rate: self.min_lr_rate,
            weight_decay: self.weight_decay,
            betas: [self.adam_beta1, self.adam_beta2],
            epsilon: self.adam_epsilon,
            max_grad_norm: self.max_grad_norm,
        }
        .check("train", findings);
        findings.whole("train.max_components", self.max_components, 1..=MAX_COMPONENTS);
        findings.part("train.val_set_size", self.val_set_size);
        findings.whole("train.eval_steps", self.eval_steps, 1..=u32::MAX.into());
        findings.real("train.save_minutes", self.save_minutes, 0.0..=MAX_MINUTES);
        findings.real("train.mixup_prob", self.mixup_prob, 0.0..=1.0);
        findings.real("train.mixup_std", self.mixup_std, 0.0..=MAX_RATE);
        findings.real("train.input_noise_std", self.input_noise_std, 0.0..=MAX_RATE);
    }
}
