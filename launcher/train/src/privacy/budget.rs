//! [`Budget`]: what a private training may cost, what it has cost, and what noise it has.
//!
//! In: the settings, the number of examples, steps and examples of a step. Out: the mechanism of a step, ε of any number
//! of steps, how large the noise is beside the gradients, and the statement that goes with the update.

use super::accountant::{epsilon, noise_for};
use super::mechanism::SampledGaussian;
use super::rdp::Rdp;
use anyhow::Result;
use gradtx_run::config::{LossNormalization, PrivacyConfig, Recipe};
use gradtx_run::failure::{unusable, unusable_with};
use gradtx_runtime::artifact::{Generator, Neighbours, Privacy};

/// With fewer examples noise that hides one of them hides most of what they have in common.
const FEW_EXAMPLES: usize = 1000;

/// The cost of a private training.
pub struct Budget {
    config: PrivacyConfig,
    mechanism: SampledGaussian,
    examples: usize,
    /// Steps of the recipe.
    steps: u64,
    /// ε of these.
    epsilon: f64,
    rdp: Rdp,
}

impl Budget {
    /// For a recipe whose steps are resolved, on so many examples.
    ///
    /// # Errors
    /// If the settings do not go together, or no noise is enough.
    pub fn new(config: &PrivacyConfig, recipe: &Recipe, examples: usize) -> Result<Self> {
        check(recipe)?;
        if examples == 0 {
            return Err(unusable("privacy: there are no examples"));
        }
        let sampling_rate = (recipe.global_batch_size as f64 / examples as f64).min(1.0);
        let (steps, delta) = (recipe.max_steps as u64, config.target_delta);
        let target = config.target_epsilon;
        let noise_multiplier = if target > 0.0 {
            noise_for(config.accountant, sampling_rate, steps, target, delta).ok_or_else(|| {
                let what = format!("privacy.target_epsilon = {target}: no noise is enough for {steps} steps");
                unusable_with(what, Some("take fewer steps, a larger ε, or a larger δ".into()))
            })?
        } else {
            config.noise_multiplier
        };
        let mechanism = SampledGaussian { sampling_rate, noise_multiplier };
        let epsilon = epsilon(config.accountant, &mechanism, steps, delta);
        Ok(Self { config: config.clone(), mechanism, examples, steps, epsilon, rdp: Rdp::new(&mechanism) })
    }

    /// Sampling and noise of a step.
    pub fn mechanism(&self) -> SampledGaussian {
        self.mechanism
    }

    /// Steps that may be spent: those of the recipe where an ε was promised.
    pub fn most_steps(&self) -> u64 {
        if self.config.target_epsilon > 0.0 { self.steps } else { u64::MAX }
    }

    /// A bound of ε of the steps so far, quick to compute: that of RDP, or of all steps if that is less.
    pub fn bound(&self, spent: u64) -> f64 {
        let bound = self.rdp.epsilon(spent, self.config.target_delta);
        if spent <= self.steps { bound.min(self.epsilon) } else { bound }
    }

    /// What an update says of its privacy after so many steps.
    pub fn statement(&self, spent: u64, is_secure: bool) -> Privacy {
        let PrivacyConfig { accountant, target_delta, max_grad_norm, .. } = self.config;
        let SampledGaussian { sampling_rate, noise_multiplier } = self.mechanism;
        Privacy::DpSgd {
            epsilon: epsilon(accountant, &self.mechanism, spent, target_delta),
            delta: target_delta,
            sigma: noise_multiplier,
            sampling_rate,
            steps: spent,
            clip_norm: max_grad_norm,
            neighbours: Neighbours::AddOrRemoveOneExample,
            accountant: accountant.name().into(),
            generator: if is_secure { Generator::ChaCha20 } else { Generator::Insecure },
        }
    }

    /// The norm of a clipped mean gradient at most, divided by that of the noise on it, for an adapter of so many values: of
    /// one step, and of all steps if their gradients point the same way.
    pub fn signal_to_noise(&self, values: usize) -> [f64; 2] {
        let expected = self.mechanism.sampling_rate * self.examples as f64;
        let one = expected / (self.mechanism.noise_multiplier * (values as f64).sqrt());
        [one, one * (self.steps as f64).sqrt()]
    }

    /// What will be done, in words.
    pub fn shown(&self) -> String {
        let SampledGaussian { sampling_rate, noise_multiplier } = self.mechanism;
        format!(
            "ε {:.4} at δ {:e} for one example added or removed: {} steps, each with {:.1} of {} examples expected \
             (sampling rate {sampling_rate:.4}), noise multiplier {noise_multiplier}, gradients clipped to {}, \
             accountant {}",
            self.epsilon,
            self.config.target_delta,
            self.steps,
            sampling_rate * self.examples as f64,
            self.examples,
            self.config.max_grad_norm,
            self.config.accountant.name()
        )
    }

    /// What should make someone think again.
    pub fn warnings(&self) -> Vec<String> {
        let (n, delta) = (self.examples, self.config.target_delta);
        let mut warnings = vec![];
        if delta > 1.0 / n as f64 {
            warnings.push(format!(
                "δ {delta:e} is above one over the number of examples, {n}: publishing one of them at random would \
                 pass as private; set --dp-delta well below {:.1e}",
                1.0 / n as f64
            ));
        }
        if n < FEW_EXAMPLES {
            warnings.push(format!(
                "only {n} examples: noise that hides one of them may hide what they have in common; more examples \
                 are the best remedy"
            ));
        }
        if self.config.insecure_seed > 0 {
            warnings.push(
                "privacy.insecure_seed is set: this is NOT PRIVATE, for the noise can be computed and taken away; \
                 the update is marked so"
                    .into(),
            );
        }
        warnings
    }
}

/// Refuses recipes with which an example changes more than its own gradient.
pub fn check(recipe: &Recipe) -> Result<()> {
    if recipe.loss_reduction == LossNormalization::Token {
        let what = "loss_reduction = \"token\": divides by the tokens of all examples of a step, so one example \
                    changes the gradients of others, which differential privacy rules out";
        return Err(unusable_with(what, Some("set loss_reduction = \"sequence\"".into())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(config: PrivacyConfig) -> Budget {
        let recipe = Recipe { max_steps: 100, global_batch_size: 32, ..Recipe::default() };
        Budget::new(&config, &recipe, 2000).unwrap()
    }

    #[test]
    fn a_promise_is_kept_after_every_step() {
        let by_noise = PrivacyConfig { noise_multiplier: 0.9, ..PrivacyConfig::default() };
        for config in [PrivacyConfig { target_epsilon: 2.0, ..PrivacyConfig::default() }, by_noise] {
            let budget = budget(config.clone());
            let bounds: Vec<f64> = (0..=110).map(|spent| budget.bound(spent)).collect();
            assert!(bounds.is_sorted(), "{bounds:?}");
            let Privacy::DpSgd { epsilon, steps, .. } = budget.statement(100, true) else { panic!() };
            assert!(epsilon <= bounds[100] && steps == 100);
            if config.target_epsilon > 0.0 {
                assert!(epsilon <= 2.0 && epsilon > 1.98 && budget.most_steps() == 100, "{epsilon}");
            } else {
                assert_eq!(budget.most_steps(), u64::MAX);
            }
            // Steps that were repeated cost more.
            let Privacy::DpSgd { epsilon: more, .. } = budget.statement(110, true) else { panic!() };
            assert!(more > epsilon);
        }
    }

    #[test]
    fn a_test_seed_and_a_large_delta_are_warned_of() {
        let config = PrivacyConfig {
            noise_multiplier: 1.0,
            target_delta: 1e-3,
            insecure_seed: 1,
            ..PrivacyConfig::default()
        };
        let budget = budget(config);
        let said = budget.warnings().join("\n");
        assert!(said.contains("δ 1e-3") && said.contains("NOT PRIVATE") && !said.contains("only"), "{said}");
        assert!(budget.statement(1, false).to_string().starts_with("NOT PRIVATE"));
        assert!((budget.signal_to_noise(1024)[0] - 1.0).abs() < 1e-12);
    }

    #[test]
    fn token_means_are_refused() {
        let recipe = Recipe { loss_reduction: LossNormalization::Token, ..Recipe::default() };
        let config = PrivacyConfig { noise_multiplier: 1.0, ..PrivacyConfig::default() };
        let said = Budget::new(&config, &recipe, 100).err().unwrap().to_string();
        assert!(said.contains("loss_reduction"), "{said}");
    }
}
