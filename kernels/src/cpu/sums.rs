//! Sums and maxima of slices, as loops that vectorise ([`super::simd`]).
//!
//! Sums keep [`LANES`] partial sums in fixed places and add them as a tree, so the
//! order of additions depends on the length alone, never on the instruction set or
//! the number of threads. Processors with and without fused multiply-add may still
//! differ in the last bit, for the fused one rounds once.

use super::CpuReal;
use super::simd::Level;

/// Partial sums of a reduction: two AVX-512 registers of `f32`, eight SSE ones.
pub const LANES: usize = 32;

/// Folds `N` slices of one length element by element into [`LANES`] lanes, and the lanes as a tree.
///
/// `step` takes a lane and one element of every slice; `join` joins two lanes; `start`
/// must be neutral to both.
#[inline(always)]
pub fn fold<X: CpuReal, const N: usize>(
    slices: [&[X]; N],
    start: X,
    step: impl Fn(X, [X; N]) -> X,
    join: impl Fn(X, X) -> X + Copy,
) -> X {
    let mut lanes = [start; LANES];
    let len = slices[0].len();
    let whole = len / LANES * LANES;
    for first in (0..whole).step_by(LANES) {
        let mut block = slices;
        for n in 0..N {
            block[n] = &slices[n][first..][..LANES];
        }
        for i in 0..LANES {
            let mut elements = [start; N];
            for n in 0..N {
                elements[n] = block[n][i];
            }
            lanes[i] = step(lanes[i], elements);
        }
    }
    // The rest has a sum of its own: an index known only at run time would keep the
    // lanes out of registers.
    let mut last = start;
    for i in whole..len {
        let mut elements = [start; N];
        for n in 0..N {
            elements[n] = slices[n][i];
        }
        last = step(last, elements);
    }
    join(join_lanes(lanes, join), last)
}

#[inline(always)]
fn join_lanes<X: CpuReal>(mut lanes: [X; LANES], join: impl Fn(X, X) -> X + Copy) -> X {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] = join(lanes[i], lanes[i + width]);
        }
    }
    lanes[0]
}

/// `z[i] = e^(z[i] − shift)` in place, and the sum of the new values.
#[inline(always)]
pub fn exp_sum<L: Level, X: CpuReal>(z: &mut [X], shift: X) -> X {
    let mut lanes = [X::zero(); LANES];
    let (blocks, rest) = z.as_chunks_mut::<LANES>();
    for block in blocks {
        for i in 0..LANES {
            block[i] = (block[i] - shift).fast_exp::<L>();
            lanes[i] += block[i];
        }
    }
    let mut last = X::zero();
    for z in rest {
        *z = (*z - shift).fast_exp::<L>();
        last += *z;
    }
    join_lanes(lanes, |x, y| x + y) + last
}

/// `Σ a[i]·b[i]`.
#[inline(always)]
pub fn dot<L: Level, X: CpuReal>(a: &[X], b: &[X]) -> X {
    let mut lanes = [X::zero(); LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    let mut step = |a: &[X; LANES], b: &[X; LANES]| {
        for i in 0..LANES {
            lanes[i] = a[i].madd::<L>(b[i], lanes[i]);
        }
    };
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        step(a, b);
    }
    // The rest padded with zeros: a loop over it would keep the lanes out of vectors,
    // and the whole product would take three times as long.
    if !a_rest.is_empty() {
        let (mut a_last, mut b_last) = ([X::zero(); LANES], [X::zero(); LANES]);
        a_last[..a_rest.len()].copy_from_slice(a_rest);
        b_last[..a_rest.len()].copy_from_slice(&b_rest[..a_rest.len()]);
        step(&a_last, &b_last);
    }
    join_lanes(lanes, |x, y| x + y)
}

/// The value with the largest real part, −∞ for none; NaN is passed over.
#[inline(always)]
pub fn max<X: CpuReal>(a: &[X]) -> X {
    fold([a], X::from_f64(f64::NEG_INFINITY), |lane, [a]| lane.max(a), |x, y| x.max(y))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn max_passes_over_nan() {
        assert_eq!(max(&[1.0f32, f32::NAN, 3.0, -5.0]), 3.0);
        assert_eq!(max::<f32>(&[]), f32::NEG_INFINITY);
    }
}
