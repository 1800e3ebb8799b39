//! Causal attention within the segments of a packed stream, grouped key/value heads.
//!
//! For head h (its key/value head is `h / (heads / kv_heads)`), token t, and all
//! tokens u ≤ t of the same segment: `p[t, u] = softmax_u(scale · q[t]·k[u])`,
//! `o[t] = Σ_u p[t, u] v[u]`. Probabilities are not kept: backward computes them
//! again from `lse[t] = ln Σ_u exp(scale · q[t]·k[u])`, and uses
//! `delta[t] = do[t]·o[t]`: `ds = p ⊙ (do vᵀ − delta)`.

use super::QkvDims;
use crate::{Device, Real, Result};

/// Shapes of packed attention.
#[derive(Clone, Copy, Debug)]
pub struct AttentionDims {
    /// Tokens, heads and head size; rows of qkv.
    pub qkv: QkvDims,
    /// Segments, S.
    pub segments: usize,
    /// Factor of the scores, usually 1/√D.
    pub scale: f64,
    /// Row stride of o and do (at least heads · D).
    pub o_stride: usize,
}

/// Shapes of one-token decoding. A cache is `[slots, capacity, kv_heads · D]`.
#[derive(Clone, Copy, Debug)]
pub struct DecodeDims {
    /// Rows of qkv (one new token each), heads and head size.
    pub qkv: QkvDims,
    /// Tokens that a slot can hold.
    pub capacity: usize,
    /// Slots of the cache.
    pub slots: usize,
    /// Factor of the scores.
    pub scale: f64,
}

/// Packed causal attention.
pub trait Attention<X: Real>: Device {
    /// `o` `[T, heads · D]` `=`, `lse` `[heads, T]` `=`; `offsets` `[S + 1]`.
    fn attention_forward(
        &self,
        o: Self::ViewMut<'_, X>,
        lse: Self::ViewMut<'_, X::Acc>,
        qkv: Self::View<'_, X>,
        offsets: Self::View<'_, u32>,
        dims: AttentionDims,
    ) -> Result<()>;

    /// `dqkv` `=`; `delta` `[heads, T]` is scratch.
    fn attention_backward(
        &self,
        dqkv: Self::ViewMut<'_, X>,
        delta: Self::ViewMut<'_, X::Acc>,
        d_o: Self::View<'_, X>,
        o: Self::View<'_, X>,
        lse: Self::View<'_, X::Acc>,
        qkv: Self::View<'_, X>,
        offsets: Self::View<'_, u32>,
        dims: AttentionDims,
    ) -> Result<()>;

    /// Copies keys and values of packed prompts into a cache: segment i's tokens go to
    /// positions 0… of slot `slot[i]`. Other positions keep what they held.
    fn cache_store(
        &self,
        k_cache: Self::ViewMut<'_, X>,
        v_cache: Self::ViewMut<'_, X>,
        qkv: Self::View<'_, X>,
        offsets: Self::View<'_, u32>,
        slot: Self::View<'_, u32>,
        dims: DecodeDims,
    ) -> Result<()>;

    /// One new token per row: stores its k and v at `position[i]` of slot `slot[i]`, then
    /// attends to positions 0..=position. `o` `[rows, heads · D]` `=`.
    fn attention_decode(
        &self,
        o: Self::ViewMut<'_, X>,
        k_cache: Self::ViewMut<'_, X>,
        v_cache: Self::ViewMut<'_, X>,
        qkv: Self::View<'_, X>,
        slot: Self::View<'_, u32>,
        position: Self::View<'_, u32>,
        dims: DecodeDims,
    ) -> Result<()>;
}
