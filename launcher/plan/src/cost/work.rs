//! Operations and bytes of the kinds of work that stages are made of.
//!
//! A multiplication and an addition are two operations. Only what the method needs is
//! counted: what a kernel computes twice to save memory lowers the share of the peak that it
//! is said to reach. Bytes are those of values that every step must read again; activations
//! are taken to be covered by the share.

use super::tokens::Mean;
use gradtx_models::decoder::{BlockConfig, DecoderConfig};
use gradtx_models::grad_transformer::GradTransformerConfig;
use gradtx_models::lora::BlockLayout;
use std::ops::{Add, Mul};

/// What a piece of work takes of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Operations.
    pub flops: f64,
    /// Bytes read and written.
    pub bytes: f64,
}

impl Add for Cost {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { flops: self.flops + other.flops, bytes: self.bytes + other.bytes }
    }
}

impl Mul<f64> for Cost {
    type Output = Self;
    fn mul(self, times: f64) -> Self {
        Self { flops: self.flops * times, bytes: self.bytes * times }
    }
}

/// Operations on a decoder.
#[derive(Clone, Copy, Debug)]
pub struct DecoderWork<'a> {
    /// Its sizes.
    pub model: &'a DecoderConfig,
    /// Its adapters.
    pub layout: &'a BlockLayout,
    /// Bytes of a frozen value.
    pub element: f64,
}

impl DecoderWork<'_> {
    /// N: values of the blocks' matrices, by which every token is multiplied.
    pub(crate) fn block_values(&self) -> f64 {
        self.values_from(0)
    }

    /// The same of this layer and those above.
    fn values_from(&self, layer: usize) -> f64 {
        self.model.blocks().iter().skip(layer).map(BlockConfig::matrix_values).sum::<u128>() as f64
    }

    /// Values of the LM head.
    fn head_values(&self) -> f64 {
        (self.model.hidden * self.model.vocab) as f64
    }

    /// Operations of causal attention, forward, over `pairs` of a query and a key before it:
    /// a product for the score and one for the sum.
    fn attention(&self, pairs: f64) -> f64 {
        (4 * self.model.layers * self.model.q_dim()) as f64 * pairs
    }

    /// Fine-tuning of adapters on `examples` examples, in packed streams of at most
    /// `stream_tokens`. The base is frozen, so it costs 4N and not 6N: forward, and the
    /// gradient of the input. Attention has no weights and costs three times its forward
    /// pass; an adapter of width d costs 6d per block, a frozen A 4 a value; the head only where labels are. No
    /// gradient goes below the first adapted layer.
    pub fn finetuning(&self, mean: &Mean, examples: f64, stream_tokens: usize) -> Cost {
        let trained = self.layout.trained();
        let adapters = 6.0 * trained.len() as f64 + 4.0 * trained.start as f64;
        let layer = self.layout.first_layer();
        let share_above = 1.0 - layer as f64 / self.model.layers as f64;
        let flops = mean.tokens * (2.0 * self.block_values() + 2.0 * self.values_from(layer) + adapters)
            + (1.0 + 2.0 * share_above) * self.attention(mean.pairs)
            + 4.0 * self.head_values() * mean.labels;
        let in_a_stream = (stream_tokens as f64 / mean.tokens).floor().max(1.0);
        // Every stream reads the frozen values forwards and backwards.
        let streams = (examples / in_a_stream).ceil();
        let read = 2.0 * self.element * (self.block_values() + self.head_values());
        Cost { flops: flops * examples, bytes: read * streams }
    }

    /// Reading of `examples` prompts, of which only the last token goes through the head.
    pub fn reading(&self, prompt: &Mean, examples: f64) -> Cost {
        let flops = 2.0 * self.block_values() * prompt.tokens
            + self.attention(prompt.pairs)
            + 2.0 * self.head_values();
        Cost { flops: flops * examples, bytes: 0.0 }
    }

    /// One token more for each of `rows` sequences, which have `context` tokens on average.
    pub fn decoding(&self, rows: f64, context: f64) -> Cost {
        let values = self.block_values() + self.head_values();
        let cache = (2 * self.model.layers * self.model.kv_dim()) as f64 * context;
        Cost {
            flops: rows * (2.0 * values + self.attention(context)),
            bytes: self.element * (values + rows * cache),
        }
    }

    /// Bytes of the whole model's values, as a rank holds them.
    pub fn bytes(&self) -> f64 {
        let embedding = if self.model.tied { 0.0 } else { self.head_values() };
        let positions = (self.model.position_rows() * self.model.hidden) as f64;
        self.element * (self.block_values() + self.head_values() + embedding + positions)
    }
}

/// Operations on a translator.
#[derive(Clone, Copy, Debug)]
pub struct TranslatorWork<'a> {
    /// Its sizes.
    pub config: &'a GradTransformerConfig,
    /// Its parameters, P.
    pub values: f64,
    /// Bytes of a value that is computed with.
    pub element: f64,
}

impl TranslatorWork<'_> {
    /// Forward and backward of `tuples` tuples at once: 6 operations per value and block,
    /// but 4 for the two projections whose inputs need no gradient.
    pub fn training(&self, tuples: f64) -> Cost {
        let c = self.config;
        let (d, inner, f) = (c.t5.d_model as f64, c.t5.inner() as f64, c.t5.d_ff as f64);
        let (ls, lt) = (c.student_blocks as f64, c.teacher_blocks as f64);
        let (encoder, decoder) = (c.t5.num_layers as f64, c.t5.num_decoder_layers as f64);
        let (attend, feed) = (4.0 * d * inner, 3.0 * d * f);
        // Cross-attention's keys and values are of the student's blocks.
        let student = encoder * (attend + feed) + decoder * attend / 2.0;
        let teacher = decoder * (attend + attend / 2.0 + feed) + d * c.teacher_width as f64;
        let scores = encoder * ls * ls + decoder * (lt * lt + lt * ls);
        let first = c.student_width as f64 * d * ls + c.teacher_width as f64 * d * lt;
        let flops = 6.0 * (student * ls + teacher * lt) + 12.0 * inner * scores + 4.0 * first;
        // Values are read forwards and backwards, float32 gradients read and written.
        let bytes = self.values * (2.0 * self.element + 8.0);
        Cost { flops: flops * tuples, bytes }
    }

    /// Generation of `tuples` updates at once: the forward operations, and the values once
    /// for every block.
    pub fn generating(&self, tuples: f64) -> Cost {
        let steps = self.config.teacher_blocks as f64;
        Cost { flops: self.training(tuples).flops / 3.0, bytes: self.values * self.element * steps }
    }

    /// Bytes of an optimizer step of one of `shards` shards. AdamW reads gradient, value and
    /// two moments and writes the latter three (and the copy that is computed with); the
    /// gradients' norm reads them, and the next step zeroes them.
    pub fn update(&self, shards: f64) -> Cost {
        let copy = if self.element < 4.0 { self.element } else { 0.0 };
        Cost { flops: 0.0, bytes: self.values * ((28.0 + copy + 4.0) / shards + 4.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::calibrate::published;
    use gradtx_models::grad_transformer::StartToken;
    use gradtx_models::lora::LoraConfig;
    use gradtx_models::t5::T5Config;

    fn near(found: f64, wanted: f64, part: f64) {
        assert!((found - wanted).abs() <= part * wanted, "{found} is not near {wanted}");
    }

    #[test]
    fn a_7b_model_costs_4n_per_token_and_a_head_per_label() {
        let model = published("qwen2.5-7b").unwrap();
        let layout = BlockLayout::new(&model, &LoraConfig::default()).unwrap();
        let work = DecoderWork { model: &model, layout: &layout, element: 2.0 };
        // Published: 7.61 billion parameters, 6.53 billion of them not embeddings.
        near(work.block_values(), 6.53e9, 0.01);
        near(work.bytes(), 2.0 * 7.61e9, 0.01);
        let one = Mean { tokens: 1000.0, pairs: 0.0, labels: 0.0 };
        let plain = work.finetuning(&one, 3.0, 8192).flops;
        near(plain, 3.0 * 1000.0 * 4.0 * 6.53e9, 0.01);
        let labels = Mean { labels: 10.0, ..one };
        near(work.finetuning(&labels, 3.0, 8192).flops - plain, 3.0 * 40.0 * 3584.0 * 152_064.0, 1e-9);
        let pairs = Mean { pairs: 500_500.0, ..one };
        near(work.finetuning(&pairs, 1.0, 8192).flops - plain / 3.0, 12.0 * 28.0 * 3584.0 * 500_500.0, 1e-9);
    }

    /// Of OPT's smallest model, whose MLP has two matrices, and whose positions have a table.
    #[test]
    fn opt_has_two_matrices_and_a_table_of_positions() {
        let text = r#"{"model_type": "opt", "vocab_size": 50272, "hidden_size": 768, "ffn_dim": 3072,
            "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 2048}"#;
        let model = DecoderConfig::parse(std::path::Path::new("config.json"), text).unwrap();
        let layout = BlockLayout::new(&model, &LoraConfig::default()).unwrap();
        let work = DecoderWork { model: &model, layout: &layout, element: 2.0 };
        assert_eq!(work.block_values(), 12.0 * 12.0 * 768.0 * 768.0);
        // Published: 125.2 million parameters; biases and norms are not counted here.
        near(work.bytes(), 2.0 * 125_239_296.0, 0.002);
        let one = Mean { tokens: 1000.0, pairs: 0.0, labels: 0.0 };
        near(work.finetuning(&one, 1.0, 8192).flops, 1000.0 * 4.0 * work.block_values(), 0.01);
    }

    #[test]
    fn short_streams_read_the_weights_more_often() {
        let model = published("qwen2.5-0.5b").unwrap();
        let layout = BlockLayout::new(&model, &LoraConfig::default()).unwrap();
        let work = DecoderWork { model: &model, layout: &layout, element: 2.0 };
        let mean = Mean { tokens: 100.0, pairs: 5050.0, labels: 10.0 };
        let (long, short) = (work.finetuning(&mean, 64.0, 6400), work.finetuning(&mean, 64.0, 1));
        assert_eq!(long.flops, short.flops);
        near(short.bytes, 64.0 * long.bytes, 1e-9);
        // Decoding reads all values for every token, however many rows there are.
        let one = work.decoding(1.0, 0.0);
        near(one.bytes, 2.0 * 494e6, 0.01);
        assert_eq!(work.decoding(8.0, 0.0).bytes, one.bytes);
    }

    #[test]
    fn flan_t5_large_takes_five_teraflop_a_step() {
        let config = GradTransformerConfig {
            student_width: 12_800,
            student_blocks: 36,
            teacher_width: 22_528,
            teacher_blocks: 28,
            start_token: StartToken::Embedded,
            targets: Default::default(),
            t5: T5Config::preset("large").unwrap(),
        };
        let work = TranslatorWork { config: &config, values: 0.78e9, element: 2.0 };
        near(work.training(32.0).flops, 5.0e12, 0.1);
        // An optimizer step that is spread over ranks touches less memory on each.
        assert!(work.update(8.0).bytes < work.update(1.0).bytes / 3.0);
        near(work.generating(1.0).flops, work.training(1.0).flops / 3.0, 1e-12);
    }
}
