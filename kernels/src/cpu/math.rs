//! Functions that vectorise: `f32` polynomials for e^x and tanh, without branches or tables.
//!
//! Both rest on `e^x − 1 = 2^n (q + 1) − 1` with `x = n ln 2 + r`, `|r| ≤ ln 2 / 2` and a
//! polynomial `q(r) ≈ e^r − 1` fitted for least relative error (1.6e-8). Relative
//! errors stay below 2e-7; infinities give the limits and NaN passes through.

use super::simd::Level;

/// `q = P2 r² + P3 r³ + … + r`.
const P: [f32; 5] = [0.5, 0.166_665_42, 0.041_666_277, 0.008_366_755, 0.001_394_674_8];
const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 = `LN2_HIGH + LN2_LOW`; the high part has 9 bits, so that n times it is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -0.000_212_194_44;
/// 1.5·2²³: a float this large has no fraction, so adding it rounds to an integer.
const ROUND: f32 = 12_582_912.0;

/// `a·b + c`, fused where that is an instruction.
#[inline(always)]
pub fn madd<L: Level>(a: f32, b: f32, c: f32) -> f32 {
    if L::FMA { a.mul_add(b, c) } else { a * b + c }
}

/// n and `e^r − 1` of `x = n ln 2 + r`; x within ±2000.
#[inline(always)]
fn reduce<L: Level>(x: f32) -> (i32, f32) {
    let shifted = madd::<L>(x, LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = madd::<L>(n, -LN2_LOW, madd::<L>(n, -LN2_HIGH, x));
    let mut p = P[4];
    for c in [P[3], P[2], P[1], P[0]] {
        p = madd::<L>(p, r, c);
    }
    let q = madd::<L>(p, r * r, r);
    ((shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32), q)
}

/// 2^n for −126 ≤ n ≤ 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// `e^x`; 0 and +∞ beyond the range of `f32`.
#[inline(always)]
pub fn exp<L: Level>(x: f32) -> f32 {
    // Beyond these the result is 0 or infinite. Written so that NaN stays.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -105.0 { -105.0 } else { x };
    let (n, q) = reduce::<L>(x);
    // n reaches 128 and −151: two factors, each in range, give infinity and subnormals.
    let half = n >> 1;
    (q + 1.0) * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// `tanh x = (e^{2|x|} − 1) / (e^{2|x|} + 1)` with the sign of x.
#[inline(always)]
pub fn tanh<L: Level>(x: f32) -> f32 {
    let twice = 2.0 * x.abs();
    // tanh 10 rounds to 1. Written so that NaN stays.
    let twice = if twice > 20.0 { 20.0 } else { twice };
    let (n, q) = reduce::<L>(twice);
    let scale = power_of_two(n);
    let e = madd::<L>(scale, q, scale - 1.0);
    (e / (e + 2.0)).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::CpuReal;
    use crate::cpu::simd::{Baseline, Task, dispatch};

    /// x, e^x, tanh x and 1/(1+e^−x), in place of x.
    struct All<'a>(&'a mut [[f32; 4]]);
    impl Task for All<'_> {
        type Out = ();
        #[inline(always)]
        fn run<L: Level>(self) {
            for row in self.0 {
                let x = row[0];
                *row = [x, x.fast_exp::<L>(), x.fast_tanh::<L>(), x.fast_sigmoid::<L>()];
            }
        }
    }

    fn sweep() -> Vec<[f32; 4]> {
        let even = (-2_200_000..2_200_000).map(|i| i as f32 * 5e-5);
        let small = (0..4000).flat_map(|i| {
            let x = (-87.0 + i as f32 * 0.022).exp();
            [x, -x]
        });
        even.chain(small).map(|x| [x; 4]).collect()
    }

    fn check(rows: &[[f32; 4]]) {
        for &[x, exp, tanh, sigmoid] in rows {
            let wide = x as f64;
            // The last is the absolute error where numbers are subnormal: 1 / (1 + e^−x) is 0 there.
            let pairs = [
                ("exp", exp, wide.exp(), 1.5e-45),
                ("tanh", tanh, wide.tanh(), 1.5e-45),
                ("sigmoid", sigmoid, 1.0 / (1.0 + (-wide).exp()), f32::MIN_POSITIVE as f64),
            ];
            for (name, found, exact, tiny) in pairs {
                if exact > f32::MAX as f64 {
                    assert!(found > 1e38, "{name}({x}) = {found}");
                    continue;
                }
                let tolerance = 2e-7 * exact.abs() + tiny;
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
            [f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 0.0, -0.0, f32::NAN].map(|x| [x; 4]);
        dispatch(All(&mut rows));
        let inf = f32::INFINITY;
        let expect = [[inf, 1.0, 1.0], [0.0, -1.0, 0.0], [inf, 1.0, 1.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.5]];
        for (row, want) in rows.iter().zip(expect) {
            assert_eq!(row[1..], want);
        }
        assert!(rows[5][2].is_sign_negative());
        assert!(rows[6].iter().all(|x| x.is_nan()));
    }
}
