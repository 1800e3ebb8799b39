//! Discrete Fourier transform of a power of two of complex numbers, in place.

use num_complex::Complex64;
use std::f64::consts::TAU;

/// Σ xⱼ e^{∓2πi·jk/n}: −, or + for `inverse`, which also divides by n. The length is a power of two.
pub(super) fn transform(x: &mut [Complex64], inverse: bool) {
    let n = x.len();
    debug_assert!(n.is_power_of_two());
    if n < 2 {
        return;
    }
    let bits = n.trailing_zeros();
    for i in 0..n {
        let j = i.reverse_bits() >> (usize::BITS - bits);
        if i < j {
            x.swap(i, j);
        }
    }
    let sign = if inverse { 1.0 } else { -1.0 };
    let roots: Vec<Complex64> =
        (0..n / 2).map(|k| Complex64::cis(sign * TAU * k as f64 / n as f64)).collect();
    let mut half = 1;
    while half < n {
        let stride = n / (2 * half);
        for block in x.chunks_exact_mut(2 * half) {
            let (low, high) = block.split_at_mut(half);
            for (k, (a, b)) in low.iter_mut().zip(high).enumerate() {
                let turned = *b * roots[k * stride];
                (*a, *b) = (*a + turned, *a - turned);
            }
        }
        half *= 2;
    }
    if inverse {
        x.iter_mut().for_each(|value| *value /= n as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transform_is_its_definition_and_has_an_inverse() {
        let signal: Vec<Complex64> =
            (0..16).map(|i| Complex64::new((i * i % 7) as f64, (i % 3) as f64 - 1.0)).collect();
        let mut found = signal.clone();
        transform(&mut found, false);
        for (k, value) in found.iter().enumerate() {
            let turned =
                signal.iter().enumerate().map(|(j, x)| x * Complex64::cis(-TAU * (j * k) as f64 / 16.0));
            assert!((turned.sum::<Complex64>() - value).norm() < 1e-12);
        }
        transform(&mut found, true);
        assert!(found.iter().zip(&signal).all(|(a, b)| (a - b).norm() < 1e-13));
    }
}
