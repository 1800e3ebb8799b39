//! Combinations of updates that a minority of them cannot decide.
//!
//! In: updates of one length, by reference. Out: values, or weights of the updates. All arithmetic is in
//! f64 and in one order, so the result depends on the updates and their order alone.
//!
//! * coordinate median and trimmed mean: Yin et al., *Byzantine-Robust Distributed Learning: Towards
//!   Optimal Statistical Rates*, 2018;
//! * geometric median by the smoothed Weiszfeld iteration: Pillutla et al., *Robust Aggregation for
//!   Federated Learning*, 2019.

use gradtx_train::linalg::gram::{COLUMNS, Gram};

/// Weiszfeld iterations: always so many, so that the result depends on nothing but the updates.
const ITERATIONS: usize = 200;
/// Distances below this part of the updates' root mean square norm count as this: an estimate that
/// meets an update is not divided by zero.
const SMOOTHING: f64 = 1e-6;

/// The median of every value; of an even number of updates, the mean of the middle two.
pub(super) fn median(updates: &[&[f32]]) -> Vec<f32> {
    let leave_out = updates.len().saturating_sub(1) / 2;
    trimmed_mean(updates, leave_out)
}

/// The mean of every value without the `leave_out` smallest and as many largest.
pub(super) fn trimmed_mean(updates: &[&[f32]], leave_out: usize) -> Vec<f32> {
    let len = updates.first().map_or(0, |update| update.len());
    let mut column = vec![0.0f32; updates.len()];
    let one = |i: usize| {
        column.iter_mut().zip(updates).for_each(|(value, update)| *value = update[i]);
        column.sort_unstable_by(f32::total_cmp);
        let kept = &column[leave_out..column.len() - leave_out];
        (kept.iter().map(|&x| f64::from(x)).sum::<f64>() / kept.len() as f64) as f32
    };
    (0..len).map(one).collect()
}

/// Weights, which sum to 1, of the updates whose weighted sum is their geometric median: the
/// point with the smallest sum of distances to all of them. `products` are their inner products.
pub(super) fn geometric_median(products: &[Vec<f64>]) -> Vec<f64> {
    let n = products.len();
    let mean_square = (0..n).map(|i| products[i][i]).sum::<f64>() / n.max(1) as f64;
    let least = SMOOTHING * mean_square.sqrt();
    let mut weights = vec![1.0 / n as f64; n];
    for _ in 0..ITERATIONS {
        let against: Vec<f64> =
            products.iter().map(|row| row.iter().zip(&weights).map(|(x, w)| x * w).sum()).collect();
        let own: f64 = against.iter().zip(&weights).map(|(x, w)| x * w).sum();
        let nearness = |i: usize| 1.0 / (products[i][i] - 2.0 * against[i] + own).max(0.0).sqrt().max(least);
        let near: Vec<f64> = (0..n).map(nearness).collect();
        let sum: f64 = near.iter().sum();
        weights.iter_mut().zip(near).for_each(|(weight, near)| *weight = near / sum);
    }
    weights
}

/// Inner products of updates with each other.
pub(super) fn inner_products(updates: &[&[f32]]) -> Vec<Vec<f64>> {
    let mut gram = Gram::new(updates.len());
    let len = updates.first().map_or(0, |update| update.len());
    for first in (0..len).step_by(COLUMNS) {
        let range = first..len.min(first + COLUMNS);
        let width = range.len();
        let columns: Vec<f64> =
            updates.iter().flat_map(|update| update[range.clone()].iter().map(|&x| f64::from(x))).collect();
        gram.add(&columns, width);
    }
    gram.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::rng::Stream;

    fn weighted(updates: &[&[f32]], weights: &[f64]) -> Vec<f64> {
        let sum = |i: usize| updates.iter().zip(weights).map(|(u, w)| w * f64::from(u[i])).sum();
        (0..updates[0].len()).map(sum).collect()
    }

    fn distances(updates: &[&[f32]], point: &[f64]) -> f64 {
        let one =
            |u: &&[f32]| u.iter().zip(point).map(|(&x, p)| (f64::from(x) - p).powi(2)).sum::<f64>().sqrt();
        updates.iter().map(one).sum()
    }

    #[test]
    fn medians_and_trimmed_means_are_those_of_each_value() {
        let rows: [&[f32]; 5] = [&[1.0, 9.0], &[2.0, 7.0], &[4.0, -50.0], &[3.0, 8.0], &[900.0, 10.0]];
        assert_eq!(median(&rows), [3.0, 8.0]);
        assert_eq!(median(&rows[..4]), [2.5, 7.5]);
        assert_eq!(median(&rows[..1]), [1.0, 9.0]);
        assert_eq!(trimmed_mean(&rows, 1), [3.0, 8.0]);
        assert_eq!(trimmed_mean(&rows[..3], 0), [7.0 / 3.0, -34.0 / 3.0]);
    }

    #[test]
    fn geometric_median_has_the_least_sum_of_distances() {
        let mut random = Stream::new(5);
        let rows: Vec<Vec<f32>> = (0..6).map(|_| (0..9).map(|_| random.normal() as f32).collect()).collect();
        let updates: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        let weights = geometric_median(&inner_products(&updates));
        assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        let point = weighted(&updates, &weights);
        let least = distances(&updates, &point);
        for _ in 0..200 {
            let near: Vec<f64> = point.iter().map(|p| p + 0.01 * random.normal()).collect();
            assert!(distances(&updates, &near) > least);
        }
    }

    #[test]
    fn one_far_update_moves_the_geometric_median_little() {
        let mut random = Stream::new(6);
        let mut rows: Vec<Vec<f32>> =
            (0..5).map(|_| (0..20).map(|_| 1.0 + 0.1 * random.normal() as f32).collect()).collect();
        let moved = |rows: &[Vec<f32>]| {
            let updates: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
            let products = inner_products(&updates);
            let point = weighted(&updates, &geometric_median(&products));
            point.iter().map(|p| (p - 1.0).powi(2)).sum::<f64>().sqrt()
        };
        let before = moved(&rows);
        rows[4].iter_mut().for_each(|x| *x *= -1000.0);
        let after = moved(&rows);
        assert!(before < 0.3 && after < 0.5, "{before} {after}");
        // A majority decides.
        for row in &mut rows[2..4] {
            row.iter_mut().for_each(|x| *x *= -1000.0);
        }
        assert!(moved(&rows) > 100.0);
    }

    #[test]
    fn updates_that_are_all_the_same_are_their_own_median() {
        let row = [0.5f32, -2.0, 3.0];
        let updates: [&[f32]; 3] = [&row, &row, &row];
        let weights = geometric_median(&inner_products(&updates));
        assert!(weights.iter().all(|w| (w - 1.0 / 3.0).abs() < 1e-12), "{weights:?}");
        assert_eq!(median(&updates), row);
    }
}
