//! T5 attention: bias, mask, dropout, cross-attention and caches.

use crate::common::*;
use gradtx_kernels::ops::{BucketMap, T5AttentionBackward, T5AttentionDims, T5AttentionForward};
use gradtx_kernels::{Backend, Buffer, Real, Result};

/// Probabilities and score gradients are kept in bf16, and gradients of the table are sums
/// of differences.
const ATTENTION: Tolerance = Tolerance { f32: 5e-6, bf16: 2e-2 };

pub struct Short {
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub causal: bool,
    pub bias: bool,
    pub dropout: f64,
    /// Elements by which q is shifted.
    pub shift: usize,
}

const BUCKETS: usize = 5;

impl Case for Short {
    fn run<D: Backend<X>, X: Real>(&self, d: &D, inputs: Inputs) -> Result<Results> {
        let Self { batch, queries, keys, heads, head_dim, causal, dropout, .. } = *self;
        let width = heads * head_dim;
        let dims = T5AttentionDims {
            batch,
            queries,
            keys,
            kv_rows: keys,
            heads,
            head_dim,
            causal,
            dropout,
            site: 3,
        };
        let (n_q, n_kv, n_p) =
            (batch * queries * width, 2 * batch * keys * width, batch * heads * queries * keys);
        let shifted = put(d, &[nan(self.shift), inputs.values::<X>("q", n_q)].concat())?;
        let q = || shifted.view(self.shift..n_q + self.shift);
        let kv = put(d, &inputs.values::<X>("kv", n_kv))?;
        let table = put(d, &inputs.values::<X>("table", BUCKETS * heads))?;
        let map = put(d, &random_ids("map", queries * keys, BUCKETS))?;
        let seeds = put(d, &(0..batch as u64).map(|b| b << 35 | 17).collect::<Vec<_>>())?;
        let bias = || BucketMap::<D, X> { table: table.all(), map: map.all(), buckets: BUCKETS };
        let bias = || self.bias.then(bias);
        let (mut o, mut probs) = (put(d, &nan::<X>(n_q))?, put(d, &nan::<X>(n_p))?);
        let (o_to, p_to) = (o.all_mut(), probs.all_mut());
        d.t5_attention_forward(T5AttentionForward {
            o: o_to,
            probs: p_to,
            q: q(),
            kv: kv.all(),
            bias: bias(),
            keys: seeds.all(),
            dims,
        })?;

        let d_o = put(d, &inputs.values::<X>("d_o", n_q))?;
        let (mut dq, mut dkv) = (put(d, &nan::<X>(n_q))?, put(d, &nan::<X>(n_kv))?);
        let mut d_table = put(d, &inputs.sums::<X::Acc>("d_table", BUCKETS * heads))?;
        let mut d_scores = put(d, &nan::<X>(n_p))?;
        let table_to = self.bias.then(|| d_table.all_mut());
        let (dq_to, dkv_to, scratch) = (dq.all_mut(), dkv.all_mut(), d_scores.all_mut());
        let (d_o, p, q, kv) = (d_o.all(), probs.all(), q(), kv.all());
        d.t5_attention_backward(T5AttentionBackward {
            dq: dq_to,
            dkv: dkv_to,
            d_table: table_to,
            d_scores: scratch,
            d_o,
            probs: p,
            q,
            kv,
            bias: bias(),
            keys: seeds.all(),
            dims,
        })?;

        // One more query on a cache with room for other keys.
        let rows = keys + 3;
        let step = T5AttentionDims { queries: 1, kv_rows: rows, causal: false, dropout: 0.0, ..dims };
        let cache = put(d, &inputs.values::<X>("cache", 2 * batch * rows * width))?;
        let one = put(d, &inputs.values::<X>("one", batch * width))?;
        let (mut o_step, mut p_step) =
            (put(d, &nan::<X>(batch * width))?, put(d, &nan::<X>(batch * heads * keys))?);
        let (o_to, p_to) = (o_step.all_mut(), p_step.all_mut());
        d.t5_attention_forward(T5AttentionForward {
            o: o_to,
            probs: p_to,
            q: one.all(),
            kv: cache.all(),
            bias: None,
            keys: seeds.all(),
            dims: step,
        })?;
        let mut results = Results::default();
        let named = [("o", &o), ("probs", &probs), ("dq", &dq), ("dkv", &dkv), ("o_step", &o_step)];
        for (name, buf) in named {
            results.take(d, name, buf)?;
        }
        results.take(d, "d_table", &d_table)?;
        Ok(results)
    }
}

/// Longer than a block's shared memory has rows for: refused with what the device has.
#[test]
fn sequences_that_are_too_long_are_refused() {
    use gradtx_emulator::{Order, Schedule, Variant, configure, device};
    configure(Schedule { order: Order::Forward, race: false });
    let cuda = device(Variant::PLAIN);
    let case = Short {
        batch: 1,
        queries: 1,
        keys: 4000,
        heads: 1,
        head_dim: 16,
        causal: false,
        bias: false,
        dropout: 0.0,
        shift: 0,
    };
    let found = Case::run::<gradtx_kernels::cuda::Cuda, f32>(&case, &cuda, Inputs::new(Precision::F32));
    let why = found.expect_err("no block has that much shared memory").to_string();
    assert!(why.contains("257024 bytes of shared memory") && why.contains("this device gives"), "{why}");
}

/// Each kernel on the tensor cores, in sizes that fill its tiles and in odd ones.
#[test]
fn heads_of_64() {
    for (batch, queries, keys, heads, causal, bias, dropout, shift) in [
        (2, 36, 36, 2, false, true, 0.1, 0),
        (2, 28, 28, 1, true, true, 0.1, 0),
        (2, 28, 36, 2, false, false, 0.2, 0),
        (1, 33, 51, 1, true, true, 0.3, 0),
        (1, 65, 90, 1, false, true, 0.1, 0),
        // Plain kernels: q is not aligned, backward has more queries, or both ways more keys than a block takes.
        (1, 20, 37, 2, false, true, 0.1, 1),
        (1, 9, 32, 1, false, true, 0.1, 0),
        (1, 97, 5, 1, false, true, 0.1, 0),
        (1, 5, 97, 1, false, true, 0.1, 0),
    ] {
        let case = Short { batch, queries, keys, heads, head_dim: 64, causal, bias, dropout, shift };
        check(&format!("t5 attention {queries}×{keys}, heads of 64, {shift}"), &case, ATTENTION);
    }
}

/// Fewer bytes than a block of the backward kernel on the tensor cores needs: plain kernels take over.
#[test]
fn heads_of_64_with_little_shared_memory() {
    if gradtx_emulator::on_device() {
        return;
    }
    let _little = crate::lora::LittleShared::new(64 << 10);
    let case = Short {
        batch: 1,
        queries: 65,
        keys: 90,
        heads: 1,
        head_dim: 64,
        causal: false,
        bias: true,
        dropout: 0.1,
        shift: 0,
    };
    check("t5 attention with little shared memory", &case, ATTENTION);
}

#[test]
fn short_sequences() {
    for (batch, queries, keys, heads, head_dim, causal, bias, dropout) in [
        (1, 1, 1, 1, 2, false, false, 0.0),
        (2, 5, 7, 3, 10, false, true, 0.0),
        (2, 19, 19, 2, 64, true, true, 0.2),
        (3, 36, 28, 1, 16, false, false, 0.1),
    ] {
        let case = Short { batch, queries, keys, heads, head_dim, causal, bias, dropout, shift: 0 };
        check(&format!("t5 attention {queries}×{keys}, heads of {head_dim}"), &case, ATTENTION);
    }
}
