//! How far a client's update is from the updates that a translator has seen.
//!
//! In: inner products of the shadow updates with each other and with a client's, and which shadows are
//! of one group. Out: a [`Distance`], and the [`Calibration`] that says which distances are usual.
//!
//! Of n shadow students x_k, centred at their mean μ, C = 1/n Σ (x_k−μ)(x_k−μ)ᵀ is shrunk within their
//! span to S = (1−γ) C + γ s I, with s the mean eigenvalue and γ as Ledoit and Wolf have it (*A
//! well-conditioned estimator for large-dimensional covariance matrices*, 2004). A client's x−μ has a
//! part p in the span: its Mahalanobis distance is √(pᵀ S⁻¹ p / (n−1)), its share outside
//! 1 − ‖p‖²/‖x−μ‖². Both follow from inner products: with G those of the centred shadows and k
//! theirs with x−μ, α = G⁻¹ k, ‖p‖² = kᵀ α and pᵀ S⁻¹ p = kᵀ ((1−γ)/n G + γ s I)⁻¹ α.
//!
//! Usual is what shadows of left-out groups have: they are to the rest what a new task is to all. The
//! error of translating them, by ridge regression of group means, grows with what the regression
//! leaves of the student; the factor between the two predicts the error for a client.

mod distribution;

pub use self::distribution::Distance;
use self::distribution::{Distribution, Products};
use crate::products::penalty::CANDIDATES;
use crate::products::{Centred, Groups};
use anyhow::Result;
use serde::{Deserialize, Serialize};

/// Parts of the groups, of which one at a time is left out, at most: a part costs a decomposition.
const FOLDS: usize = 16;
/// With fewer groups, what is left of them when one is gone says nothing.
const MIN_GROUPS: usize = 4;
/// So large a share of left-out shadows is nearer than the level of a warning.
const QUANTILE: f64 = 0.95;

/// A quantity over left-out shadows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Level {
    /// Its median.
    pub median: f64,
    /// Its 95 % quantile: what is above deserves a warning.
    pub warning: f64,
}

impl Level {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |q: f64| values[((q * values.len() as f64).ceil() as usize).clamp(1, values.len()) - 1];
        Self { median: at(0.5), warning: at(QUANTILE) }
    }
}

/// How the error of a translation grows with what the regression leaves of the student.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ErrorModel {
    /// Penalty of the regression, with the smallest error of left-out shadows.
    pub penalty: f64,
    /// Squared error of the LLM's update for a squared remainder of the TinyLM's.
    pub factor: f64,
    /// Mean squared distance of the LLM's left-out updates from the mean of the others: the unit.
    pub unit: f64,
    /// The errors of left-out shadows, in that unit.
    pub errors: Level,
    /// Spearman's correlation of predicted and true errors over left-out shadows.
    pub rank_correlation: f64,
}

/// What is usual.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Shadow updates.
    pub shadows: usize,
    /// Their groups.
    pub groups: usize,
    /// Of left-out shadows.
    pub mahalanobis: Level,
    /// Of left-out shadows.
    pub outside: Level,
    /// The error of translating left-out shadows.
    pub error: ErrorModel,
    /// The smallest and the largest cosine of two shadow updates.
    pub cosines: [f64; 2],
}

impl Calibration {
    /// From the inner products of the students and of the teachers; none where there are too few groups.
    ///
    /// # Errors
    /// When all shadow updates are the same.
    pub fn of(students: &Products, teachers: &Products, groups: &Groups) -> Result<Option<Self>> {
        let count = groups.count();
        if count < MIN_GROUPS {
            return Ok(None);
        }
        let sides = [students, teachers].map(|products| Side::new(products, groups));
        let folds = count.min(FOLDS);
        let (mut mahalanobis, mut outside) = (vec![], vec![]);
        let mut left_out = LeftOut::default();
        for fold in 0..folds {
            let (own, from): (Vec<usize>, Vec<usize>) = (0..count).partition(|group| group % folds == fold);
            let rest: Vec<usize> = from.iter().flat_map(|&group| groups.pairs(group)).collect();
            let distribution = Distribution::new(students, rest)?;
            for pair in own.into_iter().flat_map(|group| groups.pairs(group)) {
                let found = distribution.distance(students, &students[pair], students[pair][pair]);
                mahalanobis.push(found.mahalanobis);
                outside.push(found.outside);
                left_out.add(&sides, &from, pair)?;
            }
        }
        Ok(Some(Self {
            shadows: students.len(),
            groups: count,
            mahalanobis: Level::of(mahalanobis),
            outside: Level::of(outside),
            error: left_out.model(),
            cosines: extreme_cosines(students),
        }))
    }
}

/// The shadows that clients are compared with.
pub struct Shadows<'a> {
    students: &'a Products,
    side: Side<'a>,
    all: Distribution,
    groups: Vec<usize>,
}

impl<'a> Shadows<'a> {
    /// From the inner products of the students.
    ///
    /// # Errors
    /// When all shadow updates are the same.
    pub fn new(students: &'a Products, groups: &Groups) -> Result<Self> {
        let all = Distribution::new(students, (0..students.len()).collect())?;
        Ok(Self { students, side: Side::new(students, groups), all, groups: (0..groups.count()).collect() })
    }

    /// Distance of an update with these inner products with the shadows, and with itself.
    pub fn distance(&self, against: &[f64], square: f64, model: Option<&ErrorModel>) -> Result<Distance> {
        let mut found = self.all.distance(self.students, against, square);
        if let Some(model) = model {
            let own = self.side.with_means(against);
            let weights = Centred::new(&self.side.means, &self.groups)?.weights(&own, model.penalty)?;
            let rest = self.side.remainder(&own, square, &self.groups, &weights);
            found.predicted_error = Some((model.factor * rest / model.unit).sqrt());
        }
        Ok(found)
    }
}

/// Inner products of one of the two models' shadow updates, and of their groups' means.
struct Side<'a> {
    products: &'a Products,
    means: Vec<Vec<f64>>,
    /// Pairs of every group.
    members: Vec<Vec<usize>>,
}

impl<'a> Side<'a> {
    fn new(products: &'a Products, groups: &Groups) -> Self {
        let members = (0..groups.count()).map(|group| groups.pairs(group).collect()).collect();
        Self { products, means: groups.means(products), members }
    }

    /// Inner products with the groups' means, from those with the pairs.
    fn with_means(&self, against: &[f64]) -> Vec<f64> {
        let mean =
            |pairs: &Vec<usize>| pairs.iter().map(|&pair| against[pair]).sum::<f64>() / pairs.len() as f64;
        self.members.iter().map(mean).collect()
    }

    /// Squared distance of an update from the weighted sum of these groups' means.
    fn remainder(&self, own: &[f64], square: f64, groups: &[usize], weights: &[f64]) -> f64 {
        let mut sum = square;
        for (&t, w) in groups.iter().zip(weights) {
            let fitted: f64 = groups.iter().zip(weights).map(|(&u, v)| v * self.means[t][u]).sum();
            sum += w * (fitted - 2.0 * own[t]);
        }
        sum.max(0.0)
    }
}

/// Remainders of left-out shadows, for every candidate of the penalty.
#[derive(Default)]
struct LeftOut {
    /// Of every shadow and candidate: the squares of what is left of the student and of the teacher.
    found: Vec<[[f64; 2]; CANDIDATES.len()]>,
    /// Squared distances of the teachers from the mean of the other groups.
    from_mean: Vec<f64>,
}

impl LeftOut {
    fn add(&mut self, sides: &[Side<'_>; 2], from: &[usize], pair: usize) -> Result<()> {
        let own = sides.each_ref().map(|side| side.with_means(&side.products[pair]));
        let squares = sides.each_ref().map(|side| side.products[pair][pair]);
        let centred = Centred::new(&sides[0].means, from)?;
        let mut found = [[0.0; 2]; CANDIDATES.len()];
        for (found, penalty) in found.iter_mut().zip(CANDIDATES) {
            let weights = centred.weights(&own[0], penalty)?;
            *found = [0, 1].map(|i| sides[i].remainder(&own[i], squares[i], from, &weights));
        }
        self.found.push(found);
        let equal = vec![1.0 / from.len() as f64; from.len()];
        self.from_mean.push(sides[1].remainder(&own[1], squares[1], from, &equal));
        Ok(())
    }

    fn model(&self) -> ErrorModel {
        let sum = |candidate: usize, side: usize| self.found.iter().map(|f| f[candidate][side]).sum::<f64>();
        let better = |best: usize, i: usize| if sum(i, 1) < sum(best, 1) { i } else { best };
        let best = (0..CANDIDATES.len()).fold(0, better);
        let unit = (self.from_mean.iter().sum::<f64>() / self.from_mean.len() as f64).max(f64::MIN_POSITIVE);
        let of = |side: usize| -> Vec<f64> { self.found.iter().map(|f| f[best][side]).collect() };
        let (remainders, errors) = (of(0), of(1));
        ErrorModel {
            penalty: CANDIDATES[best],
            factor: sum(best, 1) / sum(best, 0).max(f64::MIN_POSITIVE),
            unit,
            rank_correlation: correlation(&ranks(&remainders), &ranks(&errors)),
            errors: Level::of(errors.into_iter().map(|error| (error / unit).sqrt()).collect()),
        }
    }
}

/// The smallest and the largest cosine of two rows.
fn extreme_cosines(products: &Products) -> [f64; 2] {
    let mut found = [1.0, -1.0];
    for i in 0..products.len() {
        for j in 0..i {
            let norms = (products[i][i] * products[j][j]).sqrt().max(f64::MIN_POSITIVE);
            let cosine = products[i][j] / norms;
            found = [cosine.min(found[0]), cosine.max(found[1])];
        }
    }
    found
}

/// Places in the order of size; equal values share the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let place = |x: &f64| {
        let below = values.iter().filter(|y| *y < x).count();
        let equal = values.iter().filter(|y| *y == x).count();
        below as f64 + (equal as f64 - 1.0) / 2.0
    };
    values.iter().map(place).collect()
}

fn correlation(x: &[f64], y: &[f64]) -> f64 {
    let n = x.len() as f64;
    let mean = |values: &[f64]| values.iter().sum::<f64>() / n;
    let (mx, my) = (mean(x), mean(y));
    let both: f64 = x.iter().zip(y).map(|(x, y)| (x - mx) * (y - my)).sum();
    let square = |values: &[f64], mean: f64| values.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
    let norm = (square(x, mx) * square(y, my)).sqrt();
    if norm > 0.0 { both / norm } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::distribution::{MAX_SHRINKAGE, shrinkage};
    use super::*;
    use crate::linalg::cholesky::Cholesky;
    use gradtx_kernels::rng::Stream;

    const WIDTH: usize = 60;

    fn dot(x: &[f64], y: &[f64]) -> f64 {
        x.iter().zip(y).map(|(x, y)| x * y).sum()
    }

    fn products(rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
        rows.iter().map(|x| rows.iter().map(|y| dot(x, y)).collect()).collect()
    }

    /// Groups of three shadows around a point each in a space of eight directions, with noise in all;
    /// the teacher is a linear map of the student.
    fn world(random: &mut Stream, groups: usize, noise: f64) -> [Vec<Vec<f64>>; 2] {
        let direction = |random: &mut Stream| -> Vec<f64> { (0..WIDTH).map(|_| random.normal()).collect() };
        let directions: Vec<Vec<f64>> = (0..8).map(|_| direction(random)).collect();
        let (mut students, mut teachers) = (vec![], vec![]);
        for _ in 0..groups {
            let at: Vec<f64> = (0..8).map(|_| random.normal()).collect();
            for _ in 0..3 {
                let row: Vec<f64> = (0..WIDTH)
                    .map(|i| {
                        at.iter().zip(&directions).map(|(a, d)| a * d[i]).sum::<f64>()
                            + noise * random.normal()
                    })
                    .collect();
                teachers.push((0..WIDTH).map(|i| 2.0 * row[i] + row[(i + 7) % WIDTH]).collect());
                students.push(row);
            }
        }
        [students, teachers]
    }

    fn labels(groups: usize) -> Groups {
        Groups::new(&(0..3 * groups).map(|i| i / 3).collect::<Vec<_>>())
    }

    fn distance(
        students: &[Vec<f64>],
        groups: &Groups,
        client: &[f64],
        model: Option<&ErrorModel>,
    ) -> Distance {
        let own = products(students);
        let against: Vec<f64> = students.iter().map(|row| dot(row, client)).collect();
        Shadows::new(&own, groups).unwrap().distance(&against, dot(client, client), model).unwrap()
    }

    #[test]
    fn the_distance_is_that_of_the_shrunk_covariance() {
        let mut random = Stream::new(1);
        // More shadows than dimensions would need no span; here the span is all of three dimensions.
        let rows: Vec<Vec<f64>> = (0..4).map(|_| (0..3).map(|_| random.normal()).collect()).collect();
        let client: Vec<f64> = (0..3).map(|_| 2.0 * random.normal()).collect();
        let found = distance(&rows, &Groups::new(&[0, 1, 2, 3]), &client, None);
        let mean: Vec<f64> = (0..3).map(|i| rows.iter().map(|r| r[i]).sum::<f64>() / 4.0).collect();
        let centred: Vec<Vec<f64>> = rows.iter().map(|r| (0..3).map(|i| r[i] - mean[i]).collect()).collect();
        let mut covariance = vec![vec![0.0; 3]; 3];
        for row in &centred {
            (0..3).for_each(|i| (0..3).for_each(|j| covariance[i][j] += row[i] * row[j] / 4.0));
        }
        let s = (0..3).map(|i| covariance[i][i]).sum::<f64>() / 3.0;
        let own = products(&centred);
        let gamma = shrinkage(&own, (0..4).map(|i| own[i][i]).sum());
        // The same by its definition, with matrices.
        let outer = |row: &[f64]| -> f64 {
            (0..3).map(|i| (0..3).map(|j| (row[i] * row[j] - covariance[i][j]).powi(2)).sum::<f64>()).sum()
        };
        let noise = centred.iter().map(|row| outer(row)).sum::<f64>() / 16.0;
        let spread: f64 = (0..3)
            .map(|i| (0..3).map(|j| (covariance[i][j] - if i == j { s } else { 0.0 }).powi(2)).sum::<f64>())
            .sum();
        assert!((gamma - (noise / spread).min(MAX_SHRINKAGE)).abs() < 1e-9, "{gamma}");
        let shrunk: Vec<Vec<f64>> = (0..3)
            .map(|i| {
                (0..3)
                    .map(|j| (1.0 - gamma) * covariance[i][j] + if i == j { gamma * s } else { 0.0 })
                    .collect()
            })
            .collect();
        let far: Vec<f64> = (0..3).map(|i| client[i] - mean[i]).collect();
        let want = dot(&far, &Cholesky::of(&shrunk, &[0, 1, 2], 0.0).unwrap().solve(&far)) / 3.0;
        assert!((found.mahalanobis - want.sqrt()).abs() < 1e-6 * want.sqrt(), "{found:?} {want}");
        assert!(found.outside < 1e-6, "{found:?}");
    }

    #[test]
    fn what_no_shadow_has_is_outside_their_span() {
        let mut random = Stream::new(2);
        let [students, _] = world(&mut random, 6, 0.0);
        let mean: Vec<f64> =
            (0..WIDTH).map(|i| students.iter().map(|s| s[i]).sum::<f64>() / students.len() as f64).collect();
        let within: Vec<f64> = (0..WIDTH).map(|i| 0.4 * students[0][i] + 0.6 * students[9][i]).collect();
        let found = distance(&students, &labels(6), &within, None);
        assert!(found.outside < 1e-6, "{found:?}");
        // Orthogonal to all shadows, and as far from their mean as the part within.
        let mut other: Vec<f64> = (0..WIDTH).map(|_| random.normal()).collect();
        let mut basis: Vec<Vec<f64>> = vec![];
        for row in &students {
            let mut rest = row.clone();
            for b in &basis {
                let along = dot(&rest, b);
                rest.iter_mut().zip(b).for_each(|(x, b)| *x -= along * b);
            }
            let norm = dot(&rest, &rest).sqrt();
            if norm > 1e-6 {
                basis.push(rest.into_iter().map(|x| x / norm).collect());
            }
        }
        for b in &basis {
            let along = dot(&other, b);
            other.iter_mut().zip(b).for_each(|(x, b)| *x -= along * b);
        }
        let within_part: Vec<f64> = (0..WIDTH).map(|i| within[i] - mean[i]).collect();
        let scale = (dot(&within_part, &within_part) / dot(&other, &other)).sqrt();
        let half: Vec<f64> = (0..WIDTH).map(|i| within[i] + scale * other[i]).collect();
        let found_half = distance(&students, &labels(6), &half, None);
        assert!((found_half.outside - 0.5).abs() < 1e-4, "{found_half:?}");
        assert!((found_half.mahalanobis - found.mahalanobis).abs() < 1e-4 * found.mahalanobis);
    }

    #[test]
    fn shadows_of_a_new_task_are_within_the_warning_level() {
        let mut random = Stream::new(3);
        let [mut students, mut teachers] = world(&mut random, 21, 0.05);
        // The last group is a client that the shadows do not have.
        let client = students.split_off(60).remove(0);
        teachers.truncate(60);
        let groups = labels(20);
        let usual = Calibration::of(&products(&students), &products(&teachers), &groups).unwrap().unwrap();
        assert_eq!((usual.shadows, usual.groups), (60, 20));
        assert!(usual.error.errors.median < 0.3 && usual.error.factor > 1.0, "{usual:?}");
        let found = distance(&students, &groups, &client, Some(&usual.error));
        assert!(found.mahalanobis < 2.0 * usual.mahalanobis.warning, "{found:?} {usual:?}");
        assert!(found.outside < 2.0 * usual.outside.warning, "{found:?} {usual:?}");
        assert!(found.predicted_error.unwrap() < 2.0 * usual.error.errors.warning, "{found:?} {usual:?}");
        let noise: Vec<f64> = (0..WIDTH).map(|_| 3.0 * random.normal()).collect();
        let found = distance(&students, &groups, &noise, Some(&usual.error));
        assert!(found.outside > usual.outside.warning, "{found:?} {usual:?}");
        assert!(found.predicted_error.unwrap() > usual.error.errors.warning, "{found:?} {usual:?}");
        let far: Vec<f64> = client.iter().map(|x| 30.0 * x).collect();
        let found = distance(&students, &groups, &far, Some(&usual.error));
        assert!(found.mahalanobis > usual.mahalanobis.warning, "{found:?} {usual:?}");
    }

    #[test]
    fn few_groups_and_equal_shadows_calibrate_nothing() {
        let mut random = Stream::new(4);
        let [students, teachers] = world(&mut random, 3, 0.1);
        assert_eq!(Calibration::of(&products(&students), &products(&teachers), &labels(3)).unwrap(), None);
        let same = vec![vec![1.0, 2.0]; 12];
        let error = Calibration::of(&products(&same), &products(&same), &labels(4)).unwrap_err();
        assert!(error.to_string().contains("the same"), "{error}");
    }

    #[test]
    fn ranks_are_shared_by_equal_values() {
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 9.0]), [1.5, 0.0, 1.5, 3.0]);
        assert!((correlation(&ranks(&[1.0, 5.0, 2.0]), &ranks(&[10.0, 99.0, 11.0])) - 1.0).abs() < 1e-12);
        assert_eq!(correlation(&[1.0, 1.0], &[1.0, 2.0]), 0.0);
    }
}
