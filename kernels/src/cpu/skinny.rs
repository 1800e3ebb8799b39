//! `x Wᵀ` for very few rows of x: decoding, where time is reading W.
//!
//! The matrix library packs W before it multiplies, which is wasted when each value is
//! used once. This kernel streams W a single time. It sums each output over k in the
//! same order, with the same fused operation, as the library does, so that a row has
//! the same bits however many rows it is computed with; outputs of a vector must then
//! lie side by side, so squares of W are transposed in registers on the way.

use super::matrix::MatrixMut;
use crate::ops::{GemmDims, Out};
use std::arch::x86_64::*;

/// Most rows of x that are faster here.
const MAX_ROWS: usize = 4;
/// Outputs that are computed together: two vectors, to hide the latency of one's additions.
const OUTPUTS: usize = 16;
/// Values of k per transposed square.
const SQUARE: usize = 8;

/// Whether [`product`] does this product, on this processor.
pub(super) fn fits(dims: &GemmDims) -> bool {
    dims.m <= MAX_ROWS
        && dims.n >= OUTPUTS
        && !dims.trans_a
        && dims.trans_b
        && dims.alpha == 1.0
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
}

/// The first `n / OUTPUTS · OUTPUTS` columns of C; returns how many. `chunk` is the longest
/// sum over k that is not rounded in between. Slices must have been checked.
pub(super) fn product(
    c: &mut [f32],
    a: &[f32],
    b: &[f32],
    dims: &GemmDims,
    chunk: usize,
    threads: usize,
) -> usize {
    assert!(fits(dims), "not a skinny product");
    let cols = dims.n / OUTPUTS * OUTPUTS;
    let width = if threads > 1 { (cols / OUTPUTS).div_ceil(2 * threads) * OUTPUTS } else { cols };
    let parts = MatrixMut::new(c, dims.m, cols, dims.c_stride.max(cols)).column_blocks(width).enumerate();
    let work = |(i, c): (usize, MatrixMut<'_, f32>)| {
        let b = &b[i * width * dims.b_stride..];
        // SAFETY: `fits` saw AVX2 and FMA.
        unsafe {
            match dims.m {
                1 => columns::<1>(c, a, b, dims, chunk),
                2 => columns::<2>(c, a, b, dims, chunk),
                3 => columns::<3>(c, a, b, dims, chunk),
                _ => columns::<4>(c, a, b, dims, chunk),
            }
        }
    };
    if threads > 1 {
        let work = &work;
        rayon::scope(|scope| parts.for_each(|part| scope.spawn(move |_| work(part))));
    } else {
        parts.for_each(work);
    }
    cols
}

/// Some columns of C, a multiple of [`OUTPUTS`]; `b` begins at the first one's row.
#[target_feature(enable = "avx2,fma")]
fn columns<const M: usize>(mut c: MatrixMut<'_, f32>, a: &[f32], b: &[f32], dims: &GemmDims, chunk: usize) {
    let x: [&[f32]; M] = std::array::from_fn(|m| &a[m * dims.a_stride..][..dims.k]);
    for first in (0..c.row(0).len()).step_by(OUTPUTS) {
        let w: [&[f32]; OUTPUTS] = std::array::from_fn(|o| &b[(first + o) * dims.b_stride..][..dims.k]);
        let mut sums = [[0f32; OUTPUTS]; M];
        for start in (0..dims.k).step_by(chunk) {
            let end = dims.k.min(start + chunk);
            let part = sum_over::<M>(x.map(|x| &x[start..end]), w.map(|w| &w[start..end]));
            for m in 0..M {
                let old: [f32; OUTPUTS] = if start > 0 {
                    sums[m]
                } else if dims.out == Out::Add {
                    c.row(m)[first..first + OUTPUTS].try_into().expect("as many as OUTPUTS")
                } else {
                    sums[m] = part[m];
                    continue;
                };
                sums[m] = std::array::from_fn(|o| old[o] + part[m][o]);
            }
        }
        for m in 0..M {
            c.row(m)[first..first + OUTPUTS].copy_from_slice(&sums[m]);
        }
    }
}

/// `Σ_l x[m][l] · w[o][l]`, l in order. All slices have the same length.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn sum_over<const M: usize>(x: [&[f32]; M], w: [&[f32]; OUTPUTS]) -> [[f32; OUTPUTS]; M] {
    let len = x[0].len();
    let mut sums = [[_mm256_setzero_ps(); 2]; M];
    for l in (0..len / SQUARE * SQUARE).step_by(SQUARE) {
        for half in 0..2 {
            let rows: [__m256; SQUARE] = std::array::from_fn(|r| load(w[half * SQUARE + r], l));
            let by_k = transpose(rows);
            for (j, w) in by_k.into_iter().enumerate() {
                for m in 0..M {
                    sums[m][half] = _mm256_fmadd_ps(_mm256_set1_ps(x[m][l + j]), w, sums[m][half]);
                }
            }
        }
    }
    let mut out: [[f32; OUTPUTS]; M] = sums.map(|[low, high]| {
        let mut both = [0f32; OUTPUTS];
        // SAFETY: two vectors fill the array.
        unsafe {
            _mm256_storeu_ps(both.as_mut_ptr(), low);
            _mm256_storeu_ps(both.as_mut_ptr().add(SQUARE), high);
        }
        both
    });
    for l in len / SQUARE * SQUARE..len {
        for m in 0..M {
            for o in 0..OUTPUTS {
                out[m][o] = x[m][l].mul_add(w[o][l], out[m][o]);
            }
        }
    }
    out
}

/// Eight values from `start`.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn load(values: &[f32], start: usize) -> __m256 {
    let eight: &[f32; SQUARE] = values[start..][..SQUARE].try_into().expect("eight values");
    // SAFETY: the reference covers eight values.
    unsafe { _mm256_loadu_ps(eight.as_ptr()) }
}

/// Vector j of the result holds value j of every row.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn transpose(rows: [__m256; SQUARE]) -> [__m256; SQUARE] {
    let pair =
        |i: usize| (_mm256_unpacklo_ps(rows[i], rows[i + 1]), _mm256_unpackhi_ps(rows[i], rows[i + 1]));
    let [(a0, a1), (a2, a3), (a4, a5), (a6, a7)] = [pair(0), pair(2), pair(4), pair(6)];
    let four = |x: __m256, y: __m256| (_mm256_shuffle_ps::<0x44>(x, y), _mm256_shuffle_ps::<0xEE>(x, y));
    let [(b0, b1), (b2, b3)] = [four(a0, a2), four(a1, a3)];
    let [(b4, b5), (b6, b7)] = [four(a4, a6), four(a5, a7)];
    let low = |x: __m256, y: __m256| _mm256_permute2f128_ps::<0x20>(x, y);
    let high = |x: __m256, y: __m256| _mm256_permute2f128_ps::<0x31>(x, y);
    [
        low(b0, b4),
        low(b1, b5),
        low(b2, b6),
        low(b3, b7),
        high(b0, b4),
        high(b1, b5),
        high(b2, b6),
        high(b3, b7),
    ]
}
