//! Rényi differential privacy of DP-SGD.
//!
//! In: a [`SampledGaussian`], a number of steps, δ. Out: ε, an upper bound that is quick to compute: the divergence of
//! steps adds up, and every order gives a bound. Equation of one step, of order α, with u = eᵗ − 1 where eᵗ is the
//! likelihood ratio of N(1, σ²) to N(0, σ²) (Mironov, Talwar and Zhang 2019: the other direction is never larger):
//!
//! ```text
//! RDP(α) = ln E[(1 + q·u)^α] / (α − 1),   x ~ N(0, σ²)
//! ```
//!
//! The integral is a sum over an even grid, which for integrands that are analytic in a strip converges
//! exponentially. Since E[u] = 0, what is summed is (1 + q·u)^α − 1 − α·q·u, which has no cancellation where the
//! divergence is tiny. For ε the conversion is that of Canonne, Kamath and Steinke (2020), proposition 12.

use super::mechanism::SampledGaussian;

/// Reach of the integral beyond the outermost peaks, in σ.
const REACH: f64 = 13.0;
/// Below this exponent numbers are summed as they are, above it as logarithms.
const LARGE: f64 = 300.0;

/// Orders that are tried: close to 1 for large ε, large ones for small ε.
pub(crate) fn orders() -> Vec<f64> {
    let low = (1..100).map(|i| 1.0 + i as f64 / 10.0);
    let middle = (11..64).map(f64::from);
    low.chain(middle).chain((0..16).map(|i| (64.0 * 1.2f64.powi(i)).round())).collect()
}

/// The Rényi divergence of one step.
pub(crate) fn divergence(mechanism: &SampledGaussian, order: f64) -> f64 {
    let SampledGaussian { sampling_rate: q, noise_multiplier: sigma } = *mechanism;
    if q >= 1.0 {
        return order / (2.0 * sigma * sigma);
    }
    // The mixture's poles are πσ² away from the real axis.
    let spacing = (sigma / 8.0).min(sigma * sigma / 4.0);
    let (low, high) = (-REACH * sigma, order + REACH * sigma);
    let places = (0..=((high - low) / spacing).ceil() as usize).map(|i| low + i as f64 * spacing);
    let log_density =
        |x: f64| -0.5 * (x / sigma).powi(2) - (sigma * (2.0 * std::f64::consts::PI).sqrt()).ln();
    let exponent = |x: f64| order * mechanism.loss(x) + log_density(x);
    let largest = places.clone().map(exponent).fold(f64::NEG_INFINITY, f64::max);
    let log_moment = if largest < LARGE {
        let term = |x: f64| {
            let loss = mechanism.loss(x);
            // Where the power overflows, the rest of the difference is nothing.
            match order * loss < LARGE {
                true => mechanism.density_without(x) * excess(loss, order),
                false => exponent(x).exp(),
            }
        };
        (spacing * places.map(term).sum::<f64>()).ln_1p()
    } else {
        largest + (spacing * places.map(|x| (exponent(x) - largest).exp()).sum::<f64>()).ln()
    };
    log_moment / (order - 1.0)
}

/// (1 + w)^α − 1 − α·w for 1 + w = e^loss.
fn excess(loss: f64, order: f64) -> f64 {
    let w = loss.exp_m1();
    if (w * order).abs() < 1e-3 {
        let second = order * (order - 1.0) / 2.0;
        let third = second * (order - 2.0) / 3.0;
        let fourth = third * (order - 3.0) / 4.0;
        let fifth = fourth * (order - 4.0) / 5.0;
        return w * w * (second + w * (third + w * (fourth + w * fifth)));
    }
    (order * loss).exp_m1() - order * w
}

/// The divergences of one step at these orders.
#[derive(Clone, Debug)]
pub struct Rdp {
    orders: Vec<f64>,
    /// Of one step, by order.
    divergences: Vec<f64>,
}

impl Rdp {
    /// At the orders that are usually enough.
    pub fn new(mechanism: &SampledGaussian) -> Self {
        Self::at(mechanism, orders())
    }

    /// At orders above 1.
    pub(crate) fn at(mechanism: &SampledGaussian, orders: Vec<f64>) -> Self {
        let divergences = orders.iter().map(|&order| divergence(mechanism, order)).collect();
        Self { orders, divergences }
    }

    /// ε of so many steps.
    pub fn epsilon(&self, steps: u64, delta: f64) -> f64 {
        if steps == 0 {
            return 0.0;
        }
        let both = self.orders.iter().zip(&self.divergences);
        let bounds = both.map(|(&order, one)| {
            let divergence = steps as f64 * one;
            // Bretagnolle and Huber: the total variation is at most √(1 − e^{−KL}), and KL is below every RDP.
            if delta * delta + (-divergence).exp_m1() >= 0.0 {
                return 0.0;
            }
            divergence + (-1.0 / order).ln_1p() - (delta * order).ln() / (order - 1.0)
        });
        bounds.fold(f64::INFINITY, f64::min).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_sampling_it_is_the_gaussian_s() {
        let full = SampledGaussian { sampling_rate: 1.0, noise_multiplier: 2.0 };
        let almost = SampledGaussian { sampling_rate: 1.0 - 1e-12, noise_multiplier: 2.0 };
        for order in [1.1, 2.0, 7.5, 60.0] {
            assert_eq!(divergence(&full, order), order / 8.0);
            assert!((divergence(&almost, order) * 8.0 / order - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn an_order_of_two_has_a_closed_form() {
        for (q, sigma) in [(1e-4, 20.0), (1e-4, 0.3), (0.01, 1.0), (0.5, 5.0)] {
            let mechanism = SampledGaussian { sampling_rate: q, noise_multiplier: sigma };
            let want: f64 = (q * q * (1.0 / (sigma * sigma)).exp_m1()).ln_1p();
            let found = divergence(&mechanism, 2.0);
            assert!((found / want - 1.0).abs() < 1e-9, "{q} {sigma}: {found} {want}");
        }
    }

    #[test]
    fn more_steps_and_less_noise_cost_more() {
        let rdp = |sigma| Rdp::new(&SampledGaussian { sampling_rate: 0.01, noise_multiplier: sigma });
        let (much, little) = (rdp(2.0), rdp(1.0));
        assert_eq!(much.epsilon(0, 1e-5), 0.0);
        assert!(much.epsilon(100, 1e-5) < much.epsilon(1000, 1e-5));
        assert!(much.epsilon(100, 1e-5) < little.epsilon(100, 1e-5));
        assert!(much.epsilon(100, 1e-5) < much.epsilon(100, 1e-7));
    }
}
