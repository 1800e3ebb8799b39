//! Where the weights of a decoder lie in its flat buffer, and the tensors' names.
//!
//! The flat order is that of a forward pass: embedding, blocks, final norm, head. So
//! backward finishes gradients from the end of the buffer to its beginning.

use super::attention::Attention;
use super::mlp::Mlp;
use super::norm::Norm;
use super::product::Product;
use super::{BlockConfig, DecoderConfig};
use crate::lora::{Module, Projection};
use gradtx_runtime::params::{Param, ParamLayout};
use std::ops::Range;

pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const HEAD: &str = "lm_head.weight";

/// The parts of one block.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) attention: Attention,
    pub(super) mlp: Mlp,
}

/// Where all weights lie in the buffer.
#[derive(Clone, Debug)]
pub(super) struct Places {
    /// `[V, H]`
    pub(super) embedding: Range<usize>,
    /// `[H]`
    pub(super) final_norm: Range<usize>,
    /// `[V, H]`; the embedding's when tied.
    pub(super) head: Range<usize>,
    pub(super) blocks: Vec<Block>,
}

/// Elements from one row of a matrix inside the blocks to the next, by its columns.
pub(super) type RowStride = fn(usize) -> usize;

/// That of a trainable decoder.
pub(super) fn contiguous(cols: usize) -> usize {
    cols
}

/// Layout and places of a buffer whose rows are so far apart: shapes have that many columns.
pub(super) fn places(config: &DecoderConfig, stride: RowStride) -> (ParamLayout, Places) {
    let mut layout = ParamLayout::new();
    let embedding = layout.push([(EMBEDDING, vec![config.vocab, config.hidden])]);
    let blocks = config.blocks();
    let blocks = blocks.iter().enumerate();
    let blocks = blocks.map(|(l, block)| Block::new(&mut layout, block, l, stride)).collect();
    let final_norm = layout.push([("model.norm.weight", vec![config.hidden])]);
    let head = match config.tied {
        true => embedding.clone(),
        false => layout.push([(HEAD, vec![config.vocab, config.hidden])]),
    };
    (layout, Places { embedding, blocks, final_norm, head })
}

impl Block {
    /// Defines the weights of a block: norms and biases, then matrices, each in the order of a forward pass.
    fn new(layout: &mut ParamLayout, config: &BlockConfig, l: usize, stride: RowStride) -> Self {
        let &BlockConfig { hidden: h, attention, mlp, .. } = config;
        let (q_dim, kv_dim) = (attention.q_dim(), attention.kv_dim());
        let name = |rest: &str| format!("model.layers.{l}.{rest}");
        let parts = [(Module::Q, q_dim), (Module::K, kv_dim), (Module::V, kv_dim)];
        let attention_norm = Norm::new(layout, name("input_layernorm.weight"), h);
        let qkv_bias = attention.qkv_bias.then(|| {
            layout.push(parts.map(|(module, n)| {
                let up = if module.rank(&attention.ranks) > 0 { ".up" } else { "" };
                (name(&format!("{}{up}.bias", module.path())), vec![n])
            }))
        });
        let mut head_norm = |part: &str| {
            let weight = (name(&format!("self_attn.{part}_norm.weight")), vec![attention.head_dim]);
            layout.push([weight])
        };
        let qk_norm = attention.qk_norm.then(|| [head_norm("q"), head_norm("k")]);
        let mlp_norm = Norm::new(layout, name("post_attention_layernorm.weight"), h);
        let mut product = |projection| Product::new(layout, config, projection, name, stride);
        let [qkv, o] = [Projection::Qkv, Projection::O].map(&mut product);
        let [gate_up, down] = [Projection::GateUp, Projection::Down].map(&mut product);
        Self {
            attention: Attention { config: attention, norm: attention_norm, qkv_bias, qk_norm, qkv, o },
            mlp: Mlp { config: mlp, norm: mlp_norm, gate_up, down },
        }
    }
}

/// A two-dimensional parameter that is neither embedding nor head.
pub(super) fn is_hidden_matrix(param: &Param) -> bool {
    param.shape.len() == 2 && ![EMBEDDING, HEAD].contains(&param.name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::product::Weight;
    use std::path::Path;

    fn whole(product: &Product) -> Range<usize> {
        match &product.weight {
            Weight::Whole(range) => range.clone(),
            Weight::Factored(_) => panic!("it is in factors"),
        }
    }

    /// Blocks of one model may be of different parts and widths.
    #[test]
    fn a_block_has_the_weights_of_its_parts() {
        let text = r#"{"model_type": "qwen3", "vocab_size": 11, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
            "max_position_embeddings": 64}"#;
        let mut block = DecoderConfig::parse(Path::new("config.json"), text).unwrap().block();
        let mut layout = ParamLayout::new();
        let first = Block::new(&mut layout, &block, 0, contiguous);
        assert!(first.attention.qk_norm.is_some() && first.attention.qkv_bias.is_none());
        block.mlp.intermediate = 10;
        (block.attention.qk_norm, block.attention.qkv_bias) = (false, true);
        let second = Block::new(&mut layout, &block, 1, contiguous);
        assert!(second.attention.qk_norm.is_none());
        assert_eq!(second.attention.qkv_bias.as_ref().map(Range::len), Some(24 + 2 * 12));
        assert_eq!(
            (whole(&first.mlp.gate_up).len(), whole(&second.mlp.gate_up).len()),
            (2 * 24 * 16, 2 * 10 * 16)
        );
        assert!(whole(&first.mlp.down).end <= second.attention.norm.weight.start);
        assert_eq!(whole(&second.mlp.down).end, layout.total());
        let shape = |name: &str| layout.get(&format!("model.layers.{name}.weight")).map(|p| p.shape.clone());
        assert_eq!(shape("0.mlp.down_proj"), Some(vec![16, 24]));
        assert_eq!(shape("1.mlp.down_proj"), Some(vec![16, 10]));
        assert_eq!((shape("0.self_attn.q_norm"), shape("1.self_attn.q_norm")), (Some(vec![6]), None));
    }
}
