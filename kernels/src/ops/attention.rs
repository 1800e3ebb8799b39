//! Causal attention within the segments of a packed stream, grouped key/value heads.
//!
//! For head h (its key/value head is `h / (heads / kv_heads)`), token t, and all
//! tokens u ≤ t of the same segment: `p[t, u] = softmax_u(scale · q[t]·k[u])`,
//! `o[t] = Σ_u p[t, u] v[u]`. Probabilities are not kept: backward computes them
//! again from `lse[t] = ln Σ_u exp(scale · q[t]·k[u])`, and uses
//! `delta[t] = do[t]·o[t]`: `ds = p ⊙ (do vᵀ − delta)`.

use super::QkvDims;
use crate::error::{expect_len, expect_rows};
use crate::{Device, Error, Real, Result, View, ViewMut};

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

/// Fails unless heads can be grouped and qkv has its rows.
fn check_qkv(op: &'static str, qkv: usize, dims: &QkvDims) -> Result<()> {
    let QkvDims { heads, kv_heads, head_dim, .. } = *dims;
    if kv_heads == 0 || head_dim == 0 || !heads.is_multiple_of(kv_heads) {
        let why = format!("{heads} heads of {head_dim} on {kv_heads} key/value heads");
        return Err(Error::Unsupported { op, why });
    }
    expect_len(op, "qkv", qkv, dims.tokens * dims.row())
}

/// Fails unless caches hold their slots.
fn check_caches(op: &'static str, k: usize, v: usize, dims: &DecodeDims) -> Result<()> {
    let cache = dims.slots * dims.capacity * dims.qkv.kv_heads * dims.qkv.head_dim;
    expect_len(op, "k_cache", k, cache)?;
    expect_len(op, "v_cache", v, cache)
}

/// Arguments of [`Attention::attention_forward`].
pub struct AttentionForward<'o, 'lse, 'qkv, 'offsets, D: Device, X: Real> {
    /// `[T, heads · D]` at `dims.o_stride`, `=`.
    pub o: D::ViewMut<'o, X>,
    /// `[heads, T]` `=`.
    pub lse: D::ViewMut<'lse, X::Acc>,
    /// `[T, row]`.
    pub qkv: D::View<'qkv, X>,
    /// `[S + 1]`: first token of each segment, then T.
    pub offsets: D::View<'offsets, u32>,
    /// Shapes.
    pub dims: AttentionDims,
}

impl<D: Device, X: Real> AttentionForward<'_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "attention_forward";
        let QkvDims { tokens, heads, head_dim, .. } = self.dims.qkv;
        check_qkv(OP, self.qkv.len(), &self.dims.qkv)?;
        expect_rows(OP, "o", self.o.len(), tokens, heads * head_dim, self.dims.o_stride)?;
        expect_len(OP, "lse", self.lse.len(), heads * tokens)?;
        expect_len(OP, "offsets", self.offsets.len(), self.dims.segments + 1)
    }
}

/// Arguments of [`Attention::attention_backward`].
pub struct AttentionBackward<'dqkv, 'delta, 'd_o, 'o, 'lse, 'qkv, 'offsets, D: Device, X: Real> {
    /// `[T, row]` `=`.
    pub dqkv: D::ViewMut<'dqkv, X>,
    /// `[heads, T]`, scratch.
    pub delta: D::ViewMut<'delta, X::Acc>,
    /// `[T, heads · D]` at `dims.o_stride`.
    pub d_o: D::View<'d_o, X>,
    /// The output of the forward pass.
    pub o: D::View<'o, X>,
    /// `[heads, T]`, as the forward pass left it.
    pub lse: D::View<'lse, X::Acc>,
    /// `[T, row]`.
    pub qkv: D::View<'qkv, X>,
    /// `[S + 1]`.
    pub offsets: D::View<'offsets, u32>,
    /// Shapes.
    pub dims: AttentionDims,
}

impl<D: Device, X: Real> AttentionBackward<'_, '_, '_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "attention_backward";
        let QkvDims { tokens, heads, head_dim, .. } = self.dims.qkv;
        check_qkv(OP, self.qkv.len(), &self.dims.qkv)?;
        expect_len(OP, "dqkv", self.dqkv.len(), self.qkv.len())?;
        expect_rows(OP, "d_o", self.d_o.len(), tokens, heads * head_dim, self.dims.o_stride)?;
        expect_rows(OP, "o", self.o.len(), tokens, heads * head_dim, self.dims.o_stride)?;
        expect_len(OP, "delta", self.delta.len(), heads * tokens)?;
        expect_len(OP, "lse", self.lse.len(), heads * tokens)?;
        expect_len(OP, "offsets", self.offsets.len(), self.dims.segments + 1)
    }
}

/// Arguments of [`Attention::cache_store`].
pub struct CacheStore<'k_cache, 'v_cache, 'qkv, 'offsets, 'slot, D: Device, X: Real> {
    /// `[slots, capacity, kv_heads · D]`.
    pub k_cache: D::ViewMut<'k_cache, X>,
    /// As `k_cache`.
    pub v_cache: D::ViewMut<'v_cache, X>,
    /// `[T, row]`.
    pub qkv: D::View<'qkv, X>,
    /// `[S + 1]`: first token of each prompt, then T.
    pub offsets: D::View<'offsets, u32>,
    /// `[S]`: where segment i is stored, from position 0.
    pub slot: D::View<'slot, u32>,
    /// Shapes.
    pub dims: DecodeDims,
}

impl<D: Device, X: Real> CacheStore<'_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "cache_store";
        check_qkv(OP, self.qkv.len(), &self.dims.qkv)?;
        expect_len(OP, "offsets", self.offsets.len(), self.slot.len() + 1)?;
        check_caches(OP, self.k_cache.len(), self.v_cache.len(), &self.dims)
    }
}

/// Arguments of [`Attention::attention_decode`].
pub struct AttentionDecode<'o, 'k_cache, 'v_cache, 'qkv, 'slot, 'position, D: Device, X: Real> {
    /// `[rows, heads · D]` `=`.
    pub o: D::ViewMut<'o, X>,
    /// `[slots, capacity, kv_heads · D]`.
    pub k_cache: D::ViewMut<'k_cache, X>,
    /// As `k_cache`.
    pub v_cache: D::ViewMut<'v_cache, X>,
    /// `[rows, row]`, one new token each.
    pub qkv: D::View<'qkv, X>,
    /// `[rows]`.
    pub slot: D::View<'slot, u32>,
    /// `[rows]`: the new token's place in its slot.
    pub position: D::View<'position, u32>,
    /// Shapes.
    pub dims: DecodeDims,
}

impl<D: Device, X: Real> AttentionDecode<'_, '_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "attention_decode";
        let QkvDims { tokens: rows, heads, head_dim, .. } = self.dims.qkv;
        check_qkv(OP, self.qkv.len(), &self.dims.qkv)?;
        expect_len(OP, "o", self.o.len(), rows * heads * head_dim)?;
        check_caches(OP, self.k_cache.len(), self.v_cache.len(), &self.dims)?;
        expect_len(OP, "slot", self.slot.len(), rows)?;
        expect_len(OP, "position", self.position.len(), rows)
    }
}

/// Packed causal attention.
pub trait Attention<X: Real>: Device {
    /// o, and `lse` for the backward pass.
    fn attention_forward(&self, args: AttentionForward<Self, X>) -> Result<()>;

    /// Gradients of q, k and v.
    fn attention_backward(&self, args: AttentionBackward<Self, X>) -> Result<()>;

    /// Copies keys and values of packed prompts into a cache: segment i's tokens go to
    /// positions 0… of slot `slot[i]`. Other positions keep what they held.
    fn cache_store(&self, args: CacheStore<Self, X>) -> Result<()>;

    /// One new token per row: stores its k and v at `position[i]` of slot `slot[i]`, then
    /// attends to positions 0..=position.
    fn attention_decode(&self, args: AttentionDecode<Self, X>) -> Result<()>;
}
