//! What can be summed over ranks, and the order in which it is.

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use half::bf16;

/// A type of numbers, where it is not known at compile time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// 32-bit floats: summed in f32.
    F32,
    /// Brain floats: summed in f32, rounded once.
    Bf16,
    /// Counters: summed modulo 2⁶⁴.
    U64,
}

impl Kind {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::U64 => 8,
        }
    }
}

/// A number that ranks can add up.
pub trait Number: Pod {
    /// Its name at run time.
    const KIND: Kind;
}

impl Number for f32 {
    const KIND: Kind = Kind::F32;
}

impl Number for bf16 {
    const KIND: Kind = Kind::Bf16;
}

impl Number for u64 {
    const KIND: Kind = Kind::U64;
}

/// Bytes that lie where any [`Number`] may lie.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    words: Vec<u64>,
    len: usize,
}

impl Scratch {
    pub(crate) fn copy_of(bytes: &[u8]) -> Self {
        let mut copy = Self::default();
        copy.resize(bytes.len());
        copy.bytes_mut().copy_from_slice(bytes);
        copy
    }

    /// Makes it `len` bytes long, with whatever content.
    pub fn resize(&mut self, len: usize) {
        self.words.resize(len.div_ceil(size_of::<u64>()), 0);
        self.len = len;
    }

    pub fn bytes(&self) -> &[u8] {
        &cast_slice(&self.words)[..self.len]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut cast_slice_mut(&mut self.words)[..self.len]
    }
}

/// `out = ((parts[0] + parts[1]) + parts[2]) + …`, element by element; all equally long,
/// at least one part.
pub(super) fn sum_in_order(kind: Kind, parts: &[&[u8]], out: &mut [u8]) {
    match kind {
        Kind::F32 => sum(parts, cast_slice_mut(out), |x: f32| x, |a: f32, x| a + x, |a| a),
        Kind::Bf16 => sum(parts, cast_slice_mut(out), bf16::to_f32, |a, x| a + x, bf16::from_f32),
        Kind::U64 => sum(parts, cast_slice_mut(out), |x: u64| x, u64::wrapping_add, |a| a),
    }
}

/// Elements that are summed before the next ones: they stay in the nearest cache.
const BLOCK: usize = 1024;

fn sum<T: Pod, A: Copy + Default>(
    parts: &[&[u8]],
    out: &mut [T],
    widen: impl Fn(T) -> A,
    add: impl Fn(A, A) -> A,
    round: impl Fn(A) -> T,
) {
    let parts: Vec<&[T]> = parts.iter().map(|part| cast_slice(part)).collect();
    let mut sums = [A::default(); BLOCK];
    for (i, out) in out.chunks_mut(BLOCK).enumerate() {
        let block = i * BLOCK..i * BLOCK + out.len();
        let sums = &mut sums[..out.len()];
        sums.iter_mut().zip(&parts[0][block.clone()]).for_each(|(s, &x)| *s = widen(x));
        for part in &parts[1..] {
            sums.iter_mut().zip(&part[block.clone()]).for_each(|(s, &x)| *s = add(*s, widen(x)));
        }
        out.iter_mut().zip(sums).for_each(|(o, s)| *o = round(*s));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_taken_in_order_and_rounded_once() {
        let parts = [1e8f32, 1.0, -1e8, 1.0].map(|x| vec![x; BLOCK + 3]);
        let bytes: Vec<&[u8]> = parts.iter().map(|p| cast_slice(p)).collect();
        let mut out = vec![0f32; BLOCK + 3];
        sum_in_order(Kind::F32, &bytes, cast_slice_mut(&mut out));
        assert_eq!(out, vec![1.0; BLOCK + 3], "from the left: (1e8 + 1) rounds to 1e8");

        // Rounded after every addition, 256 + 1 would stay 256.
        let parts = [256.0, 1.0, 1.0].map(|x| [bf16::from_f32(x)]);
        let bytes: Vec<&[u8]> = parts.iter().map(|p| cast_slice(p)).collect();
        let mut out = [bf16::ZERO];
        sum_in_order(Kind::Bf16, &bytes, cast_slice_mut(&mut out));
        assert_eq!(out[0].to_f32(), 258.0);

        let parts = [[u64::MAX], [5]];
        let bytes: Vec<&[u8]> = parts.iter().map(|p| cast_slice(p)).collect();
        let mut out = [0u64];
        sum_in_order(Kind::U64, &bytes, cast_slice_mut(&mut out));
        assert_eq!(out, [4]);
    }

    #[test]
    fn memory_is_used_again() {
        let mut scratch = Scratch::copy_of(&[1; 100]);
        assert_eq!(scratch.bytes(), [1; 100]);
        let at = scratch.bytes_mut().as_ptr();
        scratch.resize(61);
        assert_eq!((scratch.bytes().as_ptr(), scratch.bytes().len()), (at, 61));
    }
}
