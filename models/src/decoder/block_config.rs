//! [`BlockConfig`]: what one block of a decoder is made of, with the sizes of its parts.

use super::module::Module;
use gradtx_kernels::ops::{GatedKind, QkvDims};

/// The parts of a block. Blocks of one model may differ in all but the width of the residual stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockConfig {
    /// Width of the residual stream, H.
    pub hidden: usize,
    /// The norm before each part.
    pub norm: NormKind,
    /// ε of the norm before each part, and of those within.
    pub norm_eps: f64,
    /// The first part.
    pub attention: AttentionConfig,
    /// The second part.
    pub mlp: MlpConfig,
}

/// A norm over a row of the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// RMS norm, with a weight.
    Rms,
    /// Layer norm, with weight and bias.
    Layer,
}

impl NormKind {
    /// Numbers that a forward pass keeps of every row.
    pub(super) fn statistics(self) -> usize {
        match self {
            Self::Rms => 1,
            Self::Layer => 2,
        }
    }
}

/// Causal attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Values per head, D.
    pub head_dim: usize,
    /// Queries and keys are rotated by their positions.
    pub is_rotary: bool,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// o has a bias.
    pub o_bias: bool,
    /// Query and key heads are normalised before the rotation.
    pub qk_norm: bool,
    /// Ranks of q, k, v and o where they are products of two thin matrices.
    pub ranks: Ranks,
}

/// An MLP.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MlpConfig {
    /// Width of its hidden row, F.
    pub intermediate: usize,
    /// What its hidden row goes through.
    pub activation: Activation,
    /// Its products have biases.
    pub has_bias: bool,
}

/// What is between the products of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `h = act(gate) ⊙ up`: the first product has two matrices.
    Gated(GatedKind),
    /// `h = max(up, 0)`.
    Relu,
}

impl MlpConfig {
    /// Matrices of the first product: gate and up, or up alone.
    pub(crate) fn first_matrices(&self) -> usize {
        match self.activation {
            Activation::Gated(_) => 2,
            Activation::Relu => 1,
        }
    }

    /// Columns of the first product's output.
    pub fn first_dim(&self) -> usize {
        self.first_matrices() * self.intermediate
    }
}

/// Ranks of the products of an attention part; 0 for one that is a whole matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Ranks {
    pub q: usize,
    pub k: usize,
    pub v: usize,
    pub o: usize,
}

impl BlockConfig {
    /// Values of its matrices, by which every token is multiplied.
    pub fn matrix_values(&self) -> u128 {
        let &Self { hidden, attention, mlp, .. } = self;
        let (q, kv, Ranks { q: of_q, k: of_k, v: of_v, o: of_o }) =
            (attention.q_dim(), attention.kv_dim(), attention.ranks);
        let [hidden, width] = [hidden, mlp.intermediate].map(|n| n as u128);
        let of = |(outputs, rank): (usize, usize)| match rank as u128 {
            0 => hidden * outputs as u128,
            rank => rank * (hidden + outputs as u128),
        };
        [(q, of_q), (kv, of_k), (kv, of_v), (q, of_o)].map(of).iter().sum::<u128>()
            + (mlp.first_matrices() as u128 + 1) * hidden * width
    }

    /// Whether it has such a module: all but MLPs without a gate have all.
    pub fn has(&self, module: Module) -> bool {
        module != Module::Gate || matches!(self.mlp.activation, Activation::Gated(_))
    }

    /// Columns between the two factors of its products, of q, k and v together or of o: the larger number.
    pub(super) fn factor_columns(&self) -> usize {
        let Ranks { q, k, v, o } = self.attention.ranks;
        (q + k + v).max(o)
    }
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
