//! The public examples that statistics are taken of, in packed streams.

use anyhow::Result;
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_run::config::Config;
use gradtx_run::failure::failed;
use gradtx_runtime::data::{Example, PackedBatch, SegmentInfo};

/// One example in so many is held out.
const HELD_OUT: usize = 8;

/// Examples for statistics, and those that the emulator is measured on.
pub(super) struct Support {
    /// Packed, each label with weight 1. Labels are the tokens that fine-tuning trains on: it is that gradient which an
    /// emulator should keep.
    pub streams: Vec<PackedBatch>,
    /// The same of the examples that are held out.
    pub held_out: Vec<PackedBatch>,
    pub examples: usize,
    pub tokens: usize,
    pub held_out_examples: usize,
}

impl Support {
    /// Examples in an order drawn from the seed, until there are enough tokens.
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
            chosen.push(example.clone());
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
        Ok(Self {
            examples: chosen.len(),
            tokens: chosen.iter().map(|example| example.tokens.len()).sum(),
            held_out_examples: held_out.len(),
            streams: packed(&chosen, limit),
            held_out: packed(&held_out, limit),
        })
    }
}

/// Streams of at most so many tokens, or one longer example.
fn packed(examples: &[Example], limit: usize) -> Vec<PackedBatch> {
    let mut streams = vec![];
    let mut open = PackedBatch::default();
    for example in examples {
        if !open.is_empty() && open.len() + example.tokens.len() > limit {
            streams.push(std::mem::take(&mut open));
        }
        open.push(example, SegmentInfo::default(), 1.0);
    }
    streams.push(open);
    streams
}
