//! [`SampledGaussian`]: one step of DP-SGD as a mechanism, and the functions of normal distributions that its
//! accountants need.
//!
//! In units of the clipping norm, a step publishes N(0, σ²) without the example in question; with it, the mixture
//! (1 − q)·N(0, σ²) + q·N(1, σ²).

use serde::{Deserialize, Serialize};

/// The Gaussian mechanism on a Poisson sample of the examples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampledGaussian {
    /// q, probability of an example to be in the sample: above 0, at most 1.
    pub sampling_rate: f64,
    /// σ, standard deviation of the noise in units of the clipping norm.
    pub noise_multiplier: f64,
}

impl SampledGaussian {
    /// The exponent of the likelihood ratio of N(1, σ²) to N(0, σ²).
    pub(super) fn exponent(&self, x: f64) -> f64 {
        (2.0 * x - 1.0) / (2.0 * self.noise_multiplier * self.noise_multiplier)
    }

    /// Logarithm of the likelihood ratio of the mixture to N(0, σ²); increases with x.
    pub(super) fn loss(&self, x: f64) -> f64 {
        let (q, t) = (self.sampling_rate, self.exponent(x));
        if q >= 1.0 {
            return t;
        }
        // Where eᵗ overflows, the rest of the sum is nothing.
        if t > 700.0 { q.ln() + t } else { (q * t.exp_m1()).ln_1p() }
    }

    /// Where [`Self::loss`] has this value; −∞ for values below all of its.
    pub(super) fn inverse_loss(&self, loss: f64) -> f64 {
        let (q, variance) = (self.sampling_rate, self.noise_multiplier * self.noise_multiplier);
        if q >= 1.0 {
            return variance * loss + 0.5;
        }
        let ratio = if loss > 700.0 { loss - q.ln() } else { ((loss.exp_m1() + q).max(0.0) / q).ln() };
        variance * ratio + 0.5
    }

    /// Density of N(0, σ²).
    pub(super) fn density_without(&self, x: f64) -> f64 {
        let z = x / self.noise_multiplier;
        (-0.5 * z * z).exp() / (self.noise_multiplier * (2.0 * std::f64::consts::PI).sqrt())
    }

    /// Probability of N(0, σ²) between two places.
    pub(super) fn mass_without(&self, from: f64, to: f64) -> f64 {
        normal_between(from / self.noise_multiplier, to / self.noise_multiplier)
    }

    /// Probability of the mixture between two places.
    pub(super) fn mass_with(&self, from: f64, to: f64) -> f64 {
        let q = self.sampling_rate;
        let shifted =
            normal_between((from - 1.0) / self.noise_multiplier, (to - 1.0) / self.noise_multiplier);
        (1.0 - q) * self.mass_without(from, to) + q * shifted
    }
}

/// Probability of a standard normal variable to be above `z`.
pub(super) fn normal_above(z: f64) -> f64 {
    0.5 * libm::erfc(z * std::f64::consts::FRAC_1_SQRT_2)
}

/// Probability of a standard normal variable between two places; accurate in both tails.
fn normal_between(from: f64, to: f64) -> f64 {
    let between = if from + to < 0.0 {
        normal_above(-to) - normal_above(-from)
    } else {
        normal_above(from) - normal_above(to)
    };
    between.max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_and_their_places_are_inverse() {
        for (q, noise) in [(1e-4, 0.3), (0.02, 1.0), (0.5, 20.0), (1.0, 2.0)] {
            let mechanism = SampledGaussian { sampling_rate: q, noise_multiplier: noise };
            for x in [-1.0, 0.2, 0.5, 0.9, 4.0, 80.0] {
                let found = mechanism.inverse_loss(mechanism.loss(x));
                assert!((found - x).abs() <= 1e-6 * x.abs().max(1.0), "{q} {noise} {x}: {found}");
            }
            assert_eq!(mechanism.loss(0.5), 0.0);
        }
        let mechanism = SampledGaussian { sampling_rate: 0.5, noise_multiplier: 1.0 };
        assert_eq!(mechanism.inverse_loss(-2.0), f64::NEG_INFINITY);
    }

    #[test]
    fn masses_are_accurate_in_both_tails() {
        let mechanism = SampledGaussian { sampling_rate: 0.25, noise_multiplier: 1.0 };
        let (left, right) = (mechanism.mass_without(-12.0, -10.0), mechanism.mass_without(10.0, 12.0));
        assert!((left / 7.61985302416e-24 - 1.0).abs() < 1e-9 && (right / left - 1.0).abs() < 1e-12);
        let all = mechanism.mass_with(f64::NEG_INFINITY, f64::INFINITY);
        assert!((all - 1.0).abs() < 1e-15);
        let half = mechanism.mass_with(1.0, f64::INFINITY);
        assert!((half - (0.75 * normal_above(1.0) + 0.125)).abs() < 1e-15);
    }
}
