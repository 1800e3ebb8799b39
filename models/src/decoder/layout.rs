//! Where the weights of a decoder lie in its flat buffer, and the tensors' names.
//!
//! The flat order is that of a forward pass: embedding, blocks, final norm, head. So
//! backward finishes gradients from the end of the buffer to its beginning.

use super::DecoderConfig;
use crate::lora::Projection;
use gradtx_runtime::params::{Param, ParamLayout};
use std::ops::Range;

pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const HEAD: &str = "lm_head.weight";

/// Where the weights of one block lie.
#[derive(Clone, Debug)]
pub(super) struct BlockPlaces {
    /// `[H]`
    pub(super) attention_norm: Range<usize>,
    /// `[R]`, Qwen2.
    pub(super) qkv_bias: Option<Range<usize>>,
    /// `[D]` each, Qwen3.
    pub(super) qk_norm: Option<[Range<usize>; 2]>,
    /// `[H]`
    pub(super) mlp_norm: Range<usize>,
    /// `[R, H]`, `[H, Q]`, `[2F, H]`, `[H, F]`, perhaps with room behind each row: by [`Projection`].
    pub(super) matrices: [Range<usize>; 4],
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
    pub(super) blocks: Vec<BlockPlaces>,
}

impl BlockPlaces {
    /// All weights of the block: they follow each other.
    pub(super) fn all(&self) -> Range<usize> {
        self.attention_norm.start..self.matrices[Projection::Down as usize].end
    }

    /// The weights of a (fused) product.
    pub(super) fn matrix(&self, fused: Projection) -> &Range<usize> {
        &self.matrices[fused as usize]
    }
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
    let blocks = (0..config.layers).map(|l| block_places(&mut layout, config, l, stride)).collect();
    let final_norm = layout.push([("model.norm.weight", vec![config.hidden])]);
    let head = match config.tied {
        true => embedding.clone(),
        false => layout.push([(HEAD, vec![config.vocab, config.hidden])]),
    };
    (layout, Places { embedding, blocks, final_norm, head })
}

fn block_places(
    layout: &mut ParamLayout,
    config: &DecoderConfig,
    l: usize,
    stride: RowStride,
) -> BlockPlaces {
    let (h, f, d) = (config.hidden, config.intermediate, config.head_dim);
    let parts = [("q", config.q_dim()), ("k", config.kv_dim()), ("v", config.kv_dim())];
    let name = |rest: String| format!("model.layers.{l}.{rest}");
    let matrix = |rest: &str, rows, cols| (name(format!("{rest}_proj.weight")), vec![rows, stride(cols)]);
    let vector = |rest: String, n| (name(rest), vec![n]);
    BlockPlaces {
        attention_norm: layout.push([vector("input_layernorm.weight".into(), h)]),
        qkv_bias: config
            .family
            .qkv_bias()
            .then(|| layout.push(parts.map(|(p, n)| vector(format!("self_attn.{p}_proj.bias"), n)))),
        qk_norm: config
            .family
            .qk_norm()
            .then(|| ["q", "k"].map(|p| layout.push([vector(format!("self_attn.{p}_norm.weight"), d)]))),
        mlp_norm: layout.push([vector("post_attention_layernorm.weight".into(), h)]),
        matrices: [
            layout.push(parts.map(|(p, n)| matrix(&format!("self_attn.{p}"), n, h))),
            layout.push([matrix("self_attn.o", h, config.q_dim())]),
            layout.push([matrix("mlp.gate", f, h), matrix("mlp.up", f, h)]),
            layout.push([matrix("mlp.down", h, f)]),
        ],
    }
}

/// A two-dimensional parameter that is neither embedding nor head.
pub(super) fn is_hidden_matrix(param: &Param) -> bool {
    param.shape.len() == 2 && ![EMBEDDING, HEAD].contains(&param.name.as_str())
}
