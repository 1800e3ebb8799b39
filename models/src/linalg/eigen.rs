//! Eigenvalues of symmetric matrices.
//!
//! Householder reflections make the matrix tridiagonal, the implicit QL method with Wilkinson's
//! shifts makes that diagonal (Golub and Van Loan, *Matrix Computations*, section 8.3).

use super::qr::{reflect, reflection};
use super::{axpy, dot};
use gradtx_runtime::{Error, Result};

/// QL steps for one eigenvalue at most; two are usual.
const MAX_STEPS: usize = 60;

/// All eigenvalues and eigenvectors.
#[derive(Clone, Debug)]
pub struct SymmetricEigen {
    /// From the largest to the smallest.
    pub values: Vec<f64>,
    /// Eigenvector i belongs to value i; unit length, its largest coordinate (the first of equals) is
    /// positive.
    pub vectors: Vec<Vec<f64>>,
}

impl SymmetricEigen {
    /// The `count` largest eigenvalues of a symmetric matrix `[n, n]`, row-major, and their vectors.
    ///
    /// # Errors
    /// When the iteration does not converge: the matrix has values that are no numbers.
    pub fn largest(n: usize, matrix: Vec<f64>, count: usize) -> Result<Self> {
        let Tridiagonal { mut diagonal, mut off, reflections } = Tridiagonal::new(n, matrix);
        let mut z = identity(n);
        diagonalise(&mut diagonal, &mut off, &mut z)?;
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&i, &j| diagonal[j].total_cmp(&diagonal[i]).then(i.cmp(&j)));
        order.truncate(count);
        let vector = |&i: &usize| {
            let mut vector = std::mem::take(&mut z[i]);
            for (k, v) in reflections.iter().enumerate().rev() {
                reflect(v, &mut vector[k + 1..]);
            }
            with_sign(vector)
        };
        Ok(Self {
            values: order.iter().map(|&i| diagonal[i]).collect(),
            vectors: order.iter().map(vector).collect(),
        })
    }
}

fn identity(n: usize) -> Vec<Vec<f64>> {
    let row = |i: usize| {
        let mut row = vec![0.0; n];
        row[i] = 1.0;
        row
    };
    (0..n).map(row).collect()
}

fn with_sign(mut vector: Vec<f64>) -> Vec<f64> {
    let largest = vector.iter().fold(0.0f64, |most, &x| if x.abs() > most.abs() { x } else { most });
    if largest < 0.0 {
        vector.iter_mut().for_each(|x| *x = -*x);
    }
    vector
}

/// `H T Hᵀ` with T tridiagonal and H a product of reflections.
struct Tridiagonal {
    /// `[n]`
    diagonal: Vec<f64>,
    /// Beside the diagonal: `[n]`, the last is 0.
    off: Vec<f64>,
    /// Reflection k works on the coordinates from k + 1 on.
    reflections: Vec<Vec<f64>>,
}

impl Tridiagonal {
    fn new(n: usize, mut s: Vec<f64>) -> Self {
        let mut reflections = vec![];
        for k in 0..n.saturating_sub(2) {
            let column: Vec<f64> = (k + 1..n).map(|i| s[i * n + k]).collect();
            let v = reflection(&column);
            // (I − v vᵀ) S (I − v vᵀ) = S − v wᵀ − w vᵀ, with w = S v − ½ (vᵀ S v) v.
            let mut w: Vec<f64> = (k + 1..n).map(|i| dot(&s[i * n + k + 1..(i + 1) * n], &v)).collect();
            let half = 0.5 * dot(&w, &v);
            axpy(&mut w, -half, &v);
            let mut column = column;
            reflect(&v, &mut column);
            for (i, row) in s.chunks_mut(n).enumerate().skip(k + 1) {
                axpy(&mut row[k + 1..], -v[i - k - 1], &w);
                axpy(&mut row[k + 1..], -w[i - k - 1], &v);
            }
            s[(k + 1) * n + k] = column[0];
            reflections.push(v);
        }
        let diagonal = (0..n).map(|i| s[i * n + i]).collect();
        let off = (0..n).map(|i| if i + 1 < n { s[(i + 1) * n + i] } else { 0.0 }).collect();
        Self { diagonal, off, reflections }
    }
}

/// Turns a tridiagonal matrix into the diagonal one of its eigenvalues; the rows of `z` get the same
/// rotations, and become the eigenvectors where they were the identity.
fn diagonalise(d: &mut [f64], e: &mut [f64], z: &mut [Vec<f64>]) -> Result<()> {
    let n = d.len();
    // Against the norm of the matrix: what is smaller is rounding.
    let norm = d.iter().chain(&*e).fold(0.0f64, |most, x| most.max(x.abs()));
    let negligible = f64::EPSILON * norm;
    for l in 0..n {
        let mut steps = 0;
        loop {
            let m = (l..n - 1).find(|&m| e[m].abs() <= negligible).unwrap_or(n - 1);
            if m == l {
                break;
            }
            steps += 1;
            if steps > MAX_STEPS || !norm.is_finite() {
                return Err(Error::invalid("eigenvalues of a symmetric matrix", "they do not converge"));
            }
            ql_step(d, e, z, l, m);
        }
    }
    Ok(())
}

/// One implicit QL step on the rows l to m.
fn ql_step(d: &mut [f64], e: &mut [f64], z: &mut [Vec<f64>], l: usize, m: usize) {
    let g = (d[l + 1] - d[l]) / (2.0 * e[l]);
    let mut g = d[m] - d[l] + e[l] / (g + length(g, 1.0).copysign(g));
    let (mut sin, mut cos, mut p) = (1.0, 1.0, 0.0);
    for i in (l..m).rev() {
        let (f, b) = (sin * e[i], cos * e[i]);
        let r = length(f, g);
        e[i + 1] = r;
        if r == 0.0 {
            // The matrix falls into two parts here.
            d[i + 1] -= p;
            e[m] = 0.0;
            return;
        }
        (sin, cos) = (f / r, g / r);
        g = d[i + 1] - p;
        let t = (d[i] - g) * sin + 2.0 * cos * b;
        p = sin * t;
        d[i + 1] = g + p;
        g = cos * t - b;
        let (low, high) = z.split_at_mut(i + 1);
        for (x, y) in low[i].iter_mut().zip(&mut high[0]) {
            (*x, *y) = (cos * *x - sin * *y, sin * *x + cos * *y);
        }
    }
    d[l] -= p;
    e[l] = g;
    e[m] = 0.0;
}

/// `√(a² + b²)` without overflow. The C library's differs in its last bits from
/// version to version.
fn length(a: f64, b: f64) -> f64 {
    let most = a.abs().max(b.abs());
    if most == 0.0 { 0.0 } else { most * ((a / most).powi(2) + (b / most).powi(2)).sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::rng::Stream;

    fn product(n: usize, matrix: &[f64], x: &[f64]) -> Vec<f64> {
        matrix.chunks(n).map(|row| dot(row, x)).collect()
    }

    /// `F Fᵀ` of a random factor of this many columns: of that rank.
    fn gram(n: usize, columns: usize) -> Vec<f64> {
        let mut random = Stream::new((n + 100 * columns) as u64);
        let f: Vec<Vec<f64>> = (0..n).map(|_| (0..columns).map(|_| random.normal()).collect()).collect();
        f.iter().flat_map(|a| f.iter().map(|b| dot(a, b)).collect::<Vec<_>>()).collect()
    }

    #[test]
    fn eigenvectors_are_those_of_the_matrix() {
        for (n, columns) in [(1, 1), (2, 2), (3, 1), (12, 12), (40, 7), (40, 40)] {
            let matrix = gram(n, columns);
            let found = SymmetricEigen::largest(n, matrix.clone(), n).unwrap();
            let scale = found.values[0];
            assert!(found.values.windows(2).all(|pair| pair[0] >= pair[1]), "largest first");
            assert!(
                found.values[columns.min(n - 1)..]
                    .iter()
                    .skip(usize::from(columns >= n))
                    .all(|x| x.abs() < 1e-12 * scale)
            );
            for (i, (value, vector)) in found.values.iter().zip(&found.vectors).enumerate() {
                let wanted = product(n, &matrix, vector);
                let far = wanted.iter().zip(vector).map(|(a, b)| (a - value * b).abs()).fold(0.0, f64::max);
                assert!(far < 1e-12 * scale, "{n} {columns}: vector {i} is {far:e} off");
                for (j, other) in found.vectors.iter().enumerate() {
                    let want = f64::from(u8::from(i == j));
                    assert!((dot(vector, other) - want).abs() < 1e-12);
                }
            }
            let trace: f64 = (0..n).map(|i| matrix[i * n + i]).sum();
            assert!((found.values.iter().sum::<f64>() - trace).abs() < 1e-11 * trace);
        }
    }

    #[test]
    fn matrices_of_nothing_and_of_no_numbers() {
        let found = SymmetricEigen::largest(3, vec![0.0; 9], 2).unwrap();
        assert_eq!(found.values, [0.0, 0.0]);
        assert!(SymmetricEigen::largest(3, vec![f64::NAN; 9], 2).is_err());
        let found = SymmetricEigen::largest(2, vec![2.0, 0.0, 0.0, 5.0], 1).unwrap();
        assert_eq!((found.values, found.vectors), (vec![5.0], vec![vec![0.0, 1.0]]));
    }
}
