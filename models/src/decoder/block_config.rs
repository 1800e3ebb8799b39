//! [`BlockConfig`]: what one block of a decoder is made of, with the sizes of its parts.

use gradtx_kernels::ops::{GatedKind, QkvDims};

/// The parts of a block. Blocks of one model may differ in all but the width of the residual stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockConfig {
    /// Width of the residual stream, H.
    pub hidden: usize,
    /// ε of the norm before each part, and of those within.
    pub norm_eps: f64,
    /// The first part.
    pub attention: AttentionConfig,
    /// The second part.
    pub mlp: MlpConfig,
}

/// Causal attention with rotary positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Values per head, D.
    pub head_dim: usize,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// Query and key heads are normalised before the rotation.
    pub qk_norm: bool,
}

/// A gated MLP.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MlpConfig {
    /// Width of its hidden row, F.
    pub intermediate: usize,
    /// What the gate goes through.
    pub activation: GatedKind,
}

impl AttentionConfig {
    /// Width of all query heads together, Q; columns of the input of `o_proj`.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads together, and of all value heads.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Columns of fused q, k, v rows, R.
    pub fn qkv_dim(&self) -> usize {
        self.q_dim() + 2 * self.kv_dim()
    }

    /// Shapes of the operations on so many tokens.
    pub(super) fn dims(&self, tokens: usize) -> QkvDims {
        QkvDims { tokens, heads: self.heads, kv_heads: self.kv_heads, head_dim: self.head_dim }
    }

    /// Factor on scores.
    pub(super) fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }
}
