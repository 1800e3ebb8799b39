//! [`Cholesky`]: the factor of a positive definite matrix, to solve with.

use anyhow::{Result, ensure};

/// Lower triangle of a positive definite matrix's Cholesky factor.
pub struct Cholesky {
    rows: Vec<Vec<f64>>,
}

impl Cholesky {
    /// Of the part of `matrix` with these indices, plus `penalty` on its diagonal.
    pub fn of(matrix: &[Vec<f64>], indices: &[usize], penalty: f64) -> Result<Self> {
        let mut rows: Vec<Vec<f64>> = Vec::with_capacity(indices.len());
        for (i, &from) in indices.iter().enumerate() {
            let mut row: Vec<f64> = Vec::with_capacity(i + 1);
            for (j, &to) in indices[..i].iter().enumerate() {
                let sum: f64 = row.iter().zip(&rows[j]).map(|(x, y)| x * y).sum();
                row.push((matrix[from][to] - sum) / rows[j][j]);
            }
            let rest = matrix[from][from] + penalty - row.iter().map(|x| x * x).sum::<f64>();
            ensure!(rest > 0.0, "the products of the TinyLM's shadow updates are not positive definite");
            row.push(rest.sqrt());
            rows.push(row);
        }
        Ok(Self { rows })
    }

    /// The solution x of A x = `right`.
    pub(crate) fn solve(&self, right: &[f64]) -> Vec<f64> {
        let n = self.rows.len();
        let mut x = right.to_vec();
        for i in 0..n {
            let sum: f64 = self.rows[i][..i].iter().zip(&x).map(|(l, x)| l * x).sum();
            x[i] = (x[i] - sum) / self.rows[i][i];
        }
        for i in (0..n).rev() {
            let sum: f64 = (i + 1..n).map(|j| self.rows[j][i] * x[j]).sum();
            x[i] = (x[i] - sum) / self.rows[i][i];
        }
        x
    }
}
