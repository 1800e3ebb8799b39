//! Dense linear algebra of moderate sizes in f64, on the host.
//!
//! In: matrices of some hundred to some thousand rows. Out: their factors. Every sum is taken in
//! a fixed order by one thread, so results do not depend on the number of threads: callers share
//! out matrices, not rows. The matrices here have at most a few thousand columns, and there are
//! three factorisations to be had; a library would bring hundreds.
//!
//! * [`Qr`]: thin QR decomposition by Householder reflections.
//! * [`SymmetricEigen`]: all eigenvalues and eigenvectors of a symmetric matrix.
//! * [`Svd`]: singular value decomposition.

mod eigen;
mod qr;
mod svd;

pub use eigen::SymmetricEigen;
pub use qr::Qr;
pub use svd::Svd;

/// `y += a x`.
fn axpy(y: &mut [f64], a: f64, x: &[f64]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

/// `x·y`, in eight partial sums that are added in order: a sum one by one would wait for every addition.
pub(crate) fn dot(x: &[f64], y: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (xs, ys) = (x.chunks_exact(8), y.chunks_exact(8));
    let rest: f64 = xs.remainder().iter().zip(ys.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in xs.zip(ys) {
        for lane in 0..8 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f64>() + rest
}
