//! Bias and rotary position embedding on fused q, k, v rows; and the q/k norm of Qwen3.
//!
//! A row of `qkv` is `[heads · D | kv_heads · D | kv_heads · D]`. Rotation in the
//! half-split convention of Qwen and Llama: for pair i < D/2 at position p,
//! `x'[i] = x[i]·cos − x[i+D/2]·sin`, `x'[i+D/2] = x[i+D/2]·cos + x[i]·sin`, with
//! cos and sin from row p of the tables `[max_positions, D/2]` (whatever scaling
//! the model uses is already in the tables). v is not rotated.

use crate::{Device, Real, Result};

/// Shapes of fused q, k, v rows.
#[derive(Clone, Copy, Debug)]
pub struct QkvDims {
    /// Rows.
    pub tokens: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Values per head, D; even.
    pub head_dim: usize,
}

impl QkvDims {
    /// Elements of a row.
    pub fn row(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// QKV bias and rotary embedding, in place.
pub trait Rope<X: Real>: Device {
    /// `qkv = rope(qkv + bias)`; `positions` `[tokens]`, `bias` `[row]`.
    fn rope_forward(
        &self,
        qkv: Self::ViewMut<'_, X>,
        bias: Option<Self::View<'_, X>>,
        cos: Self::View<'_, X::Acc>,
        sin: Self::View<'_, X::Acc>,
        positions: Self::View<'_, u32>,
        dims: QkvDims,
    ) -> Result<()>;

    /// `dqkv` = gradient before rotation, in place; `dbias += Σ_tokens` of it where asked for.
    fn rope_backward(
        &self,
        dqkv: Self::ViewMut<'_, X>,
        dbias: Option<Self::ViewMut<'_, X::Acc>>,
        cos: Self::View<'_, X::Acc>,
        sin: Self::View<'_, X::Acc>,
        positions: Self::View<'_, u32>,
        dims: QkvDims,
    ) -> Result<()>;
}

/// RMS norm of every query and key head, before the rotation.
pub trait QkNorm<X: Real>: Device {
    /// `y` (a qkv row each) `=`: q and k heads normalised with `w_q`, `w_k` `[D]`, v copied.
    /// `inv_rms` `[tokens, heads + kv_heads]` `=`.
    fn qk_norm_forward(
        &self,
        y: Self::ViewMut<'_, X>,
        inv_rms: Self::ViewMut<'_, X::Acc>,
        qkv: Self::View<'_, X>,
        w_q: Self::View<'_, X>,
        w_k: Self::View<'_, X>,
        dims: QkvDims,
        eps: f64,
    ) -> Result<()>;

    /// `dqkv` `=`; `dw_q`, `dw_k` `[D]` `+=` where asked for.
    fn qk_norm_backward(
        &self,
        dqkv: Self::ViewMut<'_, X>,
        dw: Option<(Self::ViewMut<'_, X::Acc>, Self::ViewMut<'_, X::Acc>)>,
        dy: Self::View<'_, X>,
        qkv: Self::View<'_, X>,
        inv_rms: Self::View<'_, X::Acc>,
        w_q: Self::View<'_, X>,
        w_k: Self::View<'_, X>,
        dims: QkvDims,
    ) -> Result<()>;
}
