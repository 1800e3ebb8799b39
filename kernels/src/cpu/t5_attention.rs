//! T5 attention: one (example, head) at a time, sequences short enough that a whole
//! matrix of probabilities fits the cache. The two products go through the matrix
//! kernel; bias, softmax and dropout are passes over rows in between.

use super::mask::Mask;
use super::matrix::MatrixMut;
use super::scratch::with_scratch;
use super::simd::{Level, Task, dispatch};
use super::softmax::{ExpRows, ScaleRows};
use super::sums::dot;
use super::{Cpu, CpuReal};
use crate::Result;
use crate::error::expect_below;
use crate::ops::{
    BucketMap, GemmDims, T5Attention, T5AttentionBackward, T5AttentionDims, T5AttentionForward,
};

/// Fails unless every bucket is one of the table's.
fn check_buckets<X: CpuReal>(op: &'static str, bias: &Option<BucketMap<'_, Cpu, X>>) -> Result<()> {
    match bias {
        Some(bias) => expect_below(op, "bias.map", bias.map, bias.buckets),
        None => Ok(()),
    }
}

/// The mask of probabilities of example `b`, if any are dropped.
fn mask_of(keys: &[u64], b: usize, dims: &T5AttentionDims) -> Option<Mask> {
    (dims.dropout > 0.0).then(|| Mask::new(keys[b], dims.site, dims.dropout))
}

/// `scores[i, j] += table[map[i, j], h]`.
fn add_bias<X: CpuReal>(scores: &mut [X], bias: &BucketMap<'_, Cpu, X>, head: usize, heads: usize) {
    for (score, &bucket) in scores.iter_mut().zip(bias.map) {
        *score += bias.table[bucket as usize * heads + head];
    }
}

/// `out = mask ⊙ x`, rows of `cols`; `first` is the first row's number in the mask.
struct MaskRows<'a, X> {
    out: &'a mut [X],
    x: &'a [X],
    cols: usize,
    mask: Mask,
    first: usize,
}

impl<X: CpuReal> Task for MaskRows<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let rows = self.out.chunks_mut(self.cols).zip(self.x.chunks(self.cols));
        for (i, (out, x)) in rows.enumerate() {
            self.mask.apply(out, x, self.first + i);
        }
    }
}

/// Gradient of the scores from that of the probabilities, in place: `p ⊙ (dp − Σ p ⊙ dp)`.
struct SoftmaxBackward<'a, X> {
    d: &'a mut [X],
    probs: &'a [X],
    cols: usize,
}

impl<X: CpuReal> Task for SoftmaxBackward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        for (d, p) in self.d.chunks_mut(self.cols).zip(self.probs.chunks(self.cols)) {
            let delta = dot::<L, X>(d, p);
            for (d, &p) in d.iter_mut().zip(p) {
                *d = p * (*d - delta);
            }
        }
    }
}

/// Where example `b`'s head `h` begins in q (and o), and in kv its keys; values are `width` later.
fn starts(dims: &T5AttentionDims, b: usize, h: usize) -> (usize, usize) {
    let column = h * dims.head_dim;
    (b * dims.queries * dims.width() + column, 2 * b * dims.kv_rows * dims.width() + column)
}

/// Probabilities and outputs of one head of one example.
fn forward_head<X: CpuReal>(
    (b, h): (usize, usize),
    mut o: MatrixMut<'_, X>,
    probs: &mut [X],
    (q, kv): (&[X], &[X]),
    bias: Option<BucketMap<'_, Cpu, X>>,
    mask: Option<Mask>,
    dims: &T5AttentionDims,
) {
    let T5AttentionDims { queries, keys, head_dim, .. } = *dims;
    let (row, (q_start, k_start)) = (dims.width(), starts(dims, b, h));
    let product = GemmDims::new(queries, keys, head_dim, false, true);
    let product = GemmDims { a_stride: row, b_stride: 2 * row, ..product };
    X::product(probs, &q[q_start..], &kv[k_start..], product, 1);
    if let Some(bias) = bias {
        add_bias(probs, &bias, h, dims.heads);
    }
    with_scratch(queries * (keys + head_dim + 2), |scratch| {
        let (dropped, rest) = scratch.split_at_mut(queries * keys);
        let (out, rest) = rest.split_at_mut(queries * head_dim);
        let (largest, sums) = rest.split_at_mut(queries);
        let first_visible = if dims.causal { 1 } else { keys };
        dispatch(ExpRows { scores: probs, cols: keys, first_visible, largest, sums });
        sums.iter_mut().for_each(|sum| *sum = X::one() / *sum);
        dispatch(ScaleRows { rows: probs, cols: keys, factors: sums });
        let mut weights = &*probs;
        if let Some(mask) = mask {
            dispatch(MaskRows { out: dropped, x: probs, cols: keys, mask, first: h * queries });
            weights = dropped;
        }
        let product = GemmDims::new(queries, head_dim, keys, false, false);
        X::product(out, weights, &kv[k_start + row..], GemmDims { b_stride: 2 * row, ..product }, 1);
        for (i, out) in out.chunks(head_dim).enumerate() {
            o.row(i).copy_from_slice(out);
        }
    });
}

/// Gradients of one head of one example.
struct HeadGradient<'a, X> {
    /// `[Tq, D]`.
    dq: MatrixMut<'a, X>,
    /// `[Tk, D]`.
    dk: MatrixMut<'a, X>,
    /// `[Tk, D]`.
    dv: MatrixMut<'a, X>,
    /// `[Tq, Tk]`.
    d_scores: &'a mut [X],
}

/// Inputs of the backward pass, whole.
struct BackwardInputs<'a, X> {
    d_o: &'a [X],
    probs: &'a [X],
    q: &'a [X],
    kv: &'a [X],
}

/// Backward of one head of one example.
fn backward_head<X: CpuReal>(
    (b, h): (usize, usize),
    mut grads: HeadGradient<'_, X>,
    inputs: &BackwardInputs<'_, X>,
    mask: Option<Mask>,
    dims: &T5AttentionDims,
) {
    let T5AttentionDims { queries, keys, head_dim, .. } = *dims;
    let (row, (q_start, k_start)) = (dims.width(), starts(dims, b, h));
    let (q, d_o) = (&inputs.q[q_start..], &inputs.d_o[q_start..]);
    let (k, v) = (&inputs.kv[k_start..], &inputs.kv[k_start + row..]);
    let size = queries * keys;
    let probs = &inputs.probs[(b * dims.heads + h) * size..][..size];
    let ds = grads.d_scores;
    with_scratch(size + queries.max(keys) * head_dim, |scratch| {
        let (dropped, out) = scratch.split_at_mut(size);
        let product = GemmDims::new(queries, keys, head_dim, false, true);
        X::product(dropped, d_o, v, GemmDims { a_stride: row, b_stride: 2 * row, ..product }, 1);
        let mut weights = probs;
        match mask {
            Some(mask) => {
                let (cols, first) = (keys, h * queries);
                dispatch(MaskRows { out: ds, x: dropped, cols, mask, first });
                dispatch(MaskRows { out: dropped, x: probs, cols, mask, first });
                weights = dropped;
            }
            None => ds.copy_from_slice(dropped),
        }
        let by_keys = GemmDims::new(keys, head_dim, queries, true, false);
        let by_keys = GemmDims { b_stride: row, ..by_keys };
        X::product(out, weights, d_o, by_keys, 1);
        copy_rows(&mut grads.dv, out, keys, head_dim);
        dispatch(SoftmaxBackward { d: ds, probs, cols: keys });
        X::product(out, ds, q, by_keys, 1);
        copy_rows(&mut grads.dk, out, keys, head_dim);
        let product = GemmDims::new(queries, head_dim, keys, false, false);
        X::product(out, ds, k, GemmDims { b_stride: 2 * row, ..product }, 1);
        copy_rows(&mut grads.dq, out, queries, head_dim);
    });
}

/// `to = from`, contiguous rows.
fn copy_rows<X: CpuReal>(to: &mut MatrixMut<'_, X>, from: &[X], rows: usize, cols: usize) {
    for (i, from) in from.chunks(cols).take(rows).enumerate() {
        to.row(i).copy_from_slice(from);
    }
}

impl Cpu {
    /// `d_table[map[i, j], h] += Σ_b d_scores[b, h, i, j]`, in the order of b, i and j.
    fn bias_backward<X: CpuReal>(
        &self,
        d_table: &mut [X],
        d_scores: &[X],
        bias: &BucketMap<'_, Cpu, X>,
        dims: &T5AttentionDims,
    ) {
        let size = dims.queries * dims.keys;
        let heads = self.rows_per_part(dims.heads, 4 * dims.batch * size);
        let parts = MatrixMut::new(d_table, bias.buckets, dims.heads, dims.heads).column_blocks(heads);
        self.for_parts(parts.enumerate(), |(n, mut table)| {
            for h in n * heads..dims.heads.min((n + 1) * heads) {
                for example in d_scores.chunks(dims.heads * size) {
                    for (&d, &bucket) in example[h * size..][..size].iter().zip(bias.map) {
                        table.row(bucket as usize)[h - n * heads] += d;
                    }
                }
            }
        });
    }
}

impl<X: CpuReal> T5Attention<X> for Cpu {
    fn t5_attention_forward(&self, args: T5AttentionForward<Self, X>) -> Result<()> {
        let _timed = self.timed("t5_attention_forward");
        args.check()?;
        let T5AttentionForward { o, probs, q, kv, bias, keys, dims } = args;
        check_buckets("t5_attention_forward", &bias)?;
        if probs.is_empty() {
            o.fill(X::zero());
            return Ok(());
        }
        let row = dims.width();
        let heads = MatrixMut::new(o, dims.batch * dims.queries, row, row)
            .row_blocks(dims.queries)
            .flat_map(move |example| example.column_blocks(dims.head_dim));
        let parts = heads.zip(probs.chunks_mut(dims.queries * dims.keys)).enumerate();
        self.for_parts(parts, |(n, (o, probs))| {
            let (b, h) = (n / dims.heads, n % dims.heads);
            forward_head((b, h), o, probs, (q, kv), bias, mask_of(keys, b, &dims), &dims);
        });
        Ok(())
    }

    fn t5_attention_backward(&self, args: T5AttentionBackward<Self, X>) -> Result<()> {
        let _timed = self.timed("t5_attention_backward");
        args.check()?;
        let T5AttentionBackward { dq, dkv, d_table, d_scores, d_o, probs, q, kv, bias, keys, dims } = args;
        check_buckets("t5_attention_backward", &bias)?;
        if probs.is_empty() {
            dq.fill(X::zero());
            dkv.fill(X::zero());
            return Ok(());
        }
        let row = dims.width();
        let dq = MatrixMut::new(dq, dims.batch * dims.queries, row, row).row_blocks(dims.queries);
        let dkv = MatrixMut::new(dkv, dims.batch * dims.keys, 2 * row, 2 * row).row_blocks(dims.keys);
        let heads = dq.zip(dkv).flat_map(move |(dq, dkv)| {
            let (dk, dv) = dkv.split_columns(row);
            let keys = dk.column_blocks(dims.head_dim).zip(dv.column_blocks(dims.head_dim));
            dq.column_blocks(dims.head_dim).zip(keys)
        });
        let parts = heads.zip(d_scores.chunks_mut(dims.queries * dims.keys)).enumerate();
        let inputs = BackwardInputs { d_o, probs, q, kv };
        self.for_parts(parts, |(n, ((dq, (dk, dv)), d_scores))| {
            let (b, h) = (n / dims.heads, n % dims.heads);
            let grads = HeadGradient { dq, dk, dv, d_scores };
            backward_head((b, h), grads, &inputs, mask_of(keys, b, &dims), &dims);
        });
        if let (Some(d_table), Some(bias)) = (d_table, bias) {
            self.bias_backward(d_table, d_scores, &bias, &dims);
        }
        Ok(())
    }
}
