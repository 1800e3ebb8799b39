//! Attention: packed and causal, to a cache, and T5's over short sequences.

use super::shapes::{Bench, Shapes};
use crate::counts::{
    attention, attention_backward, causal_pairs, decode_attention, kept_attention_backward, mixed_segments,
};
use crate::values::random;
use anyhow::Result;
use gradtx_kernels::ops::{
    Attention, AttentionBackward, AttentionDecode, AttentionDims, AttentionForward, Backend, BucketMap,
    DecodeDims, QkvDims, T5AttentionBackward, T5AttentionDims, T5AttentionForward,
};
use gradtx_kernels::{Buffer, Real};
use gradtx_models::t5::bucket_map;
use serde_json::{Value, json};

pub(super) fn measure<X: Real<Acc = f32>, D: Backend<X>>(
    bench: &mut Bench<'_, D>,
    shapes: &Shapes,
) -> Result<()> {
    let config = shapes.config();
    let mut head_dims = vec![64, 128];
    if !head_dims.contains(&config.head_dim) {
        head_dims.push(config.head_dim);
    }
    for head_dim in head_dims {
        // The same width in heads of another size, where the model's are of another.
        let fits = |heads: usize| (heads * config.head_dim / head_dim).max(1);
        let kv_heads = fits(config.kv_heads);
        let heads = fits(config.heads).div_ceil(kv_heads) * kv_heads;
        packed::<X, D>(bench, shapes, QkvDims { tokens: shapes.tokens, heads, kv_heads, head_dim })?;
    }
    decode::<X, D>(bench, shapes)?;
    let c = shapes.translator();
    t5::<X, D>(bench, shapes, "encoder", (c.student_blocks, c.student_blocks), false)?;
    t5::<X, D>(bench, shapes, "decoder", (c.teacher_blocks, c.teacher_blocks), true)?;
    t5::<X, D>(bench, shapes, "cross", (c.teacher_blocks, c.student_blocks), false)
}

fn packed<X: Real<Acc = f32>, D: Backend<X>>(
    bench: &mut Bench<'_, D>,
    shapes: &Shapes,
    qkv_dims: QkvDims,
) -> Result<()> {
    if !bench.wants("attention forward") && !bench.wants("attention backward") {
        return Ok(());
    }
    let (device, t) = (bench.device, shapes.tokens);
    let QkvDims { heads, kv_heads, head_dim, .. } = qkv_dims;
    let width = heads * head_dim;
    let lengths = mixed_segments(t);
    let ends = lengths.iter().scan(0, |end, n| {
        *end += *n as u32;
        Some(*end)
    });
    let offsets = device.buffer_from(&std::iter::once(0).chain(ends).collect::<Vec<u32>>())?;
    let dims = AttentionDims {
        qkv: qkv_dims,
        segments: lengths.len(),
        scale: 1.0 / (head_dim as f64).sqrt(),
        o_stride: width,
    };
    let qkv = random::<D, X>(device, t * qkv_dims.row(), 1.0, 1)?;
    let d_o = random::<D, X>(device, t * width, 1.0, 2)?;
    let mut o = device.zeros::<X>(t * width)?;
    let mut dqkv = device.zeros::<X>(t * qkv_dims.row())?;
    let [mut lse, mut delta] = [device.zeros::<f32>(heads * t)?, device.zeros::<f32>(heads * t)?];
    let pairs = causal_pairs(&lengths);
    let shape = format!("{t} tokens, {heads}+{kv_heads} heads of {head_dim}");
    let more = json!({"head_dim": head_dim, "tokens": t});
    bench.compute("attention forward", shape.as_str(), attention(pairs, width), more.clone(), || {
        let (o, lse) = (o.all_mut(), lse.all_mut());
        Attention::<X>::attention_forward(
            device,
            AttentionForward { o, lse, qkv: qkv.all(), offsets: offsets.all(), dims },
        )
    })?;
    bench.compute("attention backward", shape, attention_backward(pairs, width), more, || {
        let (dqkv, delta) = (dqkv.all_mut(), delta.all_mut());
        let (d_o, o, lse, qkv) = (d_o.all(), o.all(), lse.all(), qkv.all());
        Attention::<X>::attention_backward(
            device,
            AttentionBackward { dqkv, delta, d_o, o, lse, qkv, offsets: offsets.all(), dims },
        )
    })
}

/// One more token for every sequence.
fn decode<X: Real<Acc = f32>, D: Backend<X>>(bench: &mut Bench<'_, D>, shapes: &Shapes) -> Result<()> {
    if !bench.wants("attention decode") {
        return Ok(());
    }
    let (device, c, rows, context) = (bench.device, shapes.config(), 2 * shapes.batch, shapes.context);
    let qkv_dims = QkvDims { tokens: rows, heads: c.heads, kv_heads: c.kv_heads, head_dim: c.head_dim };
    let scale = 1.0 / (c.head_dim as f64).sqrt();
    let dims = DecodeDims { qkv: qkv_dims, capacity: context, slots: rows, scale };
    let cache = rows * context * c.kv_dim();
    let [mut k, mut v] = [random::<D, X>(device, cache, 1.0, 1)?, random::<D, X>(device, cache, 1.0, 2)?];
    let qkv = random::<D, X>(device, rows * qkv_dims.row(), 1.0, 3)?;
    let mut o = device.zeros::<X>(rows * c.q_dim())?;
    let slot = device.buffer_from(&(0..rows as u32).collect::<Vec<_>>())?;
    let position = device.buffer_from(&vec![context as u32 - 1; rows])?;
    let count = decode_attention((rows * context) as f64, c.q_dim(), c.kv_dim(), shapes.x);
    let shape = format!("{rows} rows, {context} tokens each");
    bench.compute("attention decode", shape, count, Value::Null, || {
        let (o, k, v) = (o.all_mut(), k.all_mut(), v.all_mut());
        device.attention_decode(AttentionDecode {
            o,
            k_cache: k,
            v_cache: v,
            qkv: qkv.all(),
            slot: slot.all(),
            position: position.all(),
            dims,
        })
    })
}

/// `(queries, keys)` blocks of every example.
fn t5<X: Real<Acc = f32>, D: Backend<X>>(
    bench: &mut Bench<'_, D>,
    shapes: &Shapes,
    which: &str,
    (queries, keys): (usize, usize),
    causal: bool,
) -> Result<()> {
    let [forward, backward] = ["forward", "backward"].map(|way| format!("t5 attention {which} {way}"));
    if !bench.wants(&forward) && !bench.wants(&backward) {
        return Ok(());
    }
    let (device, config, batch) = (bench.device, &shapes.translator().t5, shapes.batch);
    let (heads, inner) = (config.num_heads, config.inner());
    let dims = T5AttentionDims {
        batch,
        queries,
        keys,
        kv_rows: keys,
        heads,
        head_dim: config.d_kv,
        causal,
        dropout: config.dropout_rate,
        site: 1,
    };
    let buckets = config.relative_attention_num_buckets;
    let map = device.buffer_from(&bucket_map(config, !causal, queries, keys))?;
    let table = random::<D, X>(device, buckets * heads, 1.0, 1)?;
    let q = random::<D, X>(device, batch * queries * inner, 0.3, 2)?;
    let kv = random::<D, X>(device, batch * keys * 2 * inner, 0.3, 3)?;
    let d_o = random::<D, X>(device, batch * queries * inner, 1.0, 4)?;
    let random_keys = device.buffer_from(&(0..batch as u64).collect::<Vec<_>>())?;
    let scores = batch * heads * queries * keys;
    let mut o = device.zeros::<X>(batch * queries * inner)?;
    let [mut probs, mut d_scores] = [device.zeros::<X>(scores)?, device.zeros::<X>(scores)?];
    let mut dq = device.zeros::<X>(batch * queries * inner)?;
    let mut dkv = device.zeros::<X>(batch * keys * 2 * inner)?;
    let mut d_table = device.zeros::<f32>(buckets * heads)?;
    // Cross-attention has no bias.
    let biased = which != "cross";
    let bias = || biased.then(|| BucketMap { table: table.all(), map: map.all(), buckets });
    let per_example = if causal { causal_pairs(&[queries]) } else { (queries * keys) as f64 };
    let pairs = batch as f64 * per_example;
    let shape = format!("{batch}x{queries}x{keys}, {heads} heads of {}", config.d_kv);
    bench.compute(&forward, shape.as_str(), attention(pairs, inner), Value::Null, || {
        let (o, probs) = (o.all_mut(), probs.all_mut());
        device.t5_attention_forward(T5AttentionForward {
            o,
            probs,
            q: q.all(),
            kv: kv.all(),
            bias: bias(),
            keys: random_keys.all(),
            dims,
        })
    })?;
    bench.compute(&backward, shape, kept_attention_backward(pairs, inner), Value::Null, || {
        let (dq, dkv) = (dq.all_mut(), dkv.all_mut());
        let d_table = biased.then(|| d_table.all_mut());
        let (d_scores, d_o, probs) = (d_scores.all_mut(), d_o.all(), probs.all());
        let (q, kv, random_keys) = (q.all(), kv.all(), random_keys.all());
        device.t5_attention_backward(T5AttentionBackward {
            dq,
            dkv,
            d_table,
            d_scores,
            d_o,
            probs,
            q,
            kv,
            bias: bias(),
            keys: random_keys,
            dims,
        })
    })
}
