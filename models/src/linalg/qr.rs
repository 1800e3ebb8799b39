//! QR decomposition.

use super::{axpy, dot};

/// `M = Q R` of a matrix `[rows, cols]`: Q `[rows, ρ]` with orthonormal columns, R `[ρ, cols]` with
/// zeros below its diagonal, ρ the smaller of rows and cols. Q is held as reflections.
#[derive(Clone, Debug)]
pub struct Qr {
    rows: usize,
    cols: usize,
    /// Reflection j is `I − v vᵀ` on the coordinates from j on; `v·v` is 2, or 0 where the column had
    /// nothing left.
    reflections: Vec<Vec<f64>>,
    /// `[ρ, cols]`
    r: Vec<f64>,
}

impl Qr {
    /// Of a matrix given by its columns, each of `rows` values.
    pub fn new(rows: usize, mut columns: Vec<Vec<f64>>) -> Self {
        let (cols, rank) = (columns.len(), rows.min(columns.len()));
        let mut reflections = Vec::with_capacity(rank);
        for j in 0..rank {
            let v = reflection(&columns[j][j..]);
            for column in &mut columns[j..] {
                reflect(&v, &mut column[j..]);
            }
            reflections.push(v);
        }
        let mut r = vec![0.0; rank * cols];
        for (j, column) in columns.iter().enumerate() {
            for (i, &value) in column.iter().enumerate().take(rank.min(j + 1)) {
                r[i * cols + j] = value;
            }
        }
        Self { rows, cols, reflections, r }
    }

    /// ρ, the number of columns of Q.
    pub fn rank(&self) -> usize {
        self.reflections.len()
    }

    /// R `[ρ, cols]`, row-major.
    pub fn r(&self) -> &[f64] {
        &self.r
    }

    /// Columns of the matrix.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// `Q x` `[rows]` of a vector x `[ρ]`.
    pub fn apply(&self, x: &[f64]) -> Vec<f64> {
        let mut y = vec![0.0; self.rows];
        y[..x.len()].copy_from_slice(x);
        for (j, v) in self.reflections.iter().enumerate().rev() {
            reflect(v, &mut y[j..]);
        }
        y
    }
}

/// The reflection that leaves only the first coordinate of x.
pub(super) fn reflection(x: &[f64]) -> Vec<f64> {
    let mut v = x.to_vec();
    // Scaled, so that squares of very large or small values stay numbers.
    let largest = x.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
    if largest == 0.0 {
        return v;
    }
    v.iter_mut().for_each(|value| *value /= largest);
    let norm = dot(&v, &v).sqrt();
    v[0] += norm.copysign(v[0]);
    let scale = (2.0 / dot(&v, &v)).sqrt();
    v.iter_mut().for_each(|value| *value *= scale);
    v
}

/// `x ← x − v (v·x)`.
pub(super) fn reflect(v: &[f64], x: &mut [f64]) {
    axpy(x, -dot(v, x), v);
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::rng::Stream;

    #[test]
    fn q_times_r_is_the_matrix_and_q_is_orthonormal() {
        for (rows, cols) in [(7, 4), (4, 7), (5, 5), (1, 3), (6, 1)] {
            let mut random = Stream::new(rows as u64);
            let mut columns: Vec<Vec<f64>> =
                (0..cols).map(|_| (0..rows).map(|_| random.normal()).collect()).collect();
            // A column that depends on another, and one of nothing.
            if cols > 3 {
                columns[2] = columns[0].iter().map(|x| -3.0 * x).collect();
                columns[3] = vec![0.0; rows];
            }
            let qr = Qr::new(rows, columns.clone());
            assert_eq!((qr.rank(), qr.cols()), (rows.min(cols), cols));
            for (j, column) in columns.iter().enumerate() {
                let r: Vec<f64> = (0..qr.rank()).map(|i| qr.r()[i * cols + j]).collect();
                assert!((j + 1..qr.rank()).all(|i| r[i] == 0.0), "R is upper triangular");
                let found = qr.apply(&r);
                assert!(found.iter().zip(column).all(|(a, b)| (a - b).abs() < 1e-12), "{rows} {cols}");
            }
            let unit = |i: usize| (0..qr.rank()).map(|j| f64::from(u8::from(i == j))).collect::<Vec<_>>();
            for i in 0..qr.rank() {
                for j in 0..qr.rank() {
                    let product = dot(&qr.apply(&unit(i)), &qr.apply(&unit(j)));
                    assert!((product - f64::from(u8::from(i == j))).abs() < 1e-12);
                }
            }
        }
    }
}
