//! Buckets of relative positions: nearby distances each have their own, far ones share
//! logarithmically wider ones, and everything from a maximum distance on shares the last.
//!
//! In the encoder half of the buckets are for keys after the query. In the decoder
//! keys after the query are masked; they are given bucket 0.

use super::T5Config;

/// The bucket of every (query, key) pair, `[queries, keys]` row-major.
///
/// The logarithm is taken in f32, in the order of operations of the published
/// implementation: at the edges of buckets rounding decides.
pub fn bucket_map(config: &T5Config, bidirectional: bool, queries: usize, keys: usize) -> Vec<u32> {
    let pairs = (0..queries).flat_map(|query| (0..keys).map(move |key| (query, key)));
    pairs.map(|(query, key)| bucket(config, bidirectional, key as i64 - query as i64)).collect()
}

/// The bucket of a key that lies `relative` positions after its query.
fn bucket(config: &T5Config, bidirectional: bool, relative: i64) -> u32 {
    let mut buckets = config.relative_attention_num_buckets;
    let mut first = 0;
    let distance = if bidirectional {
        buckets /= 2;
        first = if relative > 0 { buckets } else { 0 };
        relative.unsigned_abs() as usize
    } else {
        relative.min(0).unsigned_abs() as usize
    };
    let exact = buckets / 2;
    let within = if distance < exact {
        distance
    } else {
        let octaves = (config.relative_attention_max_distance as f64 / exact as f64).ln() as f32;
        let log = (distance as f32 / exact as f32).ln() / octaves * (buckets - exact) as f32;
        (exact + log as usize).min(buckets - 1)
    };
    (first + within) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (first relative position, bucket) of every run of equal buckets from -200 to 200.
    fn runs(buckets: usize, distance: usize, bidirectional: bool) -> Vec<(i64, u32)> {
        let mut config = T5Config::preset("small").unwrap();
        config.relative_attention_num_buckets = buckets;
        config.relative_attention_max_distance = distance;
        let mut runs: Vec<(i64, u32)> = Vec::new();
        for relative in -200..=200 {
            let found = bucket(&config, bidirectional, relative);
            if runs.last().is_none_or(|last| last.1 != found) {
                runs.push((relative, found));
            }
        }
        runs
    }

    // The expected runs were printed by transformers 4.55.4.

    #[test]
    fn encoder_buckets() {
        let near = [(-7, 7), (-6, 6), (-5, 5), (-4, 4), (-3, 3), (-2, 2), (-1, 1), (0, 0)];
        let before = [(-200, 15), (-90, 14), (-63, 13), (-45, 12), (-31, 11), (-22, 10), (-15, 9), (-11, 8)];
        let after = [(1, 17), (2, 18), (3, 19), (4, 20), (5, 21), (6, 22), (7, 23), (8, 24), (12, 25)];
        let far = [(16, 26), (23, 27), (32, 28), (46, 29), (64, 30), (91, 31)];
        let expected: Vec<_> = before.into_iter().chain(near).chain(after).chain(far).collect();
        assert_eq!(runs(32, 128, true), expected);
        let few = [(-200, 3), (-6, 2), (-1, 1), (0, 0), (1, 5), (2, 6), (7, 7)];
        assert_eq!(runs(8, 20, true), few);
    }

    #[test]
    fn decoder_buckets() {
        let far = [(-200, 31), (-112, 30), (-98, 29), (-86, 28), (-76, 27), (-66, 26), (-58, 25), (-51, 24)];
        let middle = [(-45, 23), (-39, 22), (-34, 21), (-30, 20), (-26, 19), (-23, 18), (-20, 17), (-18, 16)];
        let near = (-15..=0).map(|relative| (relative, -relative as u32));
        let expected: Vec<_> = far.into_iter().chain(middle).chain(near).collect();
        assert_eq!(runs(32, 128, false), expected);
        let few = [(-200, 7), (-13, 6), (-8, 5), (-5, 4), (-3, 3), (-2, 2), (-1, 1), (0, 0)];
        assert_eq!(runs(8, 20, false), few);
    }

    #[test]
    fn the_map_is_row_major() {
        let config = T5Config::preset("small").unwrap();
        assert_eq!(bucket_map(&config, true, 2, 3), [0, 17, 18, 1, 0, 17]);
        assert_eq!(bucket_map(&config, false, 2, 3), [0, 0, 0, 1, 0, 0]);
    }
}
