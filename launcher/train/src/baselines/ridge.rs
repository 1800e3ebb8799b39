//! Linear regression with a penalty, in its dual form, for there are far fewer pairs than
//! coordinates.

use super::baseline::{About, Baseline, Kind, Pairs};
use crate::linalg::cholesky::Cholesky;
use crate::linalg::gram::{COLUMNS, Gram};
use anyhow::{Result, ensure};
use rayon::prelude::*;

/// Ridge regression from the TinyLM's to the LLM's updates.
pub struct Ridge;

impl Baseline for Ridge {
    fn about(&self) -> &'static About {
        &About {
            name: "ridge",
            help: "Ridge regression from the TinyLM's to the LLM's updates",
            label: "ridge regression",
            kind: Kind::Rival,
            called: "ridge regression",
            what: "Ridge regression from the TinyLM's to the LLM's updates",
            as_good: "A linear map is enough here: this does not show that translation takes a transformer.",
            worse: "a linear map is not enough",
        }
    }

    /// A regression holds all of its tuples in memory, and the tuples of one subset are near
    /// duplicates.
    fn snapshots(&self) -> Option<usize> {
        Some(2)
    }

    fn translate(&self, pairs: &dyn Pairs, client: &[f32]) -> Result<Vec<f32>> {
        ridge(pairs, client)
    }
}

/// Penalties that are tried, as multiples of the mean squared norm of a student.
const PENALTIES: [f64; 10] = [1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0];
/// Folds of the cross-validation that chooses among them; a subset is in one fold.
const FOLDS: usize = 5;

/// Ridge regression; the penalty is the one with the smallest error on left-out subsets.
fn ridge(pairs: &dyn Pairs, client: &[f32]) -> Result<Vec<f32>> {
    let count = pairs.count();
    ensure!(count > 1, "ridge regression needs at least two shadow pairs, found {count}");
    let students = centered((0..count).map(|i| pairs.student(i)).collect::<Result<_>>()?);
    let teachers = centered((0..count).map(|i| pairs.teacher(i)).collect::<Result<_>>()?);
    ensure!(
        students.center.len() == client.len(),
        "the update has {} values, the TinyLM's shadow updates have {}",
        client.len(),
        students.center.len()
    );
    let mut kernel = gram(&students.rows);
    let scale = (0..count).map(|i| kernel[i][i]).sum::<f64>() / count as f64;
    ensure!(scale > 0.0, "all shadow updates of the TinyLM are the same: there is nothing to regress on");
    kernel.iter_mut().flatten().for_each(|x| *x /= scale);
    let penalty = best_penalty(pairs, &kernel, &gram(&teachers.rows))?;

    let difference: Vec<f32> = client.iter().zip(&students.center).map(|(c, m)| c - m).collect();
    let against: Vec<f64> = students.rows.iter().map(|row| dot(row, &difference) / scale).collect();
    let all: Vec<usize> = (0..count).collect();
    let weights = Cholesky::of(&kernel, &all, penalty)?.solve(&against);
    let mut out: Vec<f64> = teachers.center.iter().map(|&m| m as f64).collect();
    for (row, weight) in teachers.rows.iter().zip(&weights) {
        out.iter_mut().zip(row).for_each(|(o, &y)| *o += weight * y as f64);
    }
    Ok(out.into_iter().map(|x| x as f32).collect())
}

/// The error on left-out pairs needs teachers only through their products G: with
/// M = K_ba (K_aa + λ)⁻¹ it is tr(M G_aa Mᵀ) − 2 tr(M G_ab) + tr(G_bb).
fn best_penalty(pairs: &dyn Pairs, kernel: &[Vec<f64>], products: &[Vec<f64>]) -> Result<f64> {
    let error = |&penalty: &f64| -> Result<f64> {
        let mut error = 0.0;
        for fold in 0..FOLDS {
            let (b, a): (Vec<usize>, Vec<usize>) =
                (0..kernel.len()).partition(|&i| pairs.subset(i) % FOLDS == fold);
            if a.is_empty() {
                continue;
            }
            let factor = Cholesky::of(kernel, &a, penalty)?;
            for &i in &b {
                let m = factor.solve(&a.iter().map(|&j| kernel[i][j]).collect::<Vec<_>>());
                error += products[i][i];
                for (x, &j) in m.iter().zip(&a) {
                    let inner: f64 = m.iter().zip(&a).map(|(y, &k)| y * products[j][k]).sum();
                    error += x * (inner - 2.0 * products[i][j]);
                }
            }
        }
        Ok(error)
    };
    let errors = PENALTIES.par_iter().map(error).collect::<Result<Vec<f64>>>()?;
    let best = (0..errors.len()).reduce(|best, i| if errors[i] < errors[best] { i } else { best });
    Ok(PENALTIES[best.expect("there are penalties to try")])
}

struct Centered {
    center: Vec<f32>,
    rows: Vec<Vec<f32>>,
}

fn centered(mut rows: Vec<Vec<f32>>) -> Centered {
    let mut sum = vec![0.0f64; rows[0].len()];
    rows.iter().for_each(|row| sum.iter_mut().zip(row).for_each(|(s, &x)| *s += x as f64));
    let center: Vec<f32> = sum.iter().map(|s| (s / rows.len() as f64) as f32).collect();
    rows.par_iter_mut().for_each(|row| row.iter_mut().zip(&center).for_each(|(x, m)| *x -= m));
    Centered { center, rows }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&x, &y)| x as f64 * y as f64).sum()
}

fn gram(rows: &[Vec<f32>]) -> Vec<Vec<f64>> {
    let width = rows.first().map_or(0, Vec::len);
    let mut gram = Gram::new(rows.len());
    for first in (0..width).step_by(COLUMNS) {
        let last = width.min(first + COLUMNS);
        let columns: Vec<f64> =
            rows.iter().flat_map(|row| row[first..last].iter().map(|&x| f64::from(x))).collect();
        gram.add(&columns, last - first);
    }
    gram.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baselines::baseline::tests::linear_world;
    use crate::baselines::mean::Mean;

    #[test]
    fn ridge_finds_a_linear_rule_and_the_mean_does_not() {
        let (pairs, rule) = linear_world();
        let client = [0.7, -1.3, 0.4];
        let wanted = rule(&client);
        let distance =
            |found: Vec<f32>| -> f32 { found.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).sum() };
        assert!(distance(ridge(&pairs, &client).unwrap()) < 0.02);
        assert!(distance(Mean.translate(&pairs, &client).unwrap()) > 0.5);
    }
}
