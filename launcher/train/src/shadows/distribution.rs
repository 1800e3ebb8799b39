//! How shadow updates are distributed, and how far another update is from them, by inner products alone.

use crate::linalg::cholesky::Cholesky;
use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Eigenvalues below this part of the mean are outside the span: rounding is of that size.
const NULL: f64 = 1e-9;
/// The shrinkage at most: with all of it, nothing of the shadows' distribution is left.
pub(super) const MAX_SHRINKAGE: f64 = 0.999;

/// Inner products of something with each other, `[n, n]`.
pub(super) type Products = [Vec<f64>];

/// How far an update is from the shadow updates.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Distance {
    /// Mahalanobis distance in the span of the shadows, by the root of its dimension.
    pub mahalanobis: f64,
    /// Share of the squared distance from the shadows' mean that is outside their span, from 0 to 1.
    pub outside: f64,
    /// Predicted error of the translation, where the shadows say something about it: 1 is that of the
    /// mean of the LLM's shadow updates for a shadow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_error: Option<f64>,
}

/// Mean, span and shrunk covariance of some shadows.
pub(super) struct Distribution {
    members: Vec<usize>,
    /// Mean inner product of each member with the members.
    means: Vec<f64>,
    mean: f64,
    /// Of G, for the projection.
    span: Cholesky,
    /// Of G + λ I.
    shrunk: Cholesky,
    shrinkage: f64,
}

impl Distribution {
    pub(super) fn new(products: &Products, members: Vec<usize>) -> Result<Self> {
        let n = members.len();
        ensure!(n > 2, "there are {n} shadow updates: a distribution needs three");
        let mean_of = |i: &usize| members.iter().map(|&j| products[*i][j]).sum::<f64>() / n as f64;
        let means: Vec<f64> = members.iter().map(mean_of).collect();
        let mean = means.iter().sum::<f64>() / n as f64;
        let row = |(&i, of_i): (&usize, &f64)| -> Vec<f64> {
            members.iter().zip(&means).map(|(&j, of_j)| products[i][j] - of_i - of_j + mean).collect()
        };
        let centred: Vec<Vec<f64>> = members.iter().zip(&means).map(row).collect();
        let trace: f64 = (0..n).map(|i| centred[i][i]).sum();
        let largest = means.iter().fold(0.0f64, |most, m| most.max(m.abs()));
        ensure!(trace > 1e-12 * n as f64 * largest, "all shadow updates of the TinyLM are the same");
        let shrinkage = shrinkage(&centred, trace);
        let all: Vec<usize> = (0..n).collect();
        let ridge = shrinkage / (1.0 - shrinkage) * trace / (n - 1) as f64;
        let span = Cholesky::of(&centred, &all, NULL * trace / n as f64)?;
        let shrunk = Cholesky::of(&centred, &all, ridge.max(NULL * trace / n as f64))?;
        Ok(Self { members, means, mean, span, shrunk, shrinkage })
    }

    /// Of an update with these inner products with all shadows, and with itself.
    pub(super) fn distance(&self, products: &Products, against: &[f64], square: f64) -> Distance {
        debug_assert_eq!(products.len(), against.len());
        let n = self.members.len() as f64;
        let mean = self.members.iter().map(|&i| against[i]).sum::<f64>() / n;
        let own: Vec<f64> = self
            .members
            .iter()
            .zip(&self.means)
            .map(|(&i, of_i)| against[i] - mean - of_i + self.mean)
            .collect();
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        let inside = self.span.solve(&own);
        let from_mean = (square - 2.0 * mean + self.mean).max(0.0);
        let scaled = n / (1.0 - self.shrinkage) * dot(&own, &self.shrunk.solve(&inside));
        let outside = if from_mean > 0.0 { 1.0 - dot(&own, &inside) / from_mean } else { 0.0 };
        Distance {
            mahalanobis: (scaled.max(0.0) / (n - 1.0)).sqrt(),
            outside: outside.clamp(0.0, 1.0),
            predicted_error: None,
        }
    }
}

/// γ of Ledoit and Wolf within the span, from the inner products of centred rows.
pub(super) fn shrinkage(centred: &Products, trace: f64) -> f64 {
    let n = centred.len() as f64;
    let square = centred.iter().flatten().map(|x| x * x).sum::<f64>() / (n * n);
    let fourth = (0..centred.len()).map(|i| centred[i][i].powi(2)).sum::<f64>();
    let spread = square - (trace / n).powi(2) / (n - 1.0);
    let noise = (fourth - n * square) / (n * n);
    if spread > 0.0 { (noise / spread).clamp(0.0, MAX_SHRINKAGE) } else { MAX_SHRINKAGE }
}
