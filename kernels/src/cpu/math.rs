//! e^x that vectorises: a polynomial in `f32`, without branches or tables.
//!
//! `e^x = 2^n (q + 1)` with `x = n ln 2 + r`, `|r| ≤ ln 2 / 2`, and a polynomial
//! `q(r) ≈ e^r − 1` fitted for least relative error (1.6e-8). The relative error of
//! the result stays below 2e-7. Below −86.9 it may be 0, where single precision runs out of
//! normal numbers; infinities give the limits and NaN passes through.

use super::simd::Level;

/// `q = r + P₀ r² + P₁ r³ + …`.
const P: [f32; 5] = [0.5, 0.166_665_42, 0.041_666_277, 0.008_366_755, 0.001_394_674_8];
const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 = `LN2_HIGH + LN2_LOW`; the high part has 9 bits, so that n times it is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -0.000_212_194_44;
/// 1.5·2²³: a float this large has no fraction, so adding it rounds to an integer, which
/// then stands in its last bits.
const ROUND: f32 = 12_582_912.0;

/// `a·b + c`, fused where that is an instruction.
#[inline(always)]
pub fn madd<L: Level>(a: f32, b: f32, c: f32) -> f32 {
    if L::FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x`.
#[inline(always)]
pub fn exp<L: Level>(x: f32) -> f32 {
    // Beyond these the result is infinite or 0. Written so that NaN stays.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -87.2 { -87.2 } else { x };
    let shifted = madd::<L>(x, LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = madd::<L>(n, -LN2_LOW, madd::<L>(n, -LN2_HIGH, x));
    let mut p = P[4];
    for c in [P[3], P[2], P[1], P[0]] {
        p = madd::<L>(p, r, c);
    }
    let q = madd::<L>(p, r * r, r);
    // n is −126 to 128, one too many for an exponent: 2^(n−1) · 2(q + 1), where the
    // exponent bits of 2^−127 are 0, and so is the result.
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(126) << 23);
    madd::<L>(q, 2.0, 2.0) * scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::CpuReal;
    use crate::cpu::simd::{Baseline, Task, dispatch};

    /// x, e^x and 1/(1+e^−x), in place of x.
    struct All<'a>(&'a mut [[f32; 3]]);
    impl Task for All<'_> {
        type Out = ();
        #[inline(always)]
        fn run<L: Level>(self) {
            for row in self.0 {
                let x = row[0];
                *row = [x, x.fast_exp::<L>(), x.fast_sigmoid::<L>()];
            }
        }
    }

    fn sweep() -> Vec<[f32; 3]> {
        let even = (-2_200_000..2_200_000).map(|i| i as f32 * 5e-5);
        let small = (0..4000).flat_map(|i| {
            let x = (-87.0 + i as f32 * 0.022).exp();
            [x, -x]
        });
        even.chain(small).map(|x| [x; 3]).collect()
    }

    /// Below e^−86.9 results may be 0.
    fn check(rows: &[[f32; 3]]) {
        let smallest = (-86.9f64).exp();
        for &[x, exp, sigmoid] in rows {
            let wide = x as f64;
            let pairs = [("exp", exp, wide.exp()), ("sigmoid", sigmoid, 1.0 / (1.0 + (-wide).exp()))];
            for (name, found, exact) in pairs {
                if exact > f32::MAX as f64 {
                    assert!(found > 1e38, "{name}({x}) = {found}");
                    continue;
                }
                let tolerance = 2e-7 * exact + smallest;
                assert!((found as f64 - exact).abs() <= tolerance, "{name}({x}) = {found}, not {exact}");
            }
        }
    }

    #[test]
    fn errors_are_small_everywhere() {
        let mut rows = sweep();
        dispatch(All(&mut rows));
        check(&rows);
        All(&mut rows).run::<Baseline>();
        check(&rows);
    }

    #[test]
    #[should_panic(expected = "exp(")]
    fn the_check_sees_a_small_error() {
        let mut rows = sweep();
        dispatch(All(&mut rows));
        for row in &mut rows {
            row[1] *= 1.0 + 1e-6;
        }
        check(&rows);
    }

    #[test]
    fn limits_and_nan() {
        let mut rows =
            [f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 0.0, -0.0, f32::NAN].map(|x| [x; 3]);
        dispatch(All(&mut rows));
        let inf = f32::INFINITY;
        let expect = [[inf, 1.0], [0.0, 0.0], [inf, 1.0], [0.0, 0.0], [1.0, 0.5], [1.0, 0.5]];
        for (row, want) in rows.iter().zip(expect) {
            assert_eq!(row[1..], want);
        }
        assert!(rows[6].iter().all(|x| x.is_nan()));
    }
}
