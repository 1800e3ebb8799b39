//! Counter random numbers: Philox 4x32 with 10 rounds.
//!
//! A number is a pure function of a 64-bit key and a 128-bit counter, so it does
//! not matter who draws it, when, or after how many others: a dropout mask is drawn
//! again in the backward pass instead of being stored, and a shadow job sees the
//! same numbers on one rank or on sixty-four. Reference: Salmon et al., "Parallel
//! random numbers: as easy as 1, 2, 3", SC 2011; checked against its known answers.

pub(crate) const MUL: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
pub(crate) const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Four random words for a key and a counter.
#[inline(always)]
pub fn philox(key: u64, mut counter: [u32; 4]) -> [u32; 4] {
    let mut k = [key as u32, (key >> 32) as u32];
    for round in 0..10 {
        if round > 0 {
            k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
        }
        let p0 = MUL[0] as u64 * counter[0] as u64;
        let p1 = MUL[1] as u64 * counter[2] as u64;
        counter = [
            (p1 >> 32) as u32 ^ counter[1] ^ k[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ counter[3] ^ k[1],
            p0 as u32,
        ];
    }
    counter
}

/// A key for one purpose, derived from a parent key; independent for different words.
///
/// Chains: `key(key(seed, PURPOSE), shadow_index)` and so on.
pub fn derive(parent: u64, word: u64) -> u64 {
    // The counter's last word sets these draws apart from every stream of numbers.
    let out = philox(parent, [word as u32, (word >> 32) as u32, 0x6B65_7973, u32::MAX]);
    out[0] as u64 | (out[1] as u64) << 32
}

/// A key for a purpose with a name.
pub fn derive_named(parent: u64, name: &str) -> u64 {
    name.bytes().fold(derive(parent, name.len() as u64), |key, byte| derive(key, byte as u64))
}

/// The smallest word that *keeps* an element under dropout with probability `p`:
/// element i is kept when its word is `>= drop_threshold(p)`.
#[inline]
pub fn drop_threshold(p: f64) -> u32 {
    (p * 4_294_967_296.0).min(4_294_967_295.0) as u32
}

/// Standard deviation of the numbers of [`bell`].
pub const BELL_SPREAD: f64 = 295.601_082_541_996_1;
/// The last word of their counters.
const BELL_STREAM: u32 = 0x6265_6c6c;

/// Numbers `4·group` to `4·group + 3` of a key's bell-shaped numbers: odd integers from −1019 to
/// 1021, the sums of four random bytes, with mean 1 and standard deviation [`BELL_SPREAD`]. They
/// are never 0, and every device makes the same ones.
#[inline(always)]
pub fn bell(key: u64, group: u64) -> [f32; 4] {
    let number = |word: u32| {
        let sum: i32 = word.to_le_bytes().into_iter().map(i32::from).sum();
        (2 * sum - 1019) as f32
    };
    philox(key, [group as u32, (group >> 32) as u32, 0, BELL_STREAM]).map(number)
}

/// A sequential reader of one key's numbers, for host-side choices and initial weights.
#[derive(Clone, Debug)]
pub struct Stream {
    key: u64,
    block: u64,
    words: [u32; 4],
    used: usize,
}

impl Stream {
    /// The numbers of `key`, from the first.
    pub fn new(key: u64) -> Self {
        Self { key, block: 0, words: [0; 4], used: 4 }
    }

    /// The numbers of `key` from the one that [`Self::normal`] would give after `count` others.
    pub fn after_normals(key: u64, count: u64) -> Self {
        // Each takes two uniform numbers of 64 bits: one block.
        Self { block: count, ..Self::new(key) }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.words = philox(self.key, [self.block as u32, (self.block >> 32) as u32, 0, 0]);
            self.block += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.next_u32() as u64 | (self.next_u32() as u64) << 32
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..n` without bias. `n` must not be 0.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "an empty range has no element to draw");
        let n = n as u64;
        let limit = u64::MAX - u64::MAX % n;
        loop {
            let x = self.next_u64();
            if x < limit {
                return (x % n) as usize;
            }
        }
    }

    /// Standard normal (Box–Muller, one of the pair).
    pub fn normal(&mut self) -> f64 {
        let u = 1.0 - self.uniform();
        let v = self.uniform();
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// A random order of `0..n` (Fisher–Yates).
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_the_paper() {
        assert_eq!(philox(0, [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox(u64::MAX, [u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let key = 0x299f_31d0_a409_3822;
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox(key, counter), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn keys_of_different_names_differ() {
        let keys = ["dropout", "order", "init", "ini", "t"].map(|name| derive_named(7, name));
        for i in 0..keys.len() {
            for j in 0..i {
                assert_ne!(keys[i], keys[j]);
            }
        }
    }

    #[test]
    fn normals_are_found_in_the_middle() {
        let mut from_first = Stream::new(9);
        let all: Vec<f64> = (0..20).map(|_| from_first.normal()).collect();
        let mut from_there = Stream::after_normals(9, 13);
        assert!(all[13..].iter().all(|x| *x == from_there.normal()));
    }

    #[test]
    fn bell_numbers_have_their_moments_and_no_zeros() {
        let numbers: Vec<f64> = (0..10_000).flat_map(|group| bell(5, group)).map(f64::from).collect();
        assert!(numbers.iter().all(|x| x % 2.0 != 0.0 && (-1019.0..=1021.0).contains(x)));
        let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
        let square = numbers.iter().map(|x| x * x).sum::<f64>() / numbers.len() as f64;
        assert!((mean - 1.0).abs() < 6.0, "mean {mean}");
        assert!((square.sqrt() / BELL_SPREAD - 1.0).abs() < 0.01, "spread {}", square.sqrt());
        assert_ne!(bell(5, 0), bell(6, 0));
        assert_ne!(bell(5, 1), bell(5, 1 + (1 << 32)));
    }

    #[test]
    fn uniform_and_normal_have_their_moments() {
        let mut stream = Stream::new(3);
        let n = 20_000;
        let mean = (0..n).map(|_| stream.uniform()).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.01, "mean {mean}");
        let square = (0..n).map(|_| stream.normal().powi(2)).sum::<f64>() / n as f64;
        assert!((square - 1.0).abs() < 0.05, "variance {square}");
        let mut order = stream.permutation(100);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}
