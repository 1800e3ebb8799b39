//! Privacy loss distributions of DP-SGD, composed numerically: tight, and never below the truth.
//!
//! In: a [`SampledGaussian`], a number of steps, δ. Out: the least ε of δ(ε) ≤ δ, rounded up.
//!
//! The privacy loss of one step is put on an even grid so that its hockey-stick curve is met at the grid's points
//! and lies on chords between them (Doroshenko, Ghazi, Kamath, Kumar and Manurangsi 2022): every probability is
//! divided between the two points around it, with the sum of P and the sum of Q preserved. Chords of a convex curve are
//! above it, so the discrete pair dominates the true one, also when composed. Composition is a power of the
//! Fourier transform. Before that the distribution is tilted, p ↦ p·e^{θℓ}/M(θ), so that its centre is where
//! probabilities are as small as δ: there they are then accurate to many digits, and not to as many as rounding
//! errors of sums to 1 leave.
//!
//! What a window of the transform leaves out is never forgotten: what is cut off above counts as lost (an infinite privacy loss),
//! what wraps around from below counts more than it is worth.

use super::fft;
use super::mechanism::SampledGaussian;
use num_complex::Complex64;

/// Standard deviations of the tilted distribution on each side of its centre.
const REACH: f64 = 7.0;
/// Probability that is counted as lost, as a part of δ.
const CUT: f64 = 1e-7;
/// The loss of one step has at most so many times the points of the window of all steps: time and memory.
const MAX_FINER: f64 = 2.0;
/// Points of the grid on which the tilt is found.
const COARSE: usize = 1 << 14;
/// ε is larger by this part of itself, for rounding errors.
const MARGIN: f64 = 1e-6;

/// ε of so many steps.
pub(crate) fn epsilon(mechanism: &SampledGaussian, steps: u64, delta: f64) -> f64 {
    if steps == 0 {
        return 0.0;
    }
    let both = [Direction::Removed, Direction::Added].map(|direction| {
        let one = OneStep::new(mechanism, direction, CUT * delta / steps as f64);
        one.epsilon(steps, delta)
    });
    both[0].max(both[1]) * (1.0 + MARGIN)
}

/// Which of two neighbouring data sets was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    /// The one with the example: P is the mixture.
    Removed,
    /// The one without: P is the plain Gaussian.
    Added,
}

/// The privacy loss of one step, before it is discretized.
struct OneStep<'a> {
    mechanism: &'a SampledGaussian,
    direction: Direction,
    /// Losses, but for a probability that is counted as lost above and moved up below.
    low: f64,
    high: f64,
}

impl<'a> OneStep<'a> {
    /// `cut` is the probability that is left out.
    fn new(mechanism: &'a SampledGaussian, direction: Direction, cut: f64) -> Self {
        let reach = mechanism.noise_multiplier * (-2.0 * cut.ln()).sqrt();
        let ends = [-reach, 1.0 + reach].map(|x| mechanism.loss(x));
        let bottom = if mechanism.sampling_rate < 1.0 { (-mechanism.sampling_rate).ln_1p() } else { ends[0] };
        match direction {
            Direction::Removed => Self { mechanism, direction, low: bottom, high: ends[1] },
            Direction::Added => Self { mechanism, direction, low: -ends[1], high: -bottom },
        }
    }

    fn range(&self) -> f64 {
        self.high - self.low
    }

    /// Where the loss is between these values.
    fn places(&self, from: f64, to: f64) -> (f64, f64) {
        match self.direction {
            Direction::Removed => (self.mechanism.inverse_loss(from), self.mechanism.inverse_loss(to)),
            Direction::Added => (self.mechanism.inverse_loss(-to), self.mechanism.inverse_loss(-from)),
        }
    }

    /// Probabilities of P and of Q where the loss is between these values.
    fn masses(&self, from: f64, to: f64) -> (f64, f64) {
        let (a, b) = self.places(from, to);
        let (with, without) = (self.mechanism.mass_with(a, b), self.mechanism.mass_without(a, b));
        match self.direction {
            Direction::Removed => (with, without),
            Direction::Added => (without, with),
        }
    }

    /// Density of P, and the loss.
    fn at(&self, x: f64) -> (f64, f64) {
        let (density, loss) = (self.mechanism.density_without(x), self.mechanism.loss(x));
        match self.direction {
            Direction::Removed => (density * loss.exp(), loss),
            Direction::Added => (density, -loss),
        }
    }

    /// Probability of P between two points of the grid, and its part that goes to the lower one.
    fn divided(&self, from: f64, to: f64) -> (f64, f64) {
        let (a, b) = self.places(from, to);
        let (sigma, spacing) = (self.mechanism.noise_multiplier, to - from);
        // Narrow: by quadrature, since differences of large probabilities have few digits.
        if b - a < 0.25 * sigma.min(sigma * sigma) {
            let (middle, half) = (0.5 * (a + b), 0.5 * (b - a));
            let mut sums = (0.0, 0.0);
            for (node, weight) in NODES {
                let (density, loss) = self.at(middle + half * node);
                let mass = weight * half * density;
                let part = ((to - loss).exp_m1() / spacing.exp_m1()).clamp(0.0, 1.0);
                sums = (sums.0 + mass, sums.1 + mass * part);
            }
            return sums;
        }
        let (p, q) = self.masses(from, to);
        let lower = ((q * to.exp() - p) / spacing.exp_m1()).clamp(0.0, p);
        (p, lower)
    }

    /// On the grid of multiples of `spacing`.
    fn discretized(&self, spacing: f64) -> Discrete {
        let (first, last) = ((self.low / spacing).floor() as i64, (self.high / spacing).ceil() as i64);
        let last = last.max(first + 1);
        let mut masses = vec![0.0; (last - first + 1) as usize];
        for i in first..last {
            let (mass, lower) = self.divided(i as f64 * spacing, (i + 1) as f64 * spacing);
            masses[(i - first) as usize] += lower;
            masses[(i - first) as usize + 1] += mass - lower;
        }
        masses[0] += self.masses(f64::NEG_INFINITY, first as f64 * spacing).0;
        let lost = self.masses(last as f64 * spacing, f64::INFINITY).0;
        Discrete { spacing, first, masses, lost }
    }

    fn epsilon(&self, steps: u64, delta: f64) -> f64 {
        let points = match steps {
            0..=20_000 => 1 << 17,
            _ => 1 << 20,
        } as f64;
        if steps == 1 {
            let one = self.discretized(self.range() / points);
            return one.epsilon(delta).unwrap_or(one.loss(0).max(0.0));
        }
        let coarse = self.discretized(self.range() / COARSE as f64);
        let tilt = coarse.tilt_for((1.0 / delta).ln() / steps as f64);
        let Moments { variance, .. } = coarse.moments(tilt);
        let mut half = (REACH * (steps as f64 * variance).sqrt()).max(0.5 * self.range() / MAX_FINER);
        loop {
            let whole = steps as f64 * self.range();
            let width = (2.0 * half).min(whole) + 4.0 * self.range() / COARSE as f64;
            let one = self.discretized(width / (points - 8.0));
            let composed = one.composed(steps, tilt, points as usize);
            match composed.epsilon(delta) {
                Some(epsilon) if composed.lost <= 1e-3 * delta || width >= whole => return epsilon,
                None if width >= whole => return composed.loss(0).max(0.0),
                // It is outside of the window, or too much is.
                _ => {}
            }
            half *= 1.5;
        }
    }
}

/// Nodes and weights of Gauss and Legendre on [−1, 1].
const NODES: [(f64, f64); 5] = [
    (-0.906_179_845_938_664, 0.236_926_885_056_189_1),
    (-0.538_469_310_105_683_1, 0.478_628_670_499_366_5),
    (0.0, 0.568_888_888_888_888_9),
    (0.538_469_310_105_683_1, 0.478_628_670_499_366_5),
    (0.906_179_845_938_664, 0.236_926_885_056_189_1),
];

/// A privacy loss distribution on an even grid.
struct Discrete {
    spacing: f64,
    /// Number of the first point: its loss is `first · spacing`.
    first: i64,
    /// Probabilities, by point.
    masses: Vec<f64>,
    /// Probability of an infinite loss.
    lost: f64,
}

/// Of a tilted distribution.
struct Moments {
    /// ln M(θ)
    log_mass: f64,
    mean: f64,
    variance: f64,
}

impl Discrete {
    fn loss(&self, index: usize) -> f64 {
        (self.first + index as i64) as f64 * self.spacing
    }

    fn moments(&self, tilt: f64) -> Moments {
        let end = self.loss(self.masses.len() - 1);
        let (mut sum, mut first, mut second) = (0.0, 0.0, 0.0);
        for (i, mass) in self.masses.iter().enumerate() {
            let below = self.loss(i) - end;
            let weight = mass * (tilt * below).exp();
            (sum, first, second) = (sum + weight, first + weight * below, second + weight * below * below);
        }
        let mean = first / sum;
        Moments {
            log_mass: sum.ln() + tilt * end,
            mean: end + mean,
            variance: (second / sum - mean * mean).max(0.0),
        }
    }

    /// θ for which the tilted distribution diverges by this much from the own one, as far as exponents allow.
    fn tilt_for(&self, divergence: f64) -> f64 {
        let most = 600.0 / (self.masses.len() as f64 * self.spacing);
        let (mut low, mut high) = (0.0, most);
        for _ in 0..40 {
            let tilt = if low == 0.0 { high / 16.0 } else { (low * high).sqrt() };
            let Moments { log_mass, mean, .. } = self.moments(tilt);
            if tilt * mean - log_mass < divergence {
                low = tilt
            } else {
                high = tilt
            }
            if high - low < 1e-3 * high {
                break;
            }
        }
        high
    }

    /// The sum of `steps` independent losses, on `points` points around the tilted centre.
    fn composed(&self, steps: u64, tilt: f64, points: usize) -> Self {
        let Moments { log_mass, mean, .. } = self.moments(tilt);
        let count = steps as f64;
        let mut wave = vec![Complex64::default(); points];
        let place = |point: i64| point.rem_euclid(points as i64) as usize;
        for (i, mass) in self.masses.iter().enumerate() {
            wave[place(self.first + i as i64)].re += mass * (tilt * self.loss(i) - log_mass).exp();
        }
        fft::transform(&mut wave, false);
        wave.iter_mut()
            .for_each(|z| *z = Complex64::from_polar(z.norm_sqr().powf(0.5 * count), z.arg() * count));
        fft::transform(&mut wave, true);
        let lowest = steps as i64 * self.first;
        let highest = steps as i64 * (self.first + self.masses.len() as i64 - 1);
        let centre = (count * mean / self.spacing).round() as i64;
        let first = (centre - points as i64 / 2).min(highest - points as i64 + 1).max(lowest);
        let untilted = |i: usize| {
            let point = first + i as i64;
            let mass = wave[place(point)].re.max(0.0);
            mass * (count * log_mass - tilt * point as f64 * self.spacing).exp()
        };
        let masses = (0..points).map(untilted).collect();
        let last = first + points as i64 - 1;
        let above =
            if last >= highest { 0.0 } else { self.above(steps, tilt, (last + 1) as f64 * self.spacing) };
        Self { spacing: self.spacing, first, masses, lost: (count * self.lost + above).min(1.0) }
    }

    /// A bound of the probability that `steps` losses sum up to at least this.
    fn above(&self, steps: u64, tilt: f64, loss: f64) -> f64 {
        let bound = |times: f64| {
            let tilt = times * tilt;
            (steps as f64 * self.moments(tilt).log_mass - tilt * loss).exp()
        };
        [1.0, 1.5, 2.0, 3.0, 4.5].into_iter().map(bound).filter(|x| !x.is_nan()).fold(1.0, f64::min)
    }

    /// The least ε for which δ(ε) = Σ p·(1 − e^{ε − ℓ}) over ℓ > ε is at most δ; none if it is below the grid.
    fn epsilon(&self, delta: f64) -> Option<f64> {
        if self.lost >= delta {
            return Some(f64::INFINITY);
        }
        let decay = (-self.spacing).exp();
        // Σ p and Σ p·e^{ε − ℓ} over the points from here on.
        let (mut above, mut discounted) = (0.0, 0.0);
        for i in (0..self.masses.len()).rev() {
            let (sum, discounted_sum) = (above, discounted * decay);
            let loss = self.loss(i);
            if self.lost + sum - discounted_sum > delta {
                let between = ((sum + self.lost - delta) / discounted).ln();
                return Some((loss + self.spacing + between.clamp(-self.spacing, 0.0)).max(0.0));
            }
            if loss <= 0.0 {
                return Some(0.0);
            }
            (above, discounted) = (sum + self.masses[i], discounted_sum + self.masses[i]);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::mechanism::normal_above;
    use super::*;

    /// δ of the Gaussian mechanism, in closed form.
    fn gaussian_delta(epsilon: f64, mean: f64) -> f64 {
        let at = epsilon / mean;
        normal_above(at - mean / 2.0) - epsilon.exp() * normal_above(at + mean / 2.0)
    }

    #[test]
    fn without_sampling_it_is_the_gaussian_s() {
        for (sigma, steps, delta) in
            [(1.0, 1, 1e-5), (20.0, 1, 1e-3), (3.0, 10, 1e-9), (50.0, 400, 1e-7), (200.0, 100_000, 1e-5)]
        {
            let mechanism = SampledGaussian { sampling_rate: 1.0, noise_multiplier: sigma };
            let found = epsilon(&mechanism, steps, delta);
            let mean = (steps as f64).sqrt() / sigma;
            let (at, below) = (gaussian_delta(found, mean), gaussian_delta(found * 0.998, mean));
            assert!(at <= delta && below >= delta, "σ {sigma}, {steps} steps, δ {delta}: ε {found}, δ {at}");
        }
    }

    #[test]
    fn no_step_and_no_advantage_cost_nothing() {
        let mechanism = SampledGaussian { sampling_rate: 1e-4, noise_multiplier: 20.0 };
        assert_eq!(epsilon(&mechanism, 0, 1e-5), 0.0);
        // Less than δ tells the data sets apart at all.
        assert_eq!(epsilon(&mechanism, 1, 1e-3), 0.0);
    }

    #[test]
    fn a_grid_preserves_both_distributions() {
        let mechanism = SampledGaussian { sampling_rate: 0.01, noise_multiplier: 0.8 };
        for direction in [Direction::Removed, Direction::Added] {
            let one = OneStep::new(&mechanism, direction, 1e-15);
            for spacing in [1e-4, 0.3] {
                let found = one.discretized(spacing);
                let p: f64 = found.masses.iter().sum();
                let q: f64 = found.masses.iter().enumerate().map(|(i, m)| m * (-found.loss(i)).exp()).sum();
                assert!((p - 1.0).abs() < 1e-11, "{direction:?} {spacing}: {p}");
                // What is moved up below has less of Q.
                assert!(q <= 1.0 + 1e-11 && q > 1.0 - 1e-6, "{direction:?} {spacing}: {q}");
            }
        }
    }
}
