//! `[privacy]`: differential privacy of `finetune`.

use super::bounds::{Findings, MAX_REAL};
use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Differentially private fine-tuning on private data (DP-SGD), see docs/privacy.md. Off unless
/// `target_epsilon` or `noise_multiplier` is set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PrivacyConfig {
    /// ε that all steps together may cost; the noise follows from it. 0: `noise_multiplier` counts.
    pub target_epsilon: f64,
    /// Standard deviation of the noise as a multiple of `max_grad_norm`, in the place of
    /// `target_epsilon`. 0: `target_epsilon` counts.
    pub noise_multiplier: f64,
    /// δ, the probability that the guarantee of ε does not hold. Well below one over the number of
    /// examples.
    pub target_delta: f64,
    /// Norm C that the gradient of every example is clipped to.
    pub max_grad_norm: f64,
    /// How the cost of steps is computed.
    pub accountant: Accountant,
    /// For tests only: a seed of sampling and noise. Whoever knows it can take the noise away, and
    /// updates are marked as not private. 0: the operating system's random numbers.
    pub insecure_seed: u64,
}

impl Default for PrivacyConfig {
    fn default() -> Self {
        Self {
            target_epsilon: 0.0,
            noise_multiplier: 0.0,
            target_delta: 1e-5,
            max_grad_norm: 1.0,
            accountant: Accountant::Pld,
            insecure_seed: 0,
        }
    }
}

impl PrivacyConfig {
    /// Whether fine-tuning is private.
    pub fn is_on(&self) -> bool {
        self.target_epsilon > 0.0 || self.noise_multiplier > 0.0
    }

    pub(super) fn check(&self, findings: &mut Findings) {
        let Self { target_epsilon, noise_multiplier, target_delta, .. } = self;
        findings.real("privacy.target_epsilon", *target_epsilon, 0.0..=1e4);
        findings.real("privacy.noise_multiplier", *noise_multiplier, 0.0..=1e6);
        findings.expect(
            *target_epsilon == 0.0 || *noise_multiplier == 0.0,
            format_args!(
                "privacy: target_epsilon = {target_epsilon} and noise_multiplier = {noise_multiplier}: \
                 expected one of them"
            ),
        );
        // With less noise, accountants and the noise's grid have no digits left.
        findings.expect(
            *noise_multiplier == 0.0 || *noise_multiplier >= 0.05,
            format_args!("privacy.noise_multiplier = {noise_multiplier}: expected 0 or a number from 0.05"),
        );
        findings.real("privacy.target_delta", *target_delta, 1e-12..=0.1);
        findings.positive("privacy.max_grad_norm", self.max_grad_norm, MAX_REAL);
        findings.whole("privacy.insecure_seed", self.insecure_seed, 0..=i64::MAX as u64);
    }
}

/// How the cost of private steps is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Accountant {
    /// Privacy loss distributions, composed numerically: tight.
    #[default]
    Pld,
    /// Rényi differential privacy: quicker, with an ε that is larger by some percent.
    Rdp,
}

impl Accountant {
    /// As it stands in settings and in the metadata of updates.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pld => "pld",
            Self::Rdp => "rdp",
        }
    }
}
