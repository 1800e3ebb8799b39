//! Packed causal attention, tile by tile.
//!
//! A tile is up to [`TILE`] queries of one head against all the keys they see; scores
//! and probabilities of a tile live in the thread's working memory and both products
//! go through the matrix kernel. Tiles count from the start of the segment, so a
//! segment's bits do not depend on what else is packed with it. Forward runs in
//! parallel over (segment, head), backward over (segment, key/value head): one thread
//! sums dk and dv over the head's group of queries in order.

use super::lora::check_offsets;
use super::matrix::MatrixMut;
use super::scratch::with_scratch;
use super::simd::dispatch;
use super::softmax::{CausalBackward, ExpRows, RowDots, ScaleRows};
use super::{Cpu, CpuReal};
use crate::error::expect_below;
use crate::ops::{
    Attention, AttentionBackward, AttentionDecode, AttentionDims, AttentionForward, CacheStore, DecodeDims,
    GemmDims, QkvDims,
};
use crate::{Error, Result};
use std::ops::Range;

/// Queries of a tile.
const TILE: usize = 64;

/// Where a head's queries, keys and values begin in a row of qkv.
#[derive(Clone, Copy)]
struct HeadColumns {
    q: usize,
    k: usize,
    v: usize,
}

/// Columns of query head `head`.
fn columns(dims: &QkvDims, head: usize) -> HeadColumns {
    let group = dims.heads / dims.kv_heads;
    let k = (dims.heads + head / group) * dims.head_dim;
    HeadColumns { q: head * dims.head_dim, k, v: k + dims.kv_heads * dims.head_dim }
}

/// Segments as ranges of tokens.
fn ranges(offsets: &[u32]) -> impl Iterator<Item = Range<usize>> + Send + Clone + use<'_> {
    offsets.windows(2).map(|pair| pair[0] as usize..pair[1] as usize)
}

/// The product of `q` rows against `k` rows, both of `depth` values: `[queries, keys]`.
fn scores(
    queries: usize,
    keys: usize,
    depth: usize,
    q_stride: usize,
    k_stride: usize,
    scale: f64,
) -> GemmDims {
    let dims = GemmDims::new(queries, keys, depth, false, true);
    GemmDims { a_stride: q_stride, b_stride: k_stride, alpha: scale, ..dims }
}

/// Attention of one head over one segment. `qkv` begins at the segment's first row.
fn forward_head<X: CpuReal>(
    mut o: MatrixMut<'_, X>,
    lse: &mut [X],
    qkv: &[X],
    at: HeadColumns,
    dims: &AttentionDims,
) {
    let (len, depth, row) = (lse.len(), dims.qkv.head_dim, dims.qkv.row());
    with_scratch(TILE * (len + depth + 2), |scratch| {
        let (tile, rest) = scratch.split_at_mut(TILE * len);
        let (out, rest) = rest.split_at_mut(TILE * depth);
        let (largest, sums) = rest.split_at_mut(TILE);
        for first in (0..len).step_by(TILE) {
            let queries = TILE.min(len - first);
            let keys = first + queries;
            let tile = &mut tile[..queries * keys];
            let out = &mut out[..queries * depth];
            let product = scores(queries, keys, depth, row, row, dims.scale);
            X::product(tile, &qkv[first * row + at.q..], &qkv[at.k..], product, 1);
            dispatch(ExpRows { scores: tile, cols: keys, first_visible: first + 1, largest, sums });
            let product = GemmDims::new(queries, depth, keys, false, false);
            X::product(out, tile, &qkv[at.v..], GemmDims { b_stride: row, ..product }, 1);
            for i in 0..queries {
                lse[first + i] = largest[i] + sums[i].ln();
                sums[i] = X::one() / sums[i];
            }
            dispatch(ScaleRows { rows: out, cols: depth, factors: sums });
            for (i, out) in out.chunks(depth).enumerate() {
                o.row(first + i).copy_from_slice(out);
            }
        }
    });
}

/// Gradients of one segment and one key/value head.
struct GroupGradient<'a, X> {
    /// `[len, group · D]`.
    dq: MatrixMut<'a, X>,
    /// `[len, D]`.
    dk: MatrixMut<'a, X>,
    /// `[len, D]`.
    dv: MatrixMut<'a, X>,
    /// `[group, len]`.
    delta: MatrixMut<'a, X>,
}

/// Inputs of attention's backward. Offsets are those of the whole stream.
struct BackwardInputs<'a, X> {
    d_o: &'a [X],
    o: &'a [X],
    lse: &'a [X],
    qkv: &'a [X],
}

/// Backward of one segment and one key/value head.
fn backward_group<X: CpuReal>(
    mut grads: GroupGradient<'_, X>,
    inputs: &BackwardInputs<'_, X>,
    kv_head: usize,
    tokens: Range<usize>,
    dims: &AttentionDims,
) {
    let (len, depth, row) = (tokens.len(), dims.qkv.head_dim, dims.qkv.row());
    let group = dims.qkv.heads / dims.qkv.kv_heads;
    let qkv = &inputs.qkv[tokens.start * row..];
    with_scratch(2 * TILE * len + 2 * len * depth + TILE * depth, |scratch| {
        let (tiles, rest) = scratch.split_at_mut(2 * TILE * len);
        let (dk, rest) = rest.split_at_mut(len * depth);
        let (dv, dq) = rest.split_at_mut(len * depth);
        dk.fill(X::zero());
        dv.fill(X::zero());
        for g in 0..group {
            let head = kv_head * group + g;
            let at = columns(&dims.qkv, head);
            let rows_of_o = tokens.start * dims.o_stride + at.q;
            let (d_o, o) = (&inputs.d_o[rows_of_o..], &inputs.o[rows_of_o..]);
            let lse = &inputs.lse[head * dims.qkv.tokens + tokens.start..][..len];
            let delta = grads.delta.row(g);
            let stride = dims.o_stride;
            dispatch(RowDots { sums: delta, a: d_o, b: o, cols: depth, a_stride: stride, b_stride: stride });
            for first in (0..len).step_by(TILE) {
                let queries = TILE.min(len - first);
                let keys = first + queries;
                let (p, rest) = tiles.split_at_mut(queries * keys);
                let ds = &mut rest[..queries * keys];
                let dq = &mut dq[..queries * depth];
                let (q, d_o) = (&qkv[first * row + at.q..], &d_o[first * stride..]);
                X::product(p, q, &qkv[at.k..], scores(queries, keys, depth, row, row, dims.scale), 1);
                X::product(ds, d_o, &qkv[at.v..], scores(queries, keys, depth, stride, row, 1.0), 1);
                let (lse, delta) = (&lse[first..], &delta[first..]);
                dispatch(CausalBackward {
                    scores: p,
                    d_probs: ds,
                    cols: keys,
                    first_visible: first + 1,
                    lse,
                    delta,
                });
                let alpha = dims.scale;
                let product = GemmDims::new(keys, depth, queries, true, false).add();
                X::product(dv, p, d_o, GemmDims { b_stride: stride, ..product }, 1);
                X::product(dk, ds, q, GemmDims { b_stride: row, alpha, ..product }, 1);
                let product = GemmDims::new(queries, depth, keys, false, false);
                X::product(dq, ds, &qkv[at.k..], GemmDims { b_stride: row, alpha, ..product }, 1);
                for (i, dq) in dq.chunks(depth).enumerate() {
                    grads.dq.row(first + i)[g * depth..][..depth].copy_from_slice(dq);
                }
            }
        }
        for t in 0..len {
            grads.dk.row(t).copy_from_slice(&dk[t * depth..][..depth]);
            grads.dv.row(t).copy_from_slice(&dv[t * depth..][..depth]);
        }
    });
}

/// Attention of one new token of one key/value head's group on a cache.
///
/// `q` and `o` `[group, D]`; `k` and `v` begin at the head's first key and value.
fn decode_group<X: CpuReal>(o: &mut [X], q: &[X], k: &[X], v: &[X], keys: usize, dims: &DecodeDims) {
    let (depth, stride) = (dims.qkv.head_dim, dims.qkv.kv_heads * dims.qkv.head_dim);
    let group = dims.qkv.heads / dims.qkv.kv_heads;
    with_scratch(group * (keys + 2), |scratch| {
        let (tile, rest) = scratch.split_at_mut(group * keys);
        let (largest, sums) = rest.split_at_mut(group);
        X::product(tile, q, k, scores(group, keys, depth, depth, stride, dims.scale), 1);
        dispatch(ExpRows { scores: tile, cols: keys, first_visible: keys, largest, sums });
        let product = GemmDims::new(group, depth, keys, false, false);
        X::product(o, tile, v, GemmDims { b_stride: stride, ..product }, 1);
        sums.iter_mut().for_each(|sum| *sum = X::one() / *sum);
        dispatch(ScaleRows { rows: o, cols: depth, factors: sums });
    });
}

impl<X: CpuReal> Attention<X> for Cpu {
    fn attention_forward(&self, args: AttentionForward<Self, X>) -> Result<()> {
        let _timed = self.timed("attention_forward");
        args.check()?;
        let AttentionForward { o, lse, qkv, offsets, dims } = args;
        const OP: &str = "attention_forward";
        let QkvDims { tokens, heads, head_dim, .. } = dims.qkv;
        check_offsets(OP, offsets, dims.segments, tokens)?;
        let o = MatrixMut::new(o, tokens, heads * head_dim, dims.o_stride).row_segments(offsets);
        let lse = MatrixMut::new(lse, heads, tokens, tokens).column_segments(offsets);
        let parts = o.zip(lse).zip(ranges(offsets)).flat_map(|((o, lse), tokens)| {
            let heads = o.column_blocks(head_dim).zip(lse.row_blocks(1)).enumerate();
            heads.map(move |(head, (o, lse))| (head, o, lse, tokens.start))
        });
        self.for_parts(parts, |(head, o, mut lse, start)| {
            let qkv = &qkv[start * dims.qkv.row()..];
            forward_head(o, lse.row(0), qkv, columns(&dims.qkv, head), &dims);
        });
        Ok(())
    }

    fn attention_backward(&self, args: AttentionBackward<Self, X>) -> Result<()> {
        let _timed = self.timed("attention_backward");
        args.check()?;
        let AttentionBackward { dqkv, delta, d_o, o, lse, qkv, offsets, dims } = args;
        const OP: &str = "attention_backward";
        let QkvDims { tokens, heads, kv_heads, head_dim } = dims.qkv;
        check_offsets(OP, offsets, dims.segments, tokens)?;
        let group = heads / kv_heads;
        let row = dims.qkv.row();
        let segments = MatrixMut::new(dqkv, tokens, row, row).row_segments(offsets);
        let deltas = MatrixMut::new(delta, heads, tokens, tokens).column_segments(offsets);
        let parts = segments.zip(deltas).zip(ranges(offsets)).flat_map(|((dqkv, delta), tokens)| {
            let (dq, dkv) = dqkv.split_columns(heads * head_dim);
            let (dk, dv) = dkv.split_columns(kv_heads * head_dim);
            let queries = dq.column_blocks(group * head_dim).zip(delta.row_blocks(group));
            let keys = dk.column_blocks(head_dim).zip(dv.column_blocks(head_dim));
            queries.zip(keys).enumerate().map(move |(kv_head, ((dq, delta), (dk, dv)))| {
                (kv_head, GroupGradient { dq, dk, dv, delta }, tokens.clone())
            })
        });
        let inputs = BackwardInputs { d_o, o, lse, qkv };
        self.for_parts(parts, |(kv_head, grads, tokens)| {
            backward_group(grads, &inputs, kv_head, tokens, &dims);
        });
        Ok(())
    }

    fn cache_store(&self, args: CacheStore<Self, X>) -> Result<()> {
        let _timed = self.timed("cache_store");
        args.check()?;
        let CacheStore { k_cache, v_cache, qkv, offsets, slot, dims } = args;
        const OP: &str = "cache_store";
        check_offsets(OP, offsets, slot.len(), dims.qkv.tokens)?;
        expect_below(OP, "slot", slot, dims.slots)?;
        let width = dims.qkv.kv_heads * dims.qkv.head_dim;
        let first = dims.qkv.heads * dims.qkv.head_dim;
        for (tokens, &slot) in ranges(offsets).zip(slot) {
            if tokens.len() > dims.capacity {
                let why = format!("{} tokens for a cache of {}", tokens.len(), dims.capacity);
                return Err(Error::Unsupported { op: OP, why });
            }
            for (position, t) in tokens.enumerate() {
                let kv = &qkv[t * dims.qkv.row() + first..][..2 * width];
                let at = (slot as usize * dims.capacity + position) * width;
                k_cache[at..][..width].copy_from_slice(&kv[..width]);
                v_cache[at..][..width].copy_from_slice(&kv[width..]);
            }
        }
        Ok(())
    }

    fn attention_decode(&self, args: AttentionDecode<Self, X>) -> Result<()> {
        let _timed = self.timed("attention_decode");
        args.check()?;
        let AttentionDecode { o, k_cache, v_cache, qkv, slot, position, dims } = args;
        const OP: &str = "attention_decode";
        let QkvDims { tokens: rows, heads, kv_heads, head_dim } = dims.qkv;
        expect_below(OP, "slot", slot, dims.slots)?;
        expect_below(OP, "position", position, dims.capacity)?;
        let width = kv_heads * head_dim;
        let base = |i: usize| slot[i] as usize * dims.capacity * width;
        for i in 0..rows {
            let kv = &qkv[i * dims.qkv.row() + heads * head_dim..][..2 * width];
            let at = base(i) + position[i] as usize * width;
            k_cache[at..][..width].copy_from_slice(&kv[..width]);
            v_cache[at..][..width].copy_from_slice(&kv[width..]);
        }
        let (k_cache, v_cache) = (&*k_cache, &*v_cache);
        let group = heads / kv_heads * head_dim;
        let longest = position.iter().max().map_or(0, |&p| p as usize + 1);
        let groups = self.rows_per_part(rows * kv_heads, 2 * longest * group);
        let parts = o.chunks_mut((groups * group).max(1)).enumerate();
        self.for_parts(parts, |(n, o)| {
            for (j, o) in o.chunks_mut(group).enumerate() {
                let (i, kv_head) = ((n * groups + j) / kv_heads, (n * groups + j) % kv_heads);
                let q = &qkv[i * dims.qkv.row() + kv_head * group..][..group];
                let at = base(i) + kv_head * head_dim;
                decode_group(o, q, &k_cache[at..], &v_cache[at..], position[i] as usize + 1, &dims);
            }
        });
        Ok(())
    }
}
