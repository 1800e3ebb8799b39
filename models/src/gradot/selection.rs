//! Which components and channels stay, within a budget of parameters.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;

/// Ranks and widths are multiples of this, for the tiles of matrix products.
const MULTIPLE: usize = 8;
/// Channels that an MLP keeps at least.
const MIN_CHANNELS: usize = 8;

/// Over what the budget is shared out by scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Allocate {
    /// All middle layers together.
    #[default]
    Global,
    /// Every layer has its own.
    Layer,
    /// Every matrix has its own; an MLP is one.
    Matrix,
}

/// An attention matrix whose components are ranked.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// The layer that it is of.
    pub layer: usize,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// By component, from the largest singular value to the smallest.
    pub scores: Vec<f64>,
}

impl Matrix {
    /// Parameters of a component.
    fn of_one(&self) -> usize {
        self.rows + self.cols
    }

    /// Parameters of this many components: in factors, or multiplied out where that is less.
    fn cost(&self, rank: usize) -> usize {
        (rank * self.of_one()).min(self.rows * self.cols)
    }

    /// The rank of so many components in factors; 0 where the matrix is smaller multiplied out.
    pub fn stored_rank(&self, kept: usize) -> usize {
        if kept * self.of_one() >= self.rows * self.cols { 0 } else { kept }
    }
}

/// Sorts candidates: the highest score first, ties by their place.
fn by_score(a: (f64, (usize, usize)), b: (f64, (usize, usize))) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// The numbers of the groups that share a budget, by item.
fn groups(allocate: Allocate, layers: impl Iterator<Item = usize>) -> Vec<usize> {
    match allocate {
        Allocate::Global => layers.map(|_| 0).collect(),
        Allocate::Layer => layers.collect(),
        Allocate::Matrix => layers.enumerate().map(|(i, _)| i).collect(),
    }
}

/// The components of every matrix that stay, in ascending order: those with the largest singular values (a share
/// `keep`), then by score per parameter, until a share `ratio` of the matrices' parameters is used. Where a matrix
/// stays in factors, their number is rounded up to a multiple of 8.
pub fn choose_components(matrices: &[Matrix], ratio: f64, keep: f64, allocate: Allocate) -> Vec<Vec<usize>> {
    let group = groups(allocate, matrices.iter().map(|matrix| matrix.layer));
    let mut budget = vec![0.0; group.iter().max().map_or(0, |last| last + 1)];
    let mut is_kept: Vec<Vec<bool>> = vec![];
    let mut candidates = vec![];
    for (i, matrix) in matrices.iter().enumerate() {
        let always = share_of(matrix.scores.len(), keep);
        budget[group[i]] += ratio * (matrix.rows * matrix.cols) as f64 - matrix.cost(always) as f64;
        is_kept.push((0..matrix.scores.len()).map(|k| k < always).collect());
        let per_parameter = |k: usize| matrix.scores[k] / matrix.of_one() as f64;
        candidates.extend((always..matrix.scores.len()).map(|k| (per_parameter(k), (i, k))));
    }
    candidates.sort_by(|a, b| by_score(*a, *b));
    let mut count: Vec<usize> = is_kept.iter().map(|kept| kept.iter().filter(|is| **is).count()).collect();
    let mut is_full = vec![false; budget.len()];
    for (_, (i, k)) in candidates {
        let (group, matrix) = (group[i], &matrices[i]);
        let cost = (matrix.cost(count[i] + 1) - matrix.cost(count[i])) as f64;
        // The rounding of a share must not cost the last one.
        is_full[group] |= cost > budget[group] + 1e-6;
        if !is_full[group] {
            budget[group] -= cost;
            count[i] += 1;
            is_kept[i][k] = true;
        }
    }
    let rounded = |(matrix, mut kept): (&Matrix, Vec<bool>)| {
        let count = kept.iter().filter(|is| **is).count();
        if matrix.stored_rank(count) > 0 {
            let mut rest: Vec<_> =
                (0..kept.len()).filter(|k| !kept[*k]).map(|k| (matrix.scores[k], (0, k))).collect();
            rest.sort_by(|a, b| by_score(*a, *b));
            let more = count.next_multiple_of(MULTIPLE) - count;
            rest.into_iter().take(more).for_each(|(_, (_, k))| kept[k] = true);
        }
        (0..kept.len()).filter(|k| kept[*k]).collect()
    };
    matrices.iter().zip(is_kept).map(rounded).collect()
}

/// The channels of every layer's MLP that stay, in ascending order: of each layer those with the highest scores (a
/// share `keep`, and 8 at least), then by score, until a share `ratio` of all is used. Their number is rounded up to
/// a multiple of 8.
pub fn choose_channels(layers: &[Vec<f64>], ratio: f64, keep: f64, allocate: Allocate) -> Vec<Vec<usize>> {
    let group = groups(allocate, 0..layers.len());
    let mut budget = vec![0.0; group.iter().max().map_or(0, |last| last + 1)];
    let mut count = vec![];
    let mut candidates = vec![];
    // A layer's channels go in the order of their scores, so their number says which.
    let order = |scores: &[f64]| {
        let mut order: Vec<_> = scores.iter().enumerate().map(|(j, score)| (*score, (0, j))).collect();
        order.sort_by(|a, b| by_score(*a, *b));
        order
    };
    for (layer, scores) in layers.iter().enumerate() {
        let always = share_of(scores.len(), keep).max(MIN_CHANNELS.min(scores.len()));
        budget[group[layer]] += ratio * scores.len() as f64 - always as f64;
        count.push(always);
        let rest = order(scores).into_iter().skip(always);
        candidates.extend(rest.map(|(score, (_, j))| (score, (layer, j))));
    }
    candidates.sort_by(|a, b| by_score(*a, *b));
    for (_, (layer, _)) in candidates {
        if budget[group[layer]] + 1e-6 >= 1.0 {
            budget[group[layer]] -= 1.0;
            count[layer] += 1;
        }
    }
    let chosen = |(scores, count): (&Vec<f64>, usize)| {
        let count = count.next_multiple_of(MULTIPLE).min(scores.len());
        let mut channels: Vec<usize> = order(scores).into_iter().take(count).map(|(_, (_, j))| j).collect();
        channels.sort_unstable();
        channels
    };
    layers.iter().zip(count).map(chosen).collect()
}

/// A share of so many, rounded up.
fn share_of(count: usize, share: f64) -> usize {
    ((share * count as f64).ceil() as usize).min(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::rng::Stream;

    fn matrices() -> Vec<Matrix> {
        let mut stream = Stream::new(3);
        let mut of = |layer, rows: usize, cols: usize| {
            let scores = (0..rows.min(cols)).map(|_| stream.uniform()).collect();
            Matrix { layer, rows, cols, scores }
        };
        vec![of(1, 320, 320), of(1, 80, 320), of(2, 320, 320), of(2, 80, 320)]
    }

    fn cost(matrices: &[Matrix], kept: &[Vec<usize>]) -> f64 {
        matrices.iter().zip(kept).map(|(matrix, kept)| matrix.cost(kept.len()) as f64).sum()
    }

    #[test]
    fn budgets_are_used_and_the_largest_stay() {
        for (allocate, ratio) in [
            (Allocate::Global, 0.6),
            (Allocate::Layer, 0.6),
            (Allocate::Matrix, 0.6),
            (Allocate::Global, 0.3),
        ] {
            let all = matrices();
            let kept = choose_components(&all, ratio, 0.05, allocate);
            let whole: usize = all.iter().map(|m| m.rows * m.cols).sum();
            let used = cost(&all, &kept) / (ratio * whole as f64);
            // Four ranks are rounded up, by 7 at most.
            assert!((0.99..1.10).contains(&used), "{allocate:?}: {used}");
            for (matrix, kept) in all.iter().zip(&kept) {
                let always = matrix.scores.len().div_ceil(20);
                assert!(kept[..always].iter().copied().eq(0..always) && kept.windows(2).all(|p| p[0] < p[1]));
                assert!(matrix.stored_rank(kept.len()).is_multiple_of(8), "{}", kept.len());
                // No component was left for one with a lower score, but for rounding.
                let lowest = kept[always..].iter().map(|k| matrix.scores[*k]).fold(1.0, f64::min);
                let best = (0..matrix.scores.len()).filter(|k| !kept.contains(k)).map(|k| matrix.scores[k]);
                assert!(best.fold(0.0, f64::max) <= lowest);
            }
        }
    }

    #[test]
    fn a_ratio_of_one_keeps_everything() {
        for allocate in [Allocate::Global, Allocate::Layer, Allocate::Matrix] {
            let all = matrices();
            let kept = choose_components(&all, 1.0, 0.05, allocate);
            assert!(
                all.iter().zip(&kept).all(|(m, k)| k.len() == m.scores.len() && m.stored_rank(k.len()) == 0)
            );
            let channels = choose_channels(&[vec![0.5; 20], vec![0.1; 20]], 1.0, 0.05, allocate);
            assert_eq!(channels, [(0..20).collect::<Vec<_>>(), (0..20).collect()]);
        }
    }

    #[test]
    fn scores_decide_which_layer_keeps_more() {
        let mut all = matrices();
        all[2].scores.iter_mut().for_each(|score| *score += 1.0);
        let kept = choose_components(&all, 0.4, 0.05, Allocate::Global);
        assert!(kept[2].len() > 2 * kept[0].len(), "{} and {}", kept[2].len(), kept[0].len());
        let even = choose_components(&all, 0.4, 0.05, Allocate::Matrix);
        assert_eq!(even[2].len(), even[0].len());
        let (low, high) = ((0..64).map(f64::from).collect(), (0..64).map(|j| 100.0 + f64::from(j)).collect());
        let channels = choose_channels(&[low, high], 0.5, 0.05, Allocate::Global);
        assert_eq!((channels[0].len(), channels[1].len()), (8, 56));
        assert_eq!(channels[0], (56..64).collect::<Vec<_>>(), "of each the best");
    }

    #[test]
    fn ties_go_to_the_first() {
        let channels = choose_channels(&[vec![1.0; 64], vec![1.0; 64]], 0.5, 0.05, Allocate::Global);
        assert_eq!((channels[0].len(), channels[1].len()), (56, 8));
        assert_eq!(channels[1], (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn small_matrices_keep_what_they_have() {
        let one = Matrix { layer: 0, rows: 6, cols: 9, scores: vec![1.0; 5] };
        // Rank 5 of 6 in factors would take more than the matrix.
        assert_eq!(choose_components(std::slice::from_ref(&one), 1.0, 0.05, Allocate::Global)[0].len(), 5);
        assert_eq!((one.stored_rank(5), one.stored_rank(3)), (0, 3));
        assert_eq!(choose_channels(&[vec![1.0; 5]], 0.1, 0.05, Allocate::Global)[0].len(), 5);
    }
}
