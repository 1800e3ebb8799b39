//! [`OptimizerConfig`]: how parameters are updated over the steps of a training.

use super::Schedule;
use gradtx_kernels::ops::AdamWStep;

/// AdamW's constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// β₁.
    pub beta1: f64,
    /// β₂.
    pub beta2: f64,
    /// ε.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    /// β₁ = 0.9, β₂ = 0.999, ε = 10⁻⁸, no weight decay.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// AdamW, its learning rate over the steps, and clipping.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimizerConfig {
    /// AdamW's constants.
    pub adamw: AdamWConfig,
    /// The learning rate over the steps.
    pub schedule: Schedule,
    /// Norm that a gradient is clipped to, if it is.
    pub max_grad_norm: Option<f64>,
}

impl OptimizerConfig {
    /// The numbers of a step, counted from 0.
    pub fn step(&self, step: u32) -> AdamWStep {
        let AdamWConfig { beta1, beta2, eps, weight_decay } = self.adamw;
        AdamWStep { lr: self.schedule.lr(step.into()), beta1, beta2, eps, weight_decay, step: step + 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::Decay;

    #[test]
    fn steps_have_the_scheduled_rate_counted_from_1() {
        let schedule =
            Schedule { peak: 2.0, decay: Decay::Linear, warmup: 2, hold: 0, steps: 6, final_fraction: 0.5 };
        let adamw = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() };
        let config = OptimizerConfig { adamw, schedule, max_grad_norm: None };
        let rates: Vec<f64> = (0..6).map(|step| config.step(step).lr).collect();
        assert_eq!(rates, [1.0, 2.0, 2.0, 1.75, 1.5, 1.25]);
        let want = AdamWStep { lr: 1.0, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step: 1 };
        assert_eq!(config.step(0), want);
    }
}
