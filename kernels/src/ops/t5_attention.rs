//! T5 attention over short sequences: relative-position bias, no scaling of scores.
//!
//! `q` is `[B, Tq, H·D]`; `kv` holds keys and values side by side, `[B, Tk, 2·H·D]`.
//! `p = softmax(q kᵀ + bias)` over the keys, under a causal mask if asked for;
//! `o = drop(p) v`. The bias of head h between query i and key j is
//! `table[map[i, j], h]`: the table is trained, the map of buckets is not.
//!
//! Dropout on probabilities: the element of (head h, query i, key j) of example b is
//! kept when word `j % 4` of `philox(keys[b], [h · Tq + i, j / 4, site, DROPOUT_STREAM])`
//! passes, as in [`super::LoraLinear`].

use crate::{Device, Real, Result};

/// Shapes of T5 attention.
#[derive(Clone, Copy, Debug)]
pub struct T5AttentionDims {
    /// Examples, B.
    pub batch: usize,
    /// Queries per example.
    pub queries: usize,
    /// Keys per example.
    pub keys: usize,
    /// Rows of `kv` from one example to the next; more than `keys` when kv is a cache.
    pub kv_rows: usize,
    /// Heads.
    pub heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// Query i sees keys `0..=i` only.
    pub causal: bool,
    /// Dropout probability; 0 outside training.
    pub dropout: f64,
    /// Number of this attention's dropout masks.
    pub site: u32,
}

/// Relative-position bias: trained table `[buckets, H]` and the bucket of every pair `[Tq, Tk]`.
pub struct BucketMap<'a, D: Device, X: Real> {
    /// `[buckets, H]`.
    pub table: D::View<'a, X>,
    /// `[Tq, Tk]`, each below `buckets`.
    pub map: D::View<'a, u32>,
    /// Rows of the table.
    pub buckets: usize,
}

impl<D: Device, X: Real> Clone for BucketMap<'_, D, X> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device, X: Real> Copy for BucketMap<'_, D, X> {}

/// T5 attention, forward and backward. Decoding is a forward with one query on a cache.
pub trait T5Attention<X: Real>: Device {
    /// `o` `[B, Tq, H·D]` `=`; `probs` `[B, H, Tq, Tk]` `=` (before dropout; masked ones are 0).
    /// `keys` `[B]` are the examples' random keys; unused without dropout.
    fn t5_attention_forward(
        &self,
        o: Self::ViewMut<'_, X>,
        probs: Self::ViewMut<'_, X>,
        q: Self::View<'_, X>,
        kv: Self::View<'_, X>,
        bias: Option<BucketMap<'_, Self, X>>,
        keys: Self::View<'_, u64>,
        dims: T5AttentionDims,
    ) -> Result<()>;

    /// `dq` `=`, `dkv` `=`, `d_table` `[buckets, H]` `+=` (with the map of `bias`, which must
    /// be there too); `d_scores` `[B, H, Tq, Tk]` is scratch. `kv_rows` must equal `keys`.
    fn t5_attention_backward(
        &self,
        dq: Self::ViewMut<'_, X>,
        dkv: Self::ViewMut<'_, X>,
        d_table: Option<Self::ViewMut<'_, X::Acc>>,
        d_scores: Self::ViewMut<'_, X>,
        d_o: Self::View<'_, X>,
        probs: Self::View<'_, X>,
        q: Self::View<'_, X>,
        kv: Self::View<'_, X>,
        bias: Option<BucketMap<'_, Self, X>>,
        keys: Self::View<'_, u64>,
        dims: T5AttentionDims,
    ) -> Result<()>;
}
