//! The public examples that statistics are taken of, in packed streams.

use anyhow::Result;
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_run::config::Config;
use gradtx_run::failure::failed;
use gradtx_runtime::data::{BatchCapacity, Example, PackedBatch, SegmentInfo};

/// One example in so many is held out.
const HELD_OUT: usize = 8;

/// Examples for statistics, and those that the emulator is measured on.
pub(super) struct Support {
    /// Two halves of the examples: packed, each label with weight 1. The key of a segment is its example's number.
    pub halves: [Vec<PackedBatch>; 2],
    /// The same of the examples that are held out.
    pub held_out: Vec<PackedBatch>,
    pub examples: usize,
    pub tokens: usize,
    pub held_out_examples: usize,
}

impl Support {
    /// Examples in an order drawn from the seed, until there are enough tokens. All their tokens are labels.
    pub fn new(all: &[Example], config: &Config) -> Result<Self> {
        let mut order: Vec<usize> = (0..all.len()).collect();
        let mut stream = Stream::new(derive_named(config.seed, "support of the emulator"));
        for i in (1..order.len()).rev() {
            order.swap(i, stream.below(i + 1));
        }
        let mut tokens = 0;
        let mut chosen = vec![];
        for example in order.into_iter().map(|i| &all[i]).filter(|example| example.tokens.len() > 1) {
            if tokens + example.tokens.len() > config.emulator.num_tokens {
                break;
            }
            tokens += example.tokens.len();
            chosen
                .push(Example { tokens: example.tokens.clone(), trained: vec![true; example.tokens.len()] });
        }
        if chosen.len() < HELD_OUT {
            let what = format!(
                "data.public: {} examples fit into emulator.num_tokens = {}; expected at least {HELD_OUT}",
                chosen.len(),
                config.emulator.num_tokens
            );
            return Err(failed(what, "name more public data, or raise emulator.num_tokens"));
        }
        let held_out = chosen.split_off(chosen.len() - chosen.len() / HELD_OUT);
        let limit = config.device.max_tokens_per_microbatch;
        let (first, second) = chosen.split_at(chosen.len() / 2);
        Ok(Self {
            examples: chosen.len(),
            tokens: chosen.iter().map(|example| example.tokens.len()).sum(),
            held_out_examples: held_out.len(),
            halves: [packed(first, 0, limit), packed(second, first.len(), limit)],
            held_out: packed(&held_out, chosen.len(), limit),
        })
    }

    /// The streams of both halves, in order.
    pub fn streams(&self) -> impl Iterator<Item = &PackedBatch> {
        self.halves.iter().flatten()
    }

    /// Room for any of its streams.
    pub fn capacity(&self) -> BatchCapacity {
        BatchCapacity::of(self.streams())
    }

    /// Labels of each half.
    pub fn labels(&self) -> [usize; 2] {
        self.halves.each_ref().map(|half| half.iter().map(PackedBatch::labels).sum())
    }

    /// The first token of every example as an example of its own, which has no label: what the model computes for it
    /// does not depend on the tokens that follow. Streams as long as those of the examples.
    pub fn first_tokens(&self) -> Vec<PackedBatch> {
        let firsts = self.streams().flat_map(|stream| {
            let firsts = &stream.offsets[..stream.segments()];
            firsts
                .iter()
                .map(|&at| Example { tokens: vec![stream.tokens[at as usize]], trained: vec![false] })
        });
        packed(&firsts.collect::<Vec<_>>(), 0, self.capacity().tokens)
    }
}

/// Streams of at most so many tokens, or one longer example; `number` is that of the first example.
fn packed(examples: &[Example], number: usize, limit: usize) -> Vec<PackedBatch> {
    let mut streams = vec![];
    let mut open = PackedBatch::default();
    for (i, example) in examples.iter().enumerate() {
        if !open.is_empty() && open.len() + example.tokens.len() > limit {
            streams.push(std::mem::take(&mut open));
        }
        let info = SegmentInfo { key: (number + i) as u64, ..SegmentInfo::default() };
        open.push(example, info, 1.0);
    }
    streams.push(open);
    streams
}

#[cfg(test)]
mod tests {
    use super::*;

    fn support(tokens_of_stream: usize) -> Support {
        let examples: Vec<Example> = (0..40)
            .map(|i| Example {
                tokens: (i..i + 3 + i % 5).collect(),
                trained: vec![false; 3 + i as usize % 5],
            })
            .collect();
        let mut config = Config::default();
        config.device.max_tokens_per_microbatch = tokens_of_stream;
        Support::new(&examples, &config).unwrap()
    }

    #[test]
    fn halves_have_all_examples_but_the_held_out() {
        for limit in [20, 8192] {
            let found = support(limit);
            assert_eq!((found.examples, found.held_out_examples), (35, 5));
            let segments = |half: &Vec<PackedBatch>| half.iter().map(PackedBatch::segments).sum::<usize>();
            assert_eq!(found.halves.each_ref().map(segments), [17, 18]);
            let keys: Vec<u64> = found.streams().flat_map(|stream| stream.keys.clone()).collect();
            assert!(keys.iter().copied().eq(0..35));
            // Which examples are in which half does not depend on the length of streams.
            let tokens = |of: &Support| of.streams().flat_map(|s| s.tokens.clone()).collect::<Vec<_>>();
            assert_eq!(tokens(&found), tokens(&support(64)));
            assert_eq!(found.labels().iter().sum::<usize>(), found.tokens - found.examples);
        }
    }

    #[test]
    fn first_tokens_are_examples_of_their_own() {
        let found = support(20);
        let firsts = found.first_tokens();
        assert!(firsts.iter().all(|stream| stream.len() <= found.capacity().tokens));
        assert_eq!(firsts.iter().map(PackedBatch::len).sum::<usize>(), 35);
        assert!(firsts.iter().all(|stream| stream.labels() == 0 && stream.len() == stream.segments()));
        let begins: Vec<u32> = found
            .streams()
            .flat_map(|s| s.offsets[..s.segments()].iter().map(|&at| s.tokens[at as usize]))
            .collect();
        assert_eq!(firsts.iter().flat_map(|s| s.tokens.clone()).collect::<Vec<_>>(), begins);
    }
}
