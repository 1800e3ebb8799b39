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

use super::dropout::check_probability;
use crate::error::{expect_at_least, expect_len};
use crate::{Device, Error, Real, Result, View, ViewMut};

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

impl T5AttentionDims {
    /// Columns of q and o, H·D.
    pub(crate) fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Fails unless what forward and backward share fits.
    fn check<D: Device, X: Real>(
        &self,
        op: &'static str,
        q: usize,
        probs: usize,
        bias: &Option<BucketMap<'_, D, X>>,
        keys: usize,
    ) -> Result<()> {
        expect_len(op, "q", q, self.batch * self.queries * self.width())?;
        expect_len(op, "probs", probs, self.batch * self.heads * self.queries * self.keys)?;
        if let Some(bias) = bias {
            expect_len(op, "bias.table", bias.table.len(), bias.buckets * self.heads)?;
            expect_len(op, "bias.map", bias.map.len(), self.queries * self.keys)?;
        }
        check_probability(op, self.dropout)?;
        if self.dropout > 0.0 {
            expect_len(op, "keys", keys, self.batch)?;
        }
        if self.kv_rows < self.keys || self.head_dim == 0 {
            let why =
                format!("{} keys in {} rows of kv, heads of {}", self.keys, self.kv_rows, self.head_dim);
            return Err(Error::Unsupported { op, why });
        }
        Ok(())
    }
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

/// Arguments of [`T5Attention::t5_attention_forward`].
pub struct T5AttentionForward<'o, 'probs, 'q, 'kv, 'bias, 'keys, D: Device, X: Real> {
    /// `[B, Tq, H·D]` `=`.
    pub o: D::ViewMut<'o, X>,
    /// `[B, H, Tq, Tk]` `=`, before dropout; masked ones are 0.
    pub probs: D::ViewMut<'probs, X>,
    /// `[B, Tq, H·D]`.
    pub q: D::View<'q, X>,
    /// `[B, kv_rows, 2·H·D]`, of which the last rows may be missing.
    pub kv: D::View<'kv, X>,
    /// The relative-position bias, where there is one.
    pub bias: Option<BucketMap<'bias, D, X>>,
    /// `[B]`: the examples' random keys; unused without dropout.
    pub keys: D::View<'keys, u64>,
    /// Shapes.
    pub dims: T5AttentionDims,
}

impl<D: Device, X: Real> T5AttentionForward<'_, '_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "t5_attention_forward";
        let T5AttentionDims { batch, keys, kv_rows, .. } = self.dims;
        self.dims.check::<D, X>(OP, self.q.len(), self.probs.len(), &self.bias, self.keys.len())?;
        expect_len(OP, "o", self.o.len(), self.q.len())?;
        let used = if batch == 0 { 0 } else { (batch - 1) * kv_rows + keys };
        expect_at_least(OP, "kv", self.kv.len(), 2 * used * self.dims.width())
    }
}

/// Arguments of [`T5Attention::t5_attention_backward`].
pub struct T5AttentionBackward<
    'dq,
    'dkv,
    'd_table,
    'd_scores,
    'd_o,
    'probs,
    'q,
    'kv,
    'bias,
    'keys,
    D: Device,
    X: Real,
> {
    /// `[B, Tq, H·D]` `=`.
    pub dq: D::ViewMut<'dq, X>,
    /// `[B, Tk, 2·H·D]` `=`.
    pub dkv: D::ViewMut<'dkv, X>,
    /// `[buckets, H]` `+=`, where asked for; `bias` must then be there.
    pub d_table: Option<D::ViewMut<'d_table, X::Acc>>,
    /// `[B, H, Tq, Tk]`, scratch.
    pub d_scores: D::ViewMut<'d_scores, X>,
    /// `[B, Tq, H·D]`.
    pub d_o: D::View<'d_o, X>,
    /// As the forward pass left them.
    pub probs: D::View<'probs, X>,
    /// `[B, Tq, H·D]`.
    pub q: D::View<'q, X>,
    /// `[B, Tk, 2·H·D]`: `dims.kv_rows` must equal `dims.keys`.
    pub kv: D::View<'kv, X>,
    /// The relative-position bias, where there is one.
    pub bias: Option<BucketMap<'bias, D, X>>,
    /// `[B]`: the examples' random keys; unused without dropout.
    pub keys: D::View<'keys, u64>,
    /// Shapes.
    pub dims: T5AttentionDims,
}

impl<D: Device, X: Real> T5AttentionBackward<'_, '_, '_, '_, '_, '_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "t5_attention_backward";
        let T5AttentionDims { batch, keys, kv_rows, heads, .. } = self.dims;
        self.dims.check::<D, X>(OP, self.q.len(), self.probs.len(), &self.bias, self.keys.len())?;
        expect_len(OP, "dq", self.dq.len(), self.q.len())?;
        expect_len(OP, "d_o", self.d_o.len(), self.q.len())?;
        expect_len(OP, "d_scores", self.d_scores.len(), self.probs.len())?;
        expect_len(OP, "kv", self.kv.len(), 2 * batch * keys * self.dims.width())?;
        expect_len(OP, "dkv", self.dkv.len(), self.kv.len())?;
        if kv_rows != keys {
            let why = format!("{kv_rows} rows of kv for {keys} keys");
            return Err(Error::Unsupported { op: OP, why });
        }
        match &self.d_table {
            Some(d_table) => {
                expect_len(OP, "d_table", d_table.len(), self.bias.map_or(0, |bias| bias.buckets) * heads)
            }
            None => Ok(()),
        }
    }
}

/// T5 attention, forward and backward. Decoding is a forward with one query on a cache.
pub trait T5Attention<X: Real>: Device {
    /// `o = drop(p) v`, and p itself.
    fn t5_attention_forward(&self, args: T5AttentionForward<Self, X>) -> Result<()>;

    /// Gradients of q, of keys and values, and of the bias table where asked for.
    fn t5_attention_backward(&self, args: T5AttentionBackward<Self, X>) -> Result<()>;
}
