//! Dropout masks: the counter generator drawn for many elements at once.

use super::CpuReal;
use crate::ops::DROPOUT_STREAM;
use crate::rng::{drop_threshold, philox};

/// Elements that one call draws for.
pub(crate) const MASK_BLOCK: usize = 64;

/// Random words of elements `MASK_BLOCK·block ..` of a row: element c has word `c % 4` of
/// `philox(key, [row, c / 4, site, DROPOUT_STREAM])`. Keep those `>= rng::drop_threshold(p)`.
#[inline(always)]
pub(crate) fn mask_words(key: u64, row: u32, site: u32, block: usize) -> [u32; MASK_BLOCK] {
    const GROUPS: usize = MASK_BLOCK / 4;
    let first = (block * GROUPS) as u32;
    // One counter per lane, and the rounds inlined: the compiler makes vectors of the lanes.
    let mut lanes = [[0u32; GROUPS]; 4];
    for g in 0..GROUPS {
        let words = philox(key, [row, first.wrapping_add(g as u32), site, DROPOUT_STREAM]);
        for w in 0..4 {
            lanes[w][g] = words[w];
        }
    }
    let mut out = [0u32; MASK_BLOCK];
    for g in 0..GROUPS {
        for w in 0..4 {
            out[4 * g + w] = lanes[w][g];
        }
    }
    out
}

/// The mask of one key and site, as factors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mask {
    key: u64,
    site: u32,
    threshold: u32,
    keep: f64,
}

impl Mask {
    /// Drops with probability `p`, below 1.
    pub fn new(key: u64, site: u32, p: f64) -> Self {
        Self { key, site, threshold: drop_threshold(p), keep: 1.0 / (1.0 - p) }
    }

    /// Factors of elements `MASK_BLOCK·block ..` of a row: 0 or `1 / (1 − p)`.
    #[inline(always)]
    pub fn factors<X: CpuReal>(&self, row: usize, block: usize) -> [X; MASK_BLOCK] {
        let words = mask_words(self.key, row as u32, self.site, block);
        let keep = X::from_f64(self.keep);
        words.map(|word| if word >= self.threshold { keep } else { X::zero() })
    }

    /// `out = mask ⊙ x` for a whole row.
    #[inline(always)]
    pub fn apply<X: CpuReal>(&self, out: &mut [X], x: &[X], row: usize) {
        for (block, (out, x)) in out.chunks_mut(MASK_BLOCK).zip(x.chunks(MASK_BLOCK)).enumerate() {
            let factors = self.factors::<X>(row, block);
            for ((out, &x), &factor) in out.iter_mut().zip(x).zip(&factors) {
                *out = x * factor;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_single_draws() {
        for block in [0, 3] {
            let words = mask_words(77, 9, 4, block);
            for (i, &word) in words.iter().enumerate() {
                let c = block * MASK_BLOCK + i;
                assert_eq!(word, philox(77, [9, (c / 4) as u32, 4, DROPOUT_STREAM])[c % 4]);
            }
        }
    }
}
