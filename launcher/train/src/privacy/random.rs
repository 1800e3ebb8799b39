//! [`PrivateRandom`]: the random numbers of private training, sampling and noise.
//!
//! ChaCha20 with a seed from the operating system, never from the run's seed: whoever knows the noise can take it away. Every
//! step has streams of its own, so no number is used twice, however long the generator lives.

use anyhow::Result;
use gradtx_run::failure::failed;
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

/// Standard normal variables that one variable of the noise is made of, scaled to the same variance. The low-order bits of a
/// single one give away what it was added to (Holohan and Braghin 2021); those of a sum of four do not in feasible
/// time.
const PARTS: usize = 4;
/// Values of noise that one stretch of the generator is for.
const CHUNK: usize = 1 << 12;
/// The grid that noisy sums are rounded to is finer than the noise by this power of two.
const GRID: i32 = 24;

/// What a stream of random numbers is for.
#[derive(Clone, Copy, Debug)]
enum Use {
    Sampling,
    Noise,
}

/// A generator of the random numbers of private training.
pub struct PrivateRandom {
    seed: [u8; 32],
    is_secure: bool,
}

impl PrivateRandom {
    /// Seeded by the operating system.
    ///
    /// # Errors
    /// If that has no random numbers.
    pub fn new() -> Result<Self> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|error| {
            failed(format!("the operating system gives no random numbers: {error}"), "see getrandom(2)")
        })?;
        Ok(Self { seed, is_secure: true })
    }

    /// With a seed that is known, for tests: nothing is private.
    pub fn insecure(seed: u64) -> Self {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        Self { seed: bytes, is_secure: false }
    }

    /// Whether nobody can know the seed.
    pub fn is_secure(&self) -> bool {
        self.is_secure
    }

    fn stream(&self, purpose: Use, step: u64) -> ChaCha20Rng {
        let mut random = ChaCha20Rng::from_seed(self.seed);
        random.set_stream(2 * step + purpose as u64);
        random
    }

    /// A Poisson sample of `0..examples`: each is in it with this probability, whatever the others are.
    pub fn sample(&self, step: u64, examples: usize, rate: f64) -> Vec<usize> {
        let mut random = self.stream(Use::Sampling, step);
        (0..examples).filter(|_| unit(random.next_u64()) <= rate).collect()
    }

    /// Adds normal noise to a sum, and rounds what comes of it to a grid: a power of two that is 2²⁴ to 2²⁵ times finer than the
    /// noise. So the bits below, in which floating-point numbers of different sums differ, are not published.
    ///
    /// `step` must be new for every call.
    pub fn add_noise(&self, step: u64, sum: &mut [f64], deviation: f64) {
        let grid = 2f64.powi(deviation.log2().floor() as i32 - GRID);
        let noise = self.stream(Use::Noise, step);
        sum.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| {
            let mut random = noise.clone();
            // A value takes PARTS numbers of two words.
            random.set_word_pos((2 * PARTS * CHUNK * i) as u128);
            for value in chunk {
                let noise = deviation * normal(&mut random);
                *value = ((*value + noise) / grid).round() * grid;
            }
        });
    }
}

/// In (0, 1].
fn unit(bits: u64) -> f64 {
    ((bits >> 11) + 1) as f64 * 2f64.powi(-53)
}

/// A standard normal variable, as a sum of [`PARTS`] by Box and Muller.
fn normal(random: &mut ChaCha20Rng) -> f64 {
    let pair = |random: &mut ChaCha20Rng| {
        let radius = (-2.0 * unit(random.next_u64()).ln()).sqrt();
        let (sine, cosine) = (std::f64::consts::TAU * unit(random.next_u64())).sin_cos();
        radius * (sine + cosine)
    };
    let sum: f64 = (0..PARTS / 2).map(|_| pair(random)).sum();
    sum / (PARTS as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::super::mechanism::normal_above;
    use super::*;
    use std::collections::HashSet;

    fn noise(random: &PrivateRandom, step: u64, len: usize) -> Vec<f64> {
        let mut values = vec![0.0; len];
        random.add_noise(step, &mut values, 1.0);
        values
    }

    /// The largest distance of the empirical distribution from the normal one, times √n.
    fn kolmogorov_smirnov(mut values: Vec<f64>) -> f64 {
        values.sort_by(f64::total_cmp);
        let n = values.len() as f64;
        let distances = values.iter().enumerate().map(|(i, &x)| {
            let below = 1.0 - normal_above(x);
            (below - i as f64 / n).abs().max((below - (i + 1) as f64 / n).abs())
        });
        distances.fold(0.0, f64::max) * n.sqrt()
    }

    #[test]
    fn noise_is_standard_normal() {
        let values = noise(&PrivateRandom::insecure(1), 0, 200_000);
        let moment = |k| values.iter().map(|x: &f64| x.powi(k)).sum::<f64>() / values.len() as f64;
        for (k, want, tolerance) in [(1, 0.0, 0.01), (2, 1.0, 0.015), (3, 0.0, 0.04), (4, 3.0, 0.1)] {
            assert!((moment(k) - want).abs() < tolerance, "moment {k}: {}", moment(k));
        }
        // 1.95 is exceeded once in a thousand times.
        let distance = kolmogorov_smirnov(values.clone());
        assert!(distance < 1.95, "{distance}");
        // The test finds a wrong scale, and a coarser shape.
        assert!(kolmogorov_smirnov(values.iter().map(|x| 1.02 * x).collect()) > 1.95);
        let neighbours: f64 = values.windows(2).map(|w| w[0] * w[1]).sum::<f64>() / values.len() as f64;
        assert!(neighbours.abs() < 0.01, "{neighbours}");
    }

    #[test]
    fn noise_is_never_the_same_twice() {
        let (a, b) = (PrivateRandom::new().unwrap(), PrivateRandom::new().unwrap());
        assert!(a.is_secure() && !PrivateRandom::insecure(1).is_secure());
        let mut seen = HashSet::new();
        for random in [&a, &b, &PrivateRandom::insecure(1)] {
            for step in 0..20 {
                for value in noise(random, step, 64) {
                    // Values of 26 bits may meet, rows may not.
                    seen.insert((random.seed, step, value.to_bits()));
                }
                assert_ne!(noise(random, step, 64), noise(random, step + 1, 64));
            }
        }
        assert!(seen.len() > 3800, "{}", seen.len());
        assert_ne!(noise(&a, 0, 64), noise(&b, 0, 64));
        assert_ne!(a.sample(0, 100, 0.5), a.sample(1, 100, 0.5));
    }

    #[test]
    fn noise_does_not_depend_on_threads() {
        let random = PrivateRandom::insecure(7);
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| noise(&random, 3, 3 * CHUNK + 17))
        };
        let one = on(1);
        assert_eq!(one, on(3));
        let distinct: HashSet<u64> = one.iter().map(|x| x.to_bits()).collect();
        assert!(distinct.len() > one.len() - 100, "chunks overlap: {} values", distinct.len());
    }

    #[test]
    fn noisy_sums_lie_on_a_grid_whatever_the_sum_was() {
        let random = PrivateRandom::insecure(1);
        for sum in [0.0, 0.1, 1e-9, 12345.678] {
            let mut values = vec![sum; 100];
            random.add_noise(0, &mut values, 3.0);
            let grid = 2f64.powi(1 - GRID);
            assert!(values.iter().all(|x| (x / grid).fract() == 0.0));
        }
    }

    #[test]
    fn samples_are_poisson_s() {
        let random = PrivateRandom::insecure(3);
        let sizes: Vec<f64> = (0..2000).map(|step| random.sample(step, 50, 0.1).len() as f64).collect();
        let mean = sizes.iter().sum::<f64>() / 2000.0;
        let variance = sizes.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 2000.0;
        assert!((mean - 5.0).abs() < 0.25 && (variance - 4.5).abs() < 0.5, "{mean} {variance}");
        assert!(sizes.contains(&0.0), "empty samples occur");
        assert_eq!(random.sample(0, 50, 1.0).len(), 50);
    }
}
