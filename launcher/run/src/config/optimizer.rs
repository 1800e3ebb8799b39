//! How settings become an [`OptimizerConfig`].

use super::{Recipe, TrainConfig};
use gradtx_runtime::optim::{AdamWConfig, OptimizerConfig, Schedule};

impl Recipe {
    /// How adapters are updated.
    pub fn optimizer(&self) -> OptimizerConfig {
        OptimizerConfig {
            adamw: AdamWConfig {
                beta1: self.adam_beta1,
                beta2: self.adam_beta2,
                eps: self.adam_epsilon,
                weight_decay: self.weight_decay,
            },
            schedule: Schedule {
                peak: self.learning_rate,
                decay: self.lr_scheduler_type,
                warmup: self.warmup_steps.into(),
                hold: 0,
                steps: self.max_steps.into(),
                final_fraction: self.min_lr_rate,
            },
            max_grad_norm: clip(self.max_grad_norm),
        }
    }
}

impl TrainConfig {
    /// How the translator is updated.
    pub fn optimizer(&self) -> OptimizerConfig {
        OptimizerConfig {
            adamw: AdamWConfig {
                beta1: self.adam_beta1,
                beta2: self.adam_beta2,
                eps: self.adam_epsilon,
                weight_decay: self.weight_decay,
            },
            schedule: Schedule {
                peak: self.learning_rate,
                decay: self.lr_scheduler_type,
                warmup: self.warmup_steps.into(),
                hold: 0,
                steps: self.max_steps.into(),
                final_fraction: self.min_lr_rate,
            },
            max_grad_norm: clip(self.max_grad_norm),
        }
    }
}

/// In settings, 0 is for no clipping.
fn clip(max_grad_norm: f64) -> Option<f64> {
    (max_grad_norm > 0.0).then_some(max_grad_norm)
}
