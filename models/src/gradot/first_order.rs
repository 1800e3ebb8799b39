//! How far first-order terms can be relied on: near a minimum of the loss the mean gradient is small beside its noise,
//! and terms of two halves of the data have little in common.

use super::scores::bilinear;
use crate::linalg::Svd;
use rayon::prelude::*;

/// f̃ of the components of a matrix `[rows, cols]`, of its gradient.
pub fn first_order_of_components(svd: &Svd, gradient: &[f64]) -> Vec<f64> {
    let of = |k: usize| svd.values[k] * bilinear(&svd.left[k], gradient, &svd.right[k]);
    (0..svd.values.len()).into_par_iter().map(of).collect()
}

/// f̃ of the channels of an MLP, of the matrix of its last product `[H, F]` and the gradient of that.
pub fn first_order_of_channels(down: &[f64], gradient: &[f64], width: usize) -> Vec<f64> {
    let mut sums = vec![0.0; width];
    for (w, d) in down.chunks_exact(width).zip(gradient.chunks_exact(width)) {
        sums.iter_mut().zip(w.iter().zip(d)).for_each(|(sum, (w, d))| *sum += w * d);
    }
    sums
}

/// Pearson's correlation of pairs; none where one side does not vary beyond rounding.
pub fn correlation(pairs: impl Iterator<Item = (f64, f64)> + Clone) -> Option<f64> {
    let (mut count, mut x, mut y) = (0.0, 0.0, 0.0);
    pairs.clone().for_each(|(a, b)| (count, x, y) = (count + 1.0, x + a, y + b));
    (x, y) = (x / count, y / count);
    let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
    for (a, b) in pairs {
        (xx, yy, xy) = (xx + (a - x) * (a - x), yy + (b - y) * (b - y), xy + (a - x) * (b - y));
    }
    let varies = |squares: f64, mean: f64| squares > count * (1e-12 * mean).powi(2);
    (varies(xx, x) && varies(yy, y)).then(|| xy / (xx * yy).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::ProductSums;
    use crate::gradot::{channels, components};
    use gradtx_kernels::rng::Stream;

    fn random(len: usize, key: u64) -> Vec<f64> {
        let mut stream = Stream::new(key);
        (0..len).map(|_| stream.normal()).collect()
    }

    fn near(a: &[f64], b: &[f64]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-12 * b.abs().max(1e-3))
    }

    #[test]
    fn first_order_terms_are_those_of_scores() {
        let (rows, cols) = (5, 7);
        let w = random(rows * cols, 1);
        let svd = Svd::new(rows, cols, &w).unwrap();
        let sums = |inputs: usize, outputs: usize, key| ProductSums {
            inputs: random(inputs * inputs, key),
            outputs: random(outputs * outputs, key + 1),
            gradient: random(inputs * outputs, key + 2),
        };
        let of = sums(cols, rows, 2);
        let want: Vec<f64> = components(&svd, &of, 0..rows).terms.iter().map(|term| term.first).collect();
        assert!(near(&first_order_of_components(&svd, &of.gradient), &want));
        assert!(!near(&first_order_of_components(&svd, &w), &want), "of another gradient");
        let (hidden, width) = (4, 6);
        let [gate, up, down] = [5, 6, 7].map(|key| random(hidden * width, key));
        let of_down = sums(width, hidden, 8);
        let found = channels([&gate, &up, &down], hidden, &sums(hidden, 2 * width, 11), &of_down);
        let want: Vec<f64> = found.terms.iter().map(|term| term.first).collect();
        assert!(near(&first_order_of_channels(&down, &of_down.gradient, width), &want));
    }

    #[test]
    fn correlations_are_from_minus_one_to_one() {
        let x = random(40, 1);
        let of = |y: &[f64]| correlation(x.iter().copied().zip(y.iter().copied()));
        let line: Vec<f64> = x.iter().map(|x| 3.0 - 2.0 * x).collect();
        assert!((of(&line).unwrap() + 1.0).abs() < 1e-12 && (of(&x).unwrap() - 1.0).abs() < 1e-12);
        assert!(of(&random(40, 2)).unwrap().abs() < 0.5);
        assert_eq!((of(&[1.0; 40]), of(&[0.1; 40])), (None, None));
        assert_eq!(correlation([].into_iter()), None);
    }
}
