//! Launches of a decoder on a GPU in bf16: a step of adapters beside the frozen base, the reading of prompts, a token.
//!
//! Follows `gradtx_models::decoder` and `kernels/src/cuda`; a test holds it against what they launch on the emulator.

use super::adapters::Adapters;
use super::operations::Operations;
use super::work::Work;
use crate::counts::{self, Count, Sizes};
use gradtx_models::decoder::DecoderConfig;

/// Bytes of bf16.
pub(super) const X: usize = 2;
/// Rows of a chunk of the head.
const HEAD_CHUNK: usize = 1024;
/// Cached tokens of a part in decoding.
const PART: usize = 512;

/// A decoder on a device.
#[derive(Clone, Copy)]
pub(super) struct Model<'a> {
    pub config: &'a DecoderConfig,
    /// Has Hopper's own tensor-core instructions.
    pub hopper: bool,
}

/// Sequences that are generated: so many, from prompts of so many tokens, so many new ones each.
#[derive(Clone, Copy)]
pub(super) struct Sequences {
    pub batch: usize,
    pub prompt: usize,
    pub new: usize,
}

/// The kernel of attention's forward pass and those of its backward pass, and what work they are.
struct Attention {
    forward: (&'static str, Work),
    backward: (&'static [&'static str], Work),
}

impl Attention {
    /// Not by Hopper's own instructions.
    fn by(forward: &'static str, backward: &'static [&'static str]) -> Self {
        Self { forward: (forward, Work::AttentionForward), backward: (backward, Work::AttentionBackward) }
    }
}

impl<'a> Model<'a> {
    pub(super) fn sizes(&self, tokens: usize) -> Sizes {
        Sizes { tokens, hidden: self.config.hidden, x: X }
    }

    /// A step of adapters on examples of these lengths.
    pub fn finetune(&self, lengths: &[usize], adapters: &Adapters<'a>) -> Operations {
        let mut all = Operations::default();
        let tokens: usize = lengths.iter().sum();
        let sizes = self.sizes(tokens);
        all.add(1, "gather_rows", sizes.embedding(), Work::Pass);
        adapters.forward(&mut all, self, tokens);
        self.attention_forward(&mut all, lengths);
        self.mlp_forward(&mut all, tokens);
        all.add(1, "rmsnorm_forward", sizes.norm(), Work::Rows);
        self.head(&mut all, tokens, tokens - lengths.len());
        all.add(1, "rmsnorm_backward", sizes.norm_backward(), Work::Rows);
        self.mlp_backward(&mut all, tokens);
        self.attention_backward(&mut all, lengths);
        adapters.backward(&mut all, self, tokens, lengths.len());
        adapters.optimizer(&mut all);
        all
    }

    /// Reading of the prompts, all in one stream, and a first token for each.
    pub fn prompts(&self, sequences: Sequences) -> Operations {
        let (mut all, lengths) = (Operations::default(), vec![sequences.prompt; sequences.batch]);
        let tokens = sequences.batch * sequences.prompt;
        self.plain_projection(&mut all, tokens);
        self.attention_forward(&mut all, &lengths);
        let cached = Count::bytes((4 * tokens * self.config.kv_dim() * X) as f64);
        all.add(self.config.layers, "cache_store", cached, Work::Rows);
        self.mlp_forward(&mut all, tokens);
        self.next_tokens(&mut all, sequences.batch);
        all
    }

    /// One more token for every sequence, as an average over all after the first.
    pub fn token(&self, sequences: Sequences) -> Operations {
        let (mut all, rows) = (Operations::default(), sequences.batch);
        self.plain_projection(&mut all, rows);
        self.rotation_forward(&mut all, rows);
        self.decode_attention(&mut all, sequences);
        all.product(self.config.layers, (rows, self.config.hidden, self.config.q_dim()), X);
        self.mlp_forward(&mut all, rows);
        self.next_tokens(&mut all, rows);
        all
    }

    /// Embedding, norm and q, k, v without adapters.
    fn plain_projection(&self, all: &mut Operations, tokens: usize) {
        let (sizes, layers) = (self.sizes(tokens), self.config.layers);
        all.add(1, "gather_rows", sizes.embedding(), Work::Pass);
        all.add(layers, "rmsnorm_forward", sizes.norm(), Work::Rows);
        all.product(layers, (tokens, self.config.qkv_dim(), self.config.hidden), X);
    }

    fn rotation_forward(&self, all: &mut Operations, tokens: usize) {
        let (sizes, config) = (self.sizes(tokens), self.config);
        let (row, block) = (config.qkv_dim(), config.block().attention);
        if block.qk_norm {
            all.add(config.layers, "qk_norm_forward", sizes.head_norm(row), Work::Rows);
        }
        let count =
            if block.qkv_bias { sizes.rotation(row) } else { sizes.rotation_backward(row, config.kv_dim()) };
        all.add(config.layers, "rope_forward", count, Work::Rows);
    }

    fn attention_forward(&self, all: &mut Operations, lengths: &[usize]) {
        let (config, tokens) = (self.config, lengths.iter().sum());
        self.rotation_forward(all, tokens);
        let Attention { forward: (name, work), .. } = self.attention_kernels();
        let (row, q) = (config.qkv_dim(), config.q_dim());
        let moved = self.sizes(tokens).attention_moves(row, q);
        let count = counts::attention(counts::causal_pairs(lengths), q) + moved;
        all.add(config.layers, name, count, work);
        all.product(config.layers, (tokens, config.hidden, q), X);
    }

    fn attention_backward(&self, all: &mut Operations, lengths: &[usize]) {
        let (config, tokens) = (self.config, lengths.iter().sum());
        let (layers, row, q) = (config.layers, config.qkv_dim(), config.q_dim());
        let sizes = self.sizes(tokens);
        all.product(layers, (tokens, q, config.hidden), X);
        all.add(layers, "attention_delta", sizes.attention_delta(q), Work::Rows);
        let Attention { backward: (names, work), .. } = self.attention_kernels();
        let whole = counts::attention_backward(counts::causal_pairs(lengths), q)
            + sizes.attention_backward_moves(row, q);
        let part = 1.0 / names.len() as f64;
        let count = Count { flops: part * whole.flops, bytes: part * whole.bytes };
        names.iter().for_each(|name| all.add(layers, *name, count, work));
        all.add(layers, "rope_backward", sizes.rotation_backward(row, config.kv_dim()), Work::Rows);
        if config.block().attention.qk_norm {
            all.add(layers, "qk_norm_backward", sizes.head_norm_backward(row), Work::Rows);
        }
    }

    fn attention_kernels(&self) -> Attention {
        match (self.config.head_dim, self.hopper) {
            (128, true) => Attention {
                forward: ("flash_hopper_forward", Work::HopperAttentionForward),
                backward: (&["flash_hopper_backward"], Work::HopperAttentionBackward),
            },
            (128, false) => Attention::by("flash_forward_128", &["flash_backward_128"]),
            (64, _) => Attention::by("flash_forward_64", &["flash_backward_64"]),
            _ => Attention::by("attention_forward", &["attention_backward_q", "attention_backward_kv"]),
        }
    }

    fn decode_attention(&self, all: &mut Operations, sequences: Sequences) {
        let (config, Sequences { batch, prompt, new }) = (self.config, sequences);
        let (layers, capacity) = (config.layers, prompt + new);
        let pairs = batch as f64 * (prompt as f64 + new as f64 / 2.0);
        let count = counts::decode_attention(pairs, config.q_dim(), config.kv_dim(), X);
        let (tiles, combine) = match config.head_dim {
            64 => ("attention_decode_tiles_64", "attention_decode_combine_64"),
            128 => ("attention_decode_tiles_128", "attention_decode_combine_128"),
            dim => {
                all.add(layers, "cache_append", Count::default(), Work::Rows);
                let name = if dim < 64 { "attention_decode_64" } else { "attention_decode_256" };
                let name = if (65..128).contains(&dim) { "attention_decode_128" } else { name };
                return all.add(layers, name, count, Work::DecodeAttention);
            }
        };
        all.add(layers, tiles, count, Work::DecodeAttention);
        let parts = capacity.div_ceil(PART);
        if parts > 1 {
            let sums = counts::sums_over_tiles(parts, batch * config.heads * config.head_dim);
            all.add(layers, combine, sums, Work::Rows);
        }
    }

    /// The second part of all blocks, whose projections are not adapted.
    fn mlp_forward(&self, all: &mut Operations, tokens: usize) {
        let (sizes, config) = (self.sizes(tokens), self.config);
        let (layers, h, f) = (config.layers, config.hidden, config.intermediate);
        all.add(layers, "rmsnorm_forward", sizes.norm(), Work::Rows);
        all.product(layers, (tokens, 2 * f, h), X);
        all.add(layers, "silu_forward", sizes.gated(f), Work::Pass);
        all.product(layers, (tokens, h, f), X);
    }

    fn mlp_backward(&self, all: &mut Operations, tokens: usize) {
        let (sizes, config) = (self.sizes(tokens), self.config);
        let (layers, h, f) = (config.layers, config.hidden, config.intermediate);
        all.product(layers, (tokens, f, h), X);
        all.add(layers, "silu_backward", sizes.gated_backward(f), Work::Pass);
        all.product(layers, (tokens, h, 2 * f), X);
        all.add(layers, "rmsnorm_backward", sizes.norm_backward(), Work::Rows);
    }

    /// The head with its gradient, chunk by chunk.
    fn head(&self, all: &mut Operations, tokens: usize, labels: usize) {
        let (h, v) = (self.config.hidden, self.config.vocab);
        all.add(1, "set memory", counts::set(tokens * h, X as f64), Work::Pass);
        for rows in chunks(labels) {
            let moved = self.sizes(rows).embedding();
            all.add(1, "gather_rows", moved, Work::Pass);
            all.product(1, (rows, v, h), X);
            all.add(1, "cross_entropy", counts::cross_entropy(rows, v, X), Work::Rows);
            all.product(1, (rows, h, v), X);
            all.add(1, "scatter_rows", moved, Work::Pass);
        }
    }

    /// The most probable next token of every row.
    fn next_tokens(&self, all: &mut Operations, rows: usize) {
        let (h, v) = (self.config.hidden, self.config.vocab);
        for rows in chunks(rows) {
            let sizes = self.sizes(rows);
            all.add(1, "gather_rows", sizes.embedding(), Work::Pass);
            all.add(1, "rmsnorm_forward", sizes.norm(), Work::Rows);
            all.product(1, (rows, v, h), X);
            all.add(1, "argmax", counts::set(rows * v, X as f64), Work::Rows);
        }
    }
}

/// Rows of the chunks of so many.
fn chunks(rows: usize) -> impl Iterator<Item = usize> {
    (0..rows).step_by(HEAD_CHUNK).map(move |first| HEAD_CHUNK.min(rows - first))
}
