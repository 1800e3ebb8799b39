//! How well an attack tells members from others, and what privacy that rules out.
//!
//! In: scores of members and of others. Out: the area under the ROC curve, true positive rates at small
//! false positive rates, and a lower bound on ε from one training.
//!
//! The bound is that of Steinke, Nasr and Jagielski, *Privacy Auditing with One (1) Training Run*, 2023,
//! theorem 5.2: of m canaries, each a member by a fair coin of its own, r are guessed and v of these
//! guesses are right. Under (ε, δ)-differential privacy with respect to adding or removing an example,
//! P[V ≥ v] ≤ f(0) + 2 m δ · max_{i = 1..v} (f(i) − f(0)) / i, where f(i) is the probability that a
//! binomial variable of r trials with probability e^ε/(1+e^ε) is at least v − i.

use serde::{Deserialize, Serialize};

/// Larger ε are not distinguished.
const MAX_EPSILON: f64 = 64.0;
/// Bisections of ε.
const BISECTIONS: usize = 60;
/// Parts of the canaries that are guessed: those with the largest scores as members, as many with the
/// smallest as others.
const GUESSED: [usize; 4] = [1, 2, 4, 8];
/// With fewer guesses even perfect ones bound ε by less than 2.
const MIN_GUESSES: usize = 10;

/// An ε that the mechanism is not below, with some confidence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EpsilonBound {
    /// The bound; 0 says nothing.
    pub epsilon: f64,
    /// Guesses of which it follows.
    pub guesses: usize,
    /// How many of them are right.
    pub right: usize,
}

/// Probability that a member scores above one that is none; equal scores count half.
pub fn area_under_curve(members: &[f64], others: &[f64]) -> f64 {
    let mut sorted = others.to_vec();
    sorted.sort_by(f64::total_cmp);
    let wins: f64 = members
        .iter()
        .map(|score| {
            let below = sorted.partition_point(|other| other < score);
            let equal = sorted.partition_point(|other| other <= score) - below;
            below as f64 + 0.5 * equal as f64
        })
        .sum();
    wins / (members.len() * others.len()).max(1) as f64
}

/// Share of the members above a threshold that at most this share of the others is above.
pub fn true_positive_rate(members: &[f64], others: &[f64], false_positive_rate: f64) -> f64 {
    let mut sorted = others.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let allowed = (false_positive_rate * others.len() as f64) as usize;
    let Some(threshold) = sorted.get(allowed) else { return 1.0 };
    members.iter().filter(|score| *score > threshold).count() as f64 / members.len().max(1) as f64
}

/// The largest of the bounds from different numbers of guesses, each with a share of the doubt
/// `1 − confidence`; `attacks` others are bounded with the rest of it.
///
/// `scores` has every canary, with whether it is a member.
pub fn epsilon_bound(scores: &[(f64, bool)], delta: f64, confidence: f64, attacks: usize) -> EpsilonBound {
    let mut order: Vec<&(f64, bool)> = scores.iter().collect();
    order.sort_by(|a, b| b.0.total_cmp(&a.0));
    let doubt = (1.0 - confidence) / (attacks.max(1) * GUESSED.len()) as f64;
    let mut best = EpsilonBound::default();
    for part in GUESSED {
        let each = order.len() / (2 * part);
        if 2 * each < MIN_GUESSES {
            continue;
        }
        let members = order[..each].iter().filter(|(_, member)| *member).count();
        let others = order[order.len() - each..].iter().filter(|(_, member)| !*member).count();
        let (guesses, right) = (2 * each, members + others);
        let epsilon = largest_refuted(order.len(), guesses, right, delta, doubt);
        if epsilon > best.epsilon || best.guesses == 0 {
            best = EpsilonBound { epsilon, guesses, right };
        }
    }
    best
}

/// The largest ε at which so many right guesses have at most this probability.
fn largest_refuted(canaries: usize, guesses: usize, right: usize, delta: f64, doubt: f64) -> f64 {
    let refuted = |epsilon: f64| probability(canaries, guesses, right, epsilon, delta) <= doubt;
    if !refuted(0.0) {
        return 0.0;
    }
    let (mut low, mut high) = (0.0, MAX_EPSILON);
    for _ in 0..BISECTIONS {
        let middle = 0.5 * (low + high);
        if refuted(middle) { low = middle } else { high = middle }
    }
    low
}

/// Probability under (ε, δ) of at least so many right guesses, bounded from above.
fn probability(canaries: usize, guesses: usize, right: usize, epsilon: f64, delta: f64) -> f64 {
    let masses = binomial(guesses, 1.0 / (1.0 + (-epsilon).exp()));
    let at_least: f64 = masses[right..].iter().sum();
    let (mut below, mut steepest) = (0.0, 0.0f64);
    for i in 1..=right {
        below += masses[right - i];
        steepest = steepest.max(below / i as f64);
    }
    (at_least + 2.0 * canaries as f64 * delta * steepest).min(1.0)
}

/// Probabilities of 0 to n successes.
fn binomial(n: usize, p: f64) -> Vec<f64> {
    let mut log_factorial = vec![0.0f64; n + 1];
    for i in 1..=n {
        log_factorial[i] = log_factorial[i - 1] + (i as f64).ln();
    }
    let (success, failure) = (p.ln(), (1.0 - p).max(f64::MIN_POSITIVE).ln());
    let mass = |k: usize| {
        let choices = log_factorial[n] - log_factorial[k] - log_factorial[n - k];
        (choices + k as f64 * success + (n - k) as f64 * failure).exp()
    };
    (0..=n).map(mass).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::rng::Stream;

    #[test]
    fn areas_and_rates_are_those_of_the_curve() {
        assert_eq!(area_under_curve(&[3.0, 2.0], &[1.0, 0.0]), 1.0);
        assert_eq!(area_under_curve(&[1.0], &[1.0, 1.0]), 0.5);
        assert_eq!(area_under_curve(&[0.0, 3.0], &[1.0, 2.0]), 0.5);
        let others: Vec<f64> = (0..1000).map(f64::from).collect();
        let members = [999.5, 998.5, 990.5, 10.0];
        assert_eq!(true_positive_rate(&members, &others, 0.001), 0.5);
        assert_eq!(true_positive_rate(&members, &others, 0.01), 0.75);
        // With fewer others than the rate can count, none may be above.
        assert_eq!(true_positive_rate(&[5.0, 1.0], &[4.0, 0.0], 0.001), 0.5);
    }

    #[test]
    fn masses_sum_to_one() {
        for (n, p) in [(1, 0.5), (37, 0.9), (1000, 0.999), (400, 0.5)] {
            assert!((binomial(n, p).iter().sum::<f64>() - 1.0).abs() < 1e-9, "{n} {p}");
        }
        assert!((binomial(4, 0.5)[2] - 0.375).abs() < 1e-12);
    }

    #[test]
    fn all_right_guesses_give_the_bound_of_their_number() {
        // q^r = doubt, q = e^ε/(1+e^ε).
        let found = largest_refuted(100, 100, 100, 0.0, 0.05);
        let q = 0.05f64.powf(0.01);
        assert!((found - (q / (1.0 - q)).ln()).abs() < 1e-9, "{found}");
        // δ weakens it, and half of the guesses says nothing.
        let weaker = largest_refuted(100, 100, 100, 1e-4, 0.05);
        assert!(weaker > 0.0 && weaker < found, "{weaker}");
        assert_eq!(largest_refuted(100, 100, 50, 0.0, 0.05), 0.0);
    }

    /// Right guesses of randomised response, which has this ε exactly.
    fn randomised_response(random: &mut Stream, epsilon: f64, canaries: usize) -> Vec<(f64, bool)> {
        let truth = 1.0 / (1.0 + (-epsilon).exp());
        let one = |_| {
            let member = random.uniform() < 0.5;
            let told = (random.uniform() < truth) == member;
            (f64::from(u8::from(told)) + 1e-3 * random.uniform(), member)
        };
        (0..canaries).map(one).collect()
    }

    #[test]
    fn bounds_hold_for_randomised_response() {
        let mut random = Stream::new(11);
        let (mut above, mut sum) = (0, 0.0);
        for _ in 0..500 {
            let bound = epsilon_bound(&randomised_response(&mut random, 1.0, 300), 0.0, 0.95, 1);
            above += usize::from(bound.epsilon > 1.0);
            sum += bound.epsilon / 500.0;
        }
        // Each of them may be with a probability of 5 %.
        assert!(above <= 25, "{above} of 500 bounds are above the true value");
        assert!(sum > 0.5, "the mean bound is {sum}");
        let nothing = epsilon_bound(&randomised_response(&mut random, 0.0, 1000), 1e-5, 0.95, 1);
        assert!(nothing.epsilon < 0.2, "{nothing:?}");
    }

    #[test]
    fn few_canaries_say_nothing() {
        let scores: Vec<(f64, bool)> = (0..8).map(|i| (f64::from(i), i > 3)).collect();
        assert_eq!(epsilon_bound(&scores, 0.0, 0.95, 1), EpsilonBound::default());
    }
}
