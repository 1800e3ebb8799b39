//! Where the weights of a decoder lie in its flat buffer, and the tensors' names.
//!
//! The flat order is that of a forward pass: embedding, blocks, final norm, head. So
//! backward finishes gradients from the end of the buffer to its beginning.

use super::attention::Attention;
use super::family::Positions;
use super::mlp::Mlp;
use super::names::{HEAD, LayerNames};
use super::norm::Norm;
use super::product::Product;
use super::{BlockConfig, DecoderConfig};
use crate::lora::{Module, Projection};
use gradtx_runtime::params::{Param, ParamLayout};
use std::ops::Range;

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
    /// `[positions, H]`, where positions are learned.
    pub(super) positions: Option<Range<usize>>,
    pub(super) final_norm: Norm,
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
    let (names, hidden) = (config.family.names(), config.hidden);
    let embedding = layout.push([(names.embedding(), vec![config.vocab, hidden])]);
    let positions = match config.family.traits().positions {
        Positions::Rotary => None,
        Positions::Learned { offset } => {
            let table = layout.push([(names.positions(), vec![config.position_rows(), hidden])]);
            // Nobody reads the rows before those of the positions.
            Some(table.start + offset * hidden..table.end)
        }
    };
    let blocks = config.blocks();
    let blocks = blocks.iter().enumerate();
    let of_layer = |layer| LayerNames { family: config.family, layer };
    let blocks = blocks.map(|(l, block)| Block::new(&mut layout, block, of_layer(l), stride)).collect();
    let final_norm = Norm::new(&mut layout, &names.final_norm(), &config.block());
    let head = match config.tied {
        true => embedding.clone(),
        false => layout.push([(HEAD, vec![config.vocab, config.hidden])]),
    };
    (layout, Places { embedding, positions, blocks, final_norm, head })
}

impl Block {
    /// Defines the weights of a block: norms and biases, then matrices, each in the order of a forward pass.
    fn new(layout: &mut ParamLayout, config: &BlockConfig, names: LayerNames, stride: RowStride) -> Self {
        let &BlockConfig { attention, mlp, .. } = config;
        let of_family = names.family.names();
        let attention_norm = Norm::new(layout, &names.below(of_family.attention_norm), config);
        let bias = |layout: &mut ParamLayout, projection: Projection, is_there: bool| {
            let vector = |module: Module| {
                let up = if module.rank(&attention.ranks) > 0 { ".up" } else { "" };
                (names.of(module, &format!("{up}.bias")), vec![module.outputs(config).len()])
            };
            is_there.then(|| layout.push(projection.modules(config).map(vector)))
        };
        let qkv_bias = bias(layout, Projection::Qkv, attention.qkv_bias);
        let (rotated_bias, qkv_bias) = if attention.is_rotary { (qkv_bias, None) } else { (None, qkv_bias) };
        let o_bias = bias(layout, Projection::O, attention.o_bias);
        let mut head_norm = |part: &str| {
            let weight = (names.below(&format!("self_attn.{part}_norm.weight")), vec![attention.head_dim]);
            layout.push([weight])
        };
        let qk_norm = attention.qk_norm.then(|| [head_norm("q"), head_norm("k")]);
        let mlp_norm = Norm::new(layout, &names.below(of_family.mlp_norm), config);
        let [first_bias, down_bias] =
            [Projection::GateUp, Projection::Down].map(|product| bias(layout, product, mlp.has_bias));
        let mut product = |projection, bias| Product::new(layout, config, projection, bias, names, stride);
        let (qkv, o) = (product(Projection::Qkv, qkv_bias), product(Projection::O, o_bias));
        let (gate_up, down) = (product(Projection::GateUp, first_bias), product(Projection::Down, down_bias));
        Self {
            attention: Attention { config: attention, norm: attention_norm, rotated_bias, qk_norm, qkv, o },
            mlp: Mlp { config: mlp, norm: mlp_norm, gate_up, down },
        }
    }
}

/// A two-dimensional parameter inside the blocks: neither an embedding nor the head.
pub(super) fn is_hidden_matrix(config: &DecoderConfig, param: &Param) -> bool {
    param.shape.len() == 2 && param.name.starts_with(&config.family.layers())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::Family;
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
        let names = |layer| LayerNames { family: Family::Qwen3, layer };
        let first = Block::new(&mut layout, &block, names(0), contiguous);
        assert!(first.attention.qk_norm.is_some() && first.attention.rotated_bias.is_none());
        block.mlp.intermediate = 10;
        (block.attention.qk_norm, block.attention.qkv_bias) = (false, true);
        let second = Block::new(&mut layout, &block, names(1), contiguous);
        assert!(second.attention.qk_norm.is_none());
        assert_eq!(second.attention.rotated_bias.as_ref().map(Range::len), Some(24 + 2 * 12));
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
