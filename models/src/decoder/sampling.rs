//! [`Sampling`]: a token drawn from the model's probabilities, in the place of the likeliest.

use gradtx_kernels::Real;
use gradtx_kernels::rng::{Stream, derive};

/// How tokens are drawn. The same seed, prompt and logits give the same tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; above 0.
    pub temperature: f64,
    /// Only the likeliest tokens that have this probability together are drawn; in (0, 1].
    pub top_p: f64,
    /// Seed of every draw.
    pub seed: u64,
}

impl Sampling {
    /// Draws from logits `[V]`, for the prompt and the position of this number.
    pub fn draw<X: Real>(&self, logits: &[X], prompt: usize, position: u32) -> u32 {
        let largest = logits.iter().map(|x| x.to_f64()).fold(f64::NEG_INFINITY, f64::max);
        let weight = |x: &X| ((x.to_f64() - largest) / self.temperature).exp();
        let mut tokens: Vec<(u32, f64)> = (0..).zip(logits.iter().map(weight)).collect();
        tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let all: f64 = tokens.iter().map(|(_, weight)| weight).sum();
        let (mut kept, mut count) = (0.0, 0);
        while count < tokens.len() && (count == 0 || kept < self.top_p * all) {
            kept += tokens[count].1;
            count += 1;
        }
        let key = derive(derive(self.seed, prompt as u64), u64::from(position));
        let mut left = Stream::new(key).uniform() * kept;
        for (token, weight) in &tokens[..count] {
            left -= weight;
            if left < 0.0 {
                return *token;
            }
        }
        // The rounding of a sum.
        tokens[count - 1].0
    }
}

/// A token drawn from the probabilities of logits `[V]`, by a number from 0 to below 1: the first whose probability,
/// with those of the tokens before it, is above that.
pub fn drawn<X: Real>(logits: &[X], uniform: f64) -> u32 {
    let largest = logits.iter().map(|x| x.to_f64()).fold(f64::NEG_INFINITY, f64::max);
    let weight = |x: &X| (x.to_f64() - largest).exp();
    let mut left = uniform * logits.iter().map(weight).sum::<f64>();
    let mut last = 0;
    for (token, weight) in (0..).zip(logits.iter().map(weight)) {
        if weight > 0.0 {
            last = token;
            left -= weight;
            if left < 0.0 {
                break;
            }
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_names_a_token_by_its_probability() {
        let logits = [f32::NEG_INFINITY, 1f32.ln(), 2f32.ln(), 5f32.ln(), f32::NEG_INFINITY];
        for (uniform, token) in [(0.0, 1), (0.12, 1), (0.13, 2), (0.37, 2), (0.38, 3), (1.0 - 1e-16, 3)] {
            assert_eq!(drawn(&logits, uniform), token, "{uniform}");
        }
    }

    fn counts(sampling: Sampling, logits: &[f32]) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        (0..4000).for_each(|position| counts[sampling.draw(logits, 0, position) as usize] += 1);
        counts
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.0f32, 2f32.ln(), 5f32.ln(), f32::NEG_INFINITY];
        let found = counts(Sampling { temperature: 1.0, top_p: 1.0, seed: 3 }, &logits);
        for (found, wanted) in found.iter().zip([0.125, 0.25, 0.625, 0.0]) {
            assert!((*found as f64 / 4000.0 - wanted).abs() < 0.03, "{found} of {wanted}");
        }
        let found = counts(Sampling { temperature: 1.0, top_p: 0.8, seed: 3 }, &logits);
        assert!(found[0] == 0 && found[1] > 900, "{found:?}");
        assert_eq!(counts(Sampling { temperature: 1.0, top_p: 0.5, seed: 3 }, &logits), [0, 0, 4000, 0]);
        assert_eq!(counts(Sampling { temperature: 0.05, top_p: 1.0, seed: 3 }, &logits), [0, 0, 4000, 0]);
    }

    #[test]
    fn draws_are_keyed() {
        let logits = [0.0f32; 1000];
        let draw = |seed, prompt, position| {
            Sampling { temperature: 1.0, top_p: 1.0, seed }.draw(&logits, prompt, position)
        };
        assert_eq!(draw(1, 2, 3), draw(1, 2, 3));
        assert!(
            draw(1, 2, 3) != draw(1, 2, 4)
                && draw(1, 2, 3) != draw(1, 3, 3)
                && draw(1, 2, 3) != draw(2, 2, 3)
        );
    }
}
