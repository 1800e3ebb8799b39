//! Singular value decomposition.
//!
//! Eigenvectors of the smaller of W Wᵀ and Wᵀ W make the rows of Q W all but orthogonal; one-sided Jacobi rotations
//! (Hestenes; Golub and Van Loan, *Matrix Computations*, section 8.6) finish that, which keeps small singular values
//! as accurate as large ones. One thread does it in one order.

use super::{SymmetricEigen, dot};
use gradtx_runtime::{Error, Result};

/// Sweeps over all pairs at most; after the eigenvectors two are usual.
const MAX_SWEEPS: usize = 40;
/// Largest cosine between two rows that are taken for orthogonal.
const ORTHOGONAL: f64 = 1e-12;
/// Singular values below this share of the largest are rounding.
const NEGLIGIBLE: f64 = 1e-12;

/// `W = Σ_k σ_k u_k v_kᵀ`.
#[derive(Clone, Debug)]
pub struct Svd {
    /// σ, from the largest to the smallest; those that are zero up to rounding are left out.
    pub values: Vec<f64>,
    /// u, unit length.
    pub left: Vec<Vec<f64>>,
    /// v, unit length; its largest coordinate (the first of equals) is positive.
    pub right: Vec<Vec<f64>>,
}

impl Svd {
    /// Of a matrix `[rows, cols]`, row-major.
    ///
    /// # Errors
    /// When values are not finite, or the iteration does not converge.
    pub fn new(rows: usize, cols: usize, matrix: &[f64]) -> Result<Self> {
        if matrix.len() != rows * cols || matrix.iter().any(|x| !x.is_finite()) {
            return Err(Error::invalid(
                "matrix to be decomposed",
                "it has values that are not finite, or too few",
            ));
        }
        let is_wide = rows <= cols;
        let vectors: Vec<Vec<f64>> = match is_wide {
            true => matrix.chunks(cols.max(1)).map(<[f64]>::to_vec).collect(),
            false => (0..cols).map(|j| matrix.iter().skip(j).step_by(cols).copied().collect()).collect(),
        };
        let (mut b, mut q) = rotated(&vectors)?;
        jacobi(&mut b, &mut q)?;
        let norms: Vec<f64> = b.iter().map(|row| dot(row, row).sqrt()).collect();
        let largest = norms.iter().fold(0.0f64, |most, &x| most.max(x));
        let mut order: Vec<usize> = (0..norms.len()).filter(|&k| norms[k] > NEGLIGIBLE * largest).collect();
        order.sort_by(|&i, &j| norms[j].total_cmp(&norms[i]).then(i.cmp(&j)));
        let mut svd = Self { values: vec![], left: vec![], right: vec![] };
        for k in order {
            let long: Vec<f64> = b[k].iter().map(|x| x / norms[k]).collect();
            let short = std::mem::take(&mut q[k]);
            let (mut left, mut right) = if is_wide { (short, long) } else { (long, short) };
            let largest = right.iter().fold(0.0f64, |most, &x| if x.abs() > most.abs() { x } else { most });
            if largest < 0.0 {
                left.iter_mut().chain(&mut right).for_each(|x| *x = -*x);
            }
            svd.values.push(norms[k]);
            svd.left.push(left);
            svd.right.push(right);
        }
        Ok(svd)
    }
}

/// `Q W` and Q, by rows, where Q has the eigenvectors of W Wᵀ for rows.
fn rotated(vectors: &[Vec<f64>]) -> Result<(Vec<Vec<f64>>, Vec<Vec<f64>>)> {
    let n = vectors.len();
    let mut square = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            let value = dot(&vectors[i], &vectors[j]);
            (square[i * n + j], square[j * n + i]) = (value, value);
        }
    }
    let q = SymmetricEigen::largest(n, square, n)?.vectors;
    let length = vectors.first().map_or(0, Vec::len);
    let combined = |weights: &Vec<f64>| {
        let mut sum = vec![0.0; length];
        for (weight, vector) in weights.iter().zip(vectors) {
            super::axpy(&mut sum, *weight, vector);
        }
        sum
    };
    Ok((q.iter().map(combined).collect(), q))
}

/// Rotates pairs of rows of `b`, and those of `q` alike, until all are orthogonal.
fn jacobi(b: &mut [Vec<f64>], q: &mut [Vec<f64>]) -> Result<()> {
    let total: f64 = b.iter().map(|row| dot(row, row)).sum();
    for _ in 0..MAX_SWEEPS {
        let mut is_done = true;
        for i in 1..b.len() {
            for j in 0..i {
                let (alpha, beta, gamma) = (dot(&b[j], &b[j]), dot(&b[i], &b[i]), dot(&b[j], &b[i]));
                let is_zero = alpha.min(beta) <= NEGLIGIBLE * NEGLIGIBLE * total;
                if is_zero || gamma.abs() <= ORTHOGONAL * (alpha * beta).sqrt() {
                    continue;
                }
                is_done = false;
                let zeta = (beta - alpha) / (2.0 * gamma);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let c = 1.0 / (1.0 + t * t).sqrt();
                for rows in [&mut *b, &mut *q] {
                    let (before, from) = rows.split_at_mut(i);
                    for (x, y) in before[j].iter_mut().zip(&mut from[0]) {
                        (*x, *y) = (c * (*x - t * *y), c * (*y + t * *x));
                    }
                }
            }
        }
        if is_done {
            return Ok(());
        }
    }
    Err(Error::invalid("singular value decomposition", format!("no convergence in {MAX_SWEEPS} sweeps")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::rng::Stream;

    fn random(rows: usize, cols: usize, key: u64) -> Vec<f64> {
        let mut stream = Stream::new(key);
        (0..rows * cols).map(|_| stream.normal()).collect()
    }

    fn product(svd: &Svd, rows: usize, cols: usize) -> Vec<f64> {
        let mut sum = vec![0.0; rows * cols];
        for ((value, u), v) in svd.values.iter().zip(&svd.left).zip(&svd.right) {
            for i in 0..rows {
                super::super::axpy(&mut sum[i * cols..][..cols], value * u[i], v);
            }
        }
        sum
    }

    /// Fails unless the factors give the matrix, are orthonormal, and their values fall.
    fn check(rows: usize, cols: usize, matrix: &[f64], rank: usize) {
        let svd = Svd::new(rows, cols, matrix).unwrap();
        assert_eq!(svd.values.len(), rank, "{rows} × {cols}");
        let norm = dot(matrix, matrix).sqrt().max(1e-300);
        let found = product(&svd, rows, cols);
        let error: f64 = matrix.iter().zip(&found).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
        assert!(error <= 1e-11 * norm, "{rows} × {cols}: {error:e}");
        for side in [&svd.left, &svd.right] {
            for i in 0..rank {
                for j in 0..=i {
                    let want = f64::from(u8::from(i == j));
                    let found = dot(&side[i], &side[j]);
                    assert!((found - want).abs() <= 1e-10, "{rows} × {cols}, {i} and {j}: {found}");
                }
            }
        }
        assert!(svd.values.windows(2).all(|pair| pair[0] >= pair[1]));
    }

    #[test]
    fn factors_are_orthonormal_and_give_the_matrix() {
        for (rows, cols) in [(7, 7), (5, 13), (13, 5), (1, 9), (9, 1), (40, 33)] {
            check(rows, cols, &random(rows, cols, (rows * cols) as u64), rows.min(cols));
        }
        // One that is wrong is found.
        let svd = Svd::new(5, 7, &random(5, 7, 1)).unwrap();
        let mut broken = svd.clone();
        broken.values[1] *= 1.0 + 1e-6;
        let far = |svd: &Svd| {
            let found = product(svd, 5, 7);
            random(5, 7, 1).iter().zip(&found).map(|(a, b)| (a - b).abs()).sum::<f64>()
        };
        assert!(far(&svd) < 1e-11 && far(&broken) > 1e-7);
    }

    #[test]
    fn what_is_missing_repeated_or_small_is_no_trouble() {
        // Rank 3 of 8 × 6.
        let (a, b) = (random(8, 3, 2), random(3, 6, 3));
        let low: Vec<f64> =
            (0..48).map(|at| (0..3).map(|k| a[at / 6 * 3 + k] * b[k * 6 + at % 6]).sum()).collect();
        check(8, 6, &low, 3);
        check(4, 6, &[0.0; 24], 0);
        // All values are equal.
        let mut identity = vec![0.0; 36];
        (0..6).for_each(|i| identity[i * 7] = 2.5);
        check(6, 6, &identity, 6);
        // Values from 1 to 1e-9: the eigenvalues of the square are below its rounding.
        let (u, v) = (random(6, 6, 4), random(6, 6, 5));
        let [u, v] = [u, v].map(|m| Svd::new(6, 6, &m).unwrap().left);
        let want: Vec<f64> = (0..6).map(|k| 10f64.powf(-1.8 * k as f64)).collect();
        let graded = product(&Svd { values: want.clone(), left: u, right: v }, 6, 6);
        let found = Svd::new(6, 6, &graded).unwrap().values;
        for (found, want) in found.iter().zip(&want) {
            assert!((found - want).abs() <= 1e-6 * want + 1e-15, "{found:e}, expected {want:e}");
        }
        check(6, 6, &graded, 6);
        assert!(Svd::new(2, 2, &[1.0, f64::NAN, 0.0, 1.0]).is_err());
    }

    #[test]
    fn signs_are_fixed() {
        let matrix = random(6, 9, 7);
        let turned: Vec<f64> = matrix.iter().map(|x| -x).collect();
        let [a, b] = [matrix, turned].map(|m| Svd::new(6, 9, &m).unwrap());
        assert_eq!(a.right, b.right);
        assert!(a.left.iter().flatten().zip(b.left.iter().flatten()).all(|(x, y)| *x == -y));
    }
}
