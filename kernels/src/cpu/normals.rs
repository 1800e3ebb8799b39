//! Many normal random numbers at a time: those of [`Stream::normal`], multiplied and rounded to f32, to
//! the bit.
//!
//! One of them takes the library 30 ns, for a logarithm and a cosine. Here both are computed by
//! polynomials, in vectors, with errors far below [`ERROR`]. Where two numbers that far away on both
//! sides are rounded to the same f32, so is the exact one between them; where they are not, which is
//! about one of five thousand, the library is asked.

use super::simd::{Level, Task, dispatch};
use crate::rng::{MUL, Stream, WEYL};
use std::f64::consts::{LN_2, TAU};

/// Numbers at a time.
const GROUP: usize = 64;
/// How far computed numbers may lie from the library's at most: several hundred times as far as any
/// does.
const ERROR: f64 = 1e-12;

/// `values[i] += spread · n` with `n` the number `first + i` of the key's normals
/// ([`Stream::after_normals`]), the product rounded to f32 before it is added.
pub fn add_normals(values: &mut [f32], key: u64, first: u64, spread: f64) {
    for (i, values) in values.chunks_mut(GROUP).enumerate() {
        let first = first.wrapping_add((i * GROUP) as u64);
        let mut products = [0.0; GROUP];
        if dispatch(Products { products: &mut products, key, first, spread }) {
            // Some of them are NaN, unless nobody will look at them.
            for (i, product) in products[..values.len()].iter_mut().enumerate().filter(|(_, p)| p.is_nan()) {
                let exact = Stream::after_normals(key, first.wrapping_add(i as u64)).normal();
                *product = (exact * spread) as f32;
            }
        }
        values.iter_mut().zip(products).for_each(|(value, product)| *value += product);
    }
}

/// Numbers times `spread`; NaN where the library must be asked. Returns whether there are such.
struct Products<'a> {
    products: &'a mut [f32; GROUP],
    key: u64,
    first: u64,
    spread: f64,
}

impl Task for Products<'_> {
    type Out = bool;
    #[inline(always)]
    fn run<L: Level>(self) -> bool {
        let Self { products, key, first, spread } = self;
        let (mut radii, mut angles) = ([0; GROUP], [0; GROUP]);
        draw(key, first, &mut radii, &mut angles);
        let mut unsure = false;
        for i in 0..GROUP {
            let number = radius(radii[i]) * cosine(angles[i]);
            let low = ((number - ERROR) * spread) as f32;
            let high = ((number + ERROR) * spread) as f32;
            products[i] = if low == high { low } else { f32::NAN };
            unsure |= low != high;
        }
        unsure
    }
}

/// The words of Philox that a number is made of, as two whole numbers of 53 bits. The halves of 64 bits
/// hold words of 32, as the processor multiplies them; what is above counts for nothing.
#[inline(always)]
fn draw(key: u64, first: u64, radii: &mut [u64; GROUP], angles: &mut [u64; GROUP]) {
    const WORD: u64 = 0xFFFF_FFFF;
    for i in 0..GROUP {
        let block = first.wrapping_add(i as u64);
        let mut c = [block & WORD, block >> 32, 0, 0];
        let mut k = [key as u32, (key >> 32) as u32];
        for _ in 0..10 {
            let p0 = MUL[0] as u64 * (c[0] & WORD);
            let p1 = MUL[1] as u64 * (c[2] & WORD);
            c = [(p1 >> 32) ^ c[1] ^ k[0] as u64, p1, (p0 >> 32) ^ c[3] ^ k[1] as u64, p0];
            k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
        }
        radii[i] = (c[0] & WORD | c[1] << 32) >> 11;
        angles[i] = (c[2] & WORD | c[3] << 32) >> 11;
    }
}

/// A whole number below 2^52 as a float: its bits behind those of 2^52.
#[inline(always)]
fn float(n: u64) -> f64 {
    const TWO_TO_52: f64 = (1u64 << 52) as f64;
    f64::from_bits(TWO_TO_52.to_bits() | n) - TWO_TO_52
}

/// `√(−2 ln(1 − n / 2^53))`. The logarithm is that of fdlibm: of a number near 1, by
/// `f / (2 + f)`, and of a power of two.
#[inline(always)]
fn radius(n: u64) -> f64 {
    /// √½.
    const LEAST: u64 = 0x3FE6_A09E_667F_3BCD;
    const ONE: u64 = 0x3FF0_0000_0000_0000;
    const MANTISSA: u64 = (1 << 52) - 1;
    const ODD: [f64; 4] =
        [6.666666666666735e-1, 2.857142874366239e-1, 1.818357216161805e-1, 1.4798198605116586e-1];
    const EVEN: [f64; 3] = [3.999999999940942e-1, 2.2222198432149784e-1, 1.5313837699209373e-1];
    let n = float(n >> 32) * (1u64 << 32) as f64 + float(n & 0xFFFF_FFFF);
    let u = 1.0 - n / (1u64 << 53) as f64;
    let shifted = u.to_bits() + (ONE - LEAST);
    let exponent = float(shifted >> 52) - 1023.0;
    let f = f64::from_bits((shifted & MANTISSA) + LEAST) - 1.0;
    let s = f / (2.0 + f);
    let (z, half) = (s * s, 0.5 * f * f);
    let w = z * z;
    let even = w * (EVEN[0] + w * (EVEN[1] + w * EVEN[2]));
    let odd = z * (ODD[0] + w * (ODD[1] + w * (ODD[2] + w * ODD[3])));
    let ln = exponent * LN_2 - (half - s * (half + (even + odd)) - f);
    (-2.0 * ln).sqrt()
}

/// `cos(τ n / 2^53)`: fdlibm's sine and cosine of the angle to the nearest quarter of a turn.
#[inline(always)]
fn cosine(n: u64) -> f64 {
    const QUARTER: u64 = 1 << 51;
    const SINE: [f64; 6] = [
        -1.6666666666666632e-1,
        8.33333333332249e-3,
        -1.984126982985795e-4,
        2.7557313707070068e-6,
        -2.5050760253406863e-8,
        1.58969099521155e-10,
    ];
    const COSINE: [f64; 6] = [
        4.16666666666666e-2,
        -1.388888888887411e-3,
        2.480158728947673e-5,
        -2.7557314351390663e-7,
        2.087572321298175e-9,
        -1.1359647557788195e-11,
    ];
    let from_eighth = n + QUARTER / 2;
    let (quarters, rest) = (from_eighth / QUARTER, from_eighth % QUARTER);
    let x = (float(rest) - (QUARTER / 2) as f64) * (TAU / (1u64 << 53) as f64);
    let z = x * x;
    let of = |c: [f64; 6]| c[0] + z * (c[1] + z * (c[2] + z * (c[3] + z * (c[4] + z * c[5]))));
    let sine = x + x * z * of(SINE);
    let cosine = 1.0 - 0.5 * z + z * z * of(COSINE);
    let size = if quarters & 1 == 1 { sine } else { cosine };
    // Below zero after one and two quarters.
    f64::from_bits(size.to_bits() ^ ((quarters + 1) & 2) << 62)
}

#[cfg(test)]
mod tests {
    use super::super::simd::Baseline;
    use super::*;

    #[test]
    fn numbers_are_those_of_the_library() {
        for (key, first, len, spread) in [
            (5, 0, 100_003, 0.1),
            (0x1234_5678_9ABC_DEF0, (1 << 32) - 70, 20_000, 1.0),
            (u64::MAX, 12_345, 63, 3e-4),
            (1, 7, 1, 0.0),
            (2, 3, 130, f64::INFINITY),
        ] {
            let mut stream = Stream::after_normals(key, first);
            let exact: Vec<f32> = (0..len).map(|_| (stream.normal() * spread) as f32).collect();
            let mut found: Vec<f32> = (0..len).map(|i| i as f32 * 1e-3).collect();
            let wanted = found.iter().zip(&exact).map(|(x, n)| x + n);
            let wanted: Vec<u32> = wanted.map(f32::to_bits).collect();
            add_normals(&mut found, key, first, spread);
            assert!(found.iter().map(|x| x.to_bits()).eq(wanted), "key {key:#x}, {len} from {first}");
        }
    }

    /// Both are as near to the library as is promised, everywhere: at the ends of their ranges, at the
    /// eighths of a turn, and in between.
    #[test]
    fn polynomials_are_near_the_library() {
        let last = (1u64 << 53) - 1;
        let eighths = (0..8u64).flat_map(|i| [i << 50, (i << 50) + 1, ((i + 1) << 50) - 1]);
        let mut stream = Stream::new(3);
        let random = (0..100_000).map(|_| stream.next_u64() >> 11);
        let near_one = (0..100).map(|i| last - i);
        let small = (0..54).map(|i| (1u64 << i) - 1);
        for n in eighths.chain(random).chain(near_one).chain(small) {
            let part = n as f64 / (1u64 << 53) as f64;
            let (r, c) = ((-2.0 * (1.0 - part).ln()).sqrt(), (TAU * part).cos());
            assert!((radius(n) - r).abs() <= 1e-14 * r.abs(), "radius of {n}: {} and {r}", radius(n));
            assert!((cosine(n) - c).abs() <= 3e-15, "cosine of {n}: {} and {c}", cosine(n));
        }
    }

    /// Where the error allowed for covers whole numbers of f32, the library is asked.
    #[test]
    fn doubtful_values_are_marked() {
        let mut products = [0.0; GROUP];
        let mut doubts = 0;
        for first in (0..1 << 17).step_by(GROUP) {
            let unsure = Products { products: &mut products, key: 5, first, spread: 0.1 }.run::<Baseline>();
            let now = products.iter().filter(|p| p.is_nan()).count();
            assert_eq!(unsure, now > 0);
            doubts += now;
        }
        assert!((1..200).contains(&doubts), "{doubts} of {}", 1 << 17);
    }
}
