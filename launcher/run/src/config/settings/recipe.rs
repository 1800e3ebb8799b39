//! How a model is fine-tuned: `[curate.tiny]`, `[curate.llm]`, `[finetune.tiny]`, `[finetune.llm]`.

use super::bounds::{Findings, MAX_EPOCHS, MAX_ITEMS, MAX_RATE, MAX_REAL, MAX_STEPS};
use gradtx_runtime::optim::Decay;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of which one takes the place of the other: where one is set, the other is 0.
pub(in crate::config) const ALTERNATIVES: [[&str; 2]; 3] = [
    ["max_steps", "num_train_epochs"],
    ["warmup_steps", "warmup_ratio"],
    ["target_epsilon", "noise_multiplier"],
];

/// How a model is fine-tuned, with AdamW.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// Optimizer steps. 0: as many as `num_train_epochs` asks for.
    pub max_steps: u32,
    /// Passes over the examples, in the place of `max_steps`: examples × epochs / `global_batch_size`
    /// steps, rounded up. 0: `max_steps` counts.
    pub num_train_epochs: f64,
    /// Examples of one optimizer step, on all devices together. Their order is a new permutation of
    /// the examples in every epoch.
    pub global_batch_size: usize,
    /// Learning rate after warm-up.
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
    /// ε of AdamW. A large one (0.05) makes steps small where gradients are, which cuts the noise in
    /// the updates of small models.
    pub adam_epsilon: f64,
    /// Norm that the gradient of a model is clipped to. 0: no clipping.
    pub max_grad_norm: f64,
    /// How the losses of a step's tokens are averaged.
    pub loss_reduction: LossNormalization,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            max_steps: 137,
            num_train_epochs: 0.0,
            global_batch_size: 16,
            learning_rate: 1e-4,
            lr_scheduler_type: Decay::Constant,
            warmup_steps: 0,
            warmup_ratio: 0.0,
            min_lr_rate: 0.0,
            weight_decay: 0.01,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            loss_reduction: LossNormalization::Sequence,
        }
    }
}

impl Recipe {
    /// With steps in the place of epochs and ratios, for a data set of so many examples.
    pub fn resolved(&self, examples: usize) -> Self {
        let length = Length { max_steps: self.max_steps, epochs: self.num_train_epochs };
        let max_steps = length.steps(examples, self.global_batch_size);
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
    pub fn epochs_as_steps(&self, examples: usize) -> Option<String> {
        let length = Length { max_steps: 0, epochs: self.num_train_epochs };
        length.shown(examples, "examples", self.global_batch_size)
    }

    pub(super) fn check(&self, name: &str, findings: &mut Findings) {
        findings.whole(format_args!("{name}.global_batch_size"), self.global_batch_size, 1..=MAX_ITEMS);
        Length { max_steps: self.max_steps, epochs: self.num_train_epochs }.check(name, findings);
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
        .check(name, findings);
    }
}

/// How long a training is: by steps, or by epochs.
pub(super) struct Length {
    pub(super) max_steps: u32,
    pub(super) epochs: f64,
}

impl Length {
    /// Optimizer steps of so many examples.
    pub(super) fn steps(&self, examples: usize, batch: usize) -> u32 {
        if self.epochs == 0.0 {
            return self.max_steps;
        }
        (self.epochs * examples as f64 / batch.max(1) as f64).ceil().clamp(1.0, MAX_STEPS as f64) as u32
    }

    pub(super) fn shown(&self, count: usize, what: &str, batch: usize) -> Option<String> {
        let (epochs, steps) = (self.epochs, self.steps(count, batch));
        let epoch = if epochs == 1.0 { "epoch" } else { "epochs" };
        (epochs > 0.0).then(|| format!("{epochs} {epoch} of {count} {what} are {steps} steps of {batch}"))
    }

    pub(super) fn check(&self, name: &str, findings: &mut Findings) {
        let Self { max_steps, epochs } = self;
        findings.real(format_args!("{name}.num_train_epochs"), *epochs, 0.0..=MAX_EPOCHS);
        match *epochs > 0.0 {
            true => findings.expect(
                *max_steps == 0,
                format_args!(
                    "{name}: max_steps = {max_steps} and num_train_epochs = {epochs}: expected one of them"
                ),
            ),
            false => findings.whole(format_args!("{name}.max_steps"), *max_steps, 1..=MAX_STEPS),
        }
    }
}

/// Steps of warm-up.
pub(super) fn warmup(steps: u32, ratio: f64, all: u32) -> u32 {
    if ratio > 0.0 { (ratio * all as f64).ceil() as u32 } else { steps }
}

/// AdamW, its learning rate and clipping, as they are checked.
pub(super) struct Optimizer {
    pub(super) learning_rate: f64,
    pub(super) decay: Decay,
    pub(super) steps: u32,
    /// Steps and ratio.
    pub(super) warmup: (u32, f64),
    pub(super) min_lr_rate: f64,
    pub(super) weight_decay: f64,
    pub(super) betas: [f64; 2],
    pub(super) epsilon: f64,
    pub(super) max_grad_norm: f64,
}

impl Optimizer {
    pub(super) fn check(&self, name: &str, findings: &mut Findings) {
        findings.positive(format_args!("{name}.learning_rate"), self.learning_rate, MAX_RATE);
        findings.part(format_args!("{name}.adam_beta1"), self.betas[0]);
        findings.part(format_args!("{name}.adam_beta2"), self.betas[1]);
        // ε divides where a gradient is zero.
        findings.positive(format_args!("{name}.adam_epsilon"), self.epsilon, 1.0);
        findings.real(format_args!("{name}.weight_decay"), self.weight_decay, 0.0..=MAX_RATE);
        findings.real(format_args!("{name}.max_grad_norm"), self.max_grad_norm, 0.0..=MAX_REAL);
        if self.decay != Decay::Constant {
            findings.real(format_args!("{name}.min_lr_rate"), self.min_lr_rate, 0.0..=1.0);
        }
        let (warmup, ratio) = self.warmup;
        findings.real(format_args!("{name}.warmup_ratio"), ratio, 0.0..=1.0);
        findings.expect(
            warmup == 0 || ratio == 0.0,
            format_args!("{name}: warmup_steps = {warmup} and warmup_ratio = {ratio}: expected one of them"),
        );
        // Steps of epochs are not known here.
        let steps = if self.steps == 0 { u32::MAX } else { self.steps };
        let what = format_args!(
            "{name}.warmup_steps = {warmup}: expected at most the {steps} steps of {name}.max_steps"
        );
        findings.expect(warmup <= steps, what);
    }
}

/// How the losses of a step's tokens are averaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossNormalization {
    /// The mean over examples of each one's mean, as transformers has it with one example per device.
    Sequence,
    /// The mean over all tokens that are trained on.
    Token,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_and_ratios_become_steps() {
        let recipe = Recipe { max_steps: 0, num_train_epochs: 2.0, warmup_ratio: 0.05, ..Recipe::default() };
        let resolved = recipe.resolved(1000);
        assert_eq!((resolved.max_steps, resolved.warmup_steps), (125, 7));
        assert_eq!(recipe.resolved(1001).max_steps, 126, "the last one is a part of a step");
        assert_eq!(recipe.resolved(1).max_steps, 1);
        let by_steps = Recipe { warmup_steps: 3, ..Recipe::default() };
        assert_eq!(by_steps.resolved(1000), by_steps);
    }
}
