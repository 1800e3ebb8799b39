//! Operations on the rows of a stream: norms, rotation, gates, embedding, dropout.

use super::shapes::{Bench, Shapes};
use crate::counts::mixed_segments;
use crate::models::stream;
use crate::values::{random, tokens};
use anyhow::Result;
use gradtx_kernels::ops::{
    Backend, DropoutDims, GatedDims, GatedKind, LoraDims, Out, QkvDims, RmsNorm, RmsNormBackward,
    RmsNormDims, RmsNormForward, RmsNormLoraBackward, RmsNormLoraForward, RopeBackward, RopeForward,
};
use gradtx_kernels::{Buffer, Real};
use gradtx_models::lora::{Projection, initial_adapter};
use gradtx_runtime::data::{BatchCapacity, DeviceBatch};

pub(super) fn measure<X: Real<Acc = f32>, D: Backend<X>>(
    bench: &mut Bench<'_, D>,
    shapes: &Shapes,
) -> Result<()> {
    norms::<X, D>(bench, shapes)?;
    adapted_norms::<X, D>(bench, shapes)?;
    rotation::<X, D>(bench, shapes)?;
    gate::<X, D>(bench, shapes, "swiglu", GatedKind::Silu, shapes.config().intermediate)?;
    gate::<X, D>(bench, shapes, "gated gelu", GatedKind::GeluTanh, shapes.translator().t5.d_ff)?;
    embedding::<X, D>(bench, shapes)?;
    dropout::<X, D>(bench, shapes)
}

fn norms<X: Real<Acc = f32>, D: Backend<X>>(bench: &mut Bench<'_, D>, shapes: &Shapes) -> Result<()> {
    if !bench.wants("rmsnorm forward") && !bench.wants("rmsnorm backward") {
        return Ok(());
    }
    let (device, t, h) = (bench.device, shapes.tokens, shapes.config().hidden);
    let x = random::<D, X>(device, t * h, 1.0, 1)?;
    let w = random::<D, X>(device, h, 1.0, 2)?;
    let dy = random::<D, X>(device, t * h, 1.0, 3)?;
    let mut y = device.zeros::<X>(t * h)?;
    let mut inv_rms = device.zeros::<f32>(t)?;
    let dims = RmsNormDims::new(t, h, 1e-6);
    let shape = format!("{t}x{h}");
    bench.memory("rmsnorm forward", shape.as_str(), shapes.sizes().norm(), || {
        let (y, inv_rms) = (y.all_mut(), inv_rms.all_mut());
        RmsNorm::<X>::rmsnorm_forward(device, RmsNormForward { y, inv_rms, x: x.all(), w: w.all(), dims })
    })?;
    bench.memory("rmsnorm backward", shape, shapes.sizes().norm_backward(), || {
        let (dx, dy) = (y.all_mut(), dy.all());
        let (x, inv_rms, w) = (x.all(), inv_rms.all(), w.all());
        RmsNorm::<X>::rmsnorm_backward(
            device,
            RmsNormBackward { dx, dw: None, dy, x, inv_rms, w, dims, out: Out::Add },
        )
    })
}

/// The norm before q, k and v with the adapters of the first block, dropout included.
fn adapted_norms<X: Real<Acc = f32>, D: Backend<X>>(bench: &mut Bench<'_, D>, shapes: &Shapes) -> Result<()> {
    if !bench.wants("rmsnorm with adapters forward") && !bench.wants("rmsnorm with adapters backward") {
        return Ok(());
    }
    let (device, t, config, layout) = (bench.device, shapes.tokens, shapes.config(), &shapes.layout);
    let h = config.hidden;
    let lora = layout.lora();
    let dims = LoraDims {
        tokens: t,
        in_dim: h,
        out_dim: config.qkv_dim(),
        rank: lora.rank,
        scale: lora.scale(),
        dropout: lora.dropout,
        adapter_stride: layout.total(),
        targets: layout.targets(0, Projection::Qkv),
    };
    let packed = stream(&mixed_segments(t), config.vocab, 1);
    let mut batch = DeviceBatch::<D, f32>::new(device, BatchCapacity::of([&packed]))?;
    batch.load(device, &packed)?;
    let adapters = device.buffer_from(&initial_adapter(layout, 1))?;
    let mut grads = device.zeros::<f32>(layout.total())?;
    let x = random::<D, X>(device, t * h, 1.0, 1)?;
    let w = random::<D, X>(device, h, 1.0, 2)?;
    let mut dx = random::<D, X>(device, t * h, 1.0, 3)?;
    let mut input = device.zeros::<X>(D::lora_input_len(&dims))?;
    let mut d_input = random::<D, X>(device, D::lora_input_len(&dims), 0.01, 4)?;
    let mut inv_rms = device.zeros::<f32>(t)?;
    let norm = RmsNormDims::new(t, h, 1e-6);
    let shape = format!("{t}x{h}, {} columns of s", dims.tail());
    bench.memory(
        "rmsnorm with adapters forward",
        shape.as_str(),
        shapes.sizes().norm_with_adapters(dims.tail()),
        || {
            let (input, inv_rms) = (input.all_mut(), inv_rms.all_mut());
            let (x, w, adapters) = (x.all(), w.all(), adapters.all());
            device.rmsnorm_lora_forward(RmsNormLoraForward {
                input,
                inv_rms,
                x,
                w_norm: w,
                adapters,
                segments: batch.segments(),
                norm,
                dims,
            })
        },
    )?;
    bench.memory(
        "rmsnorm with adapters backward",
        shape,
        shapes.sizes().norm_with_adapters_backward(dims.tail()),
        || {
            let (dx, d_input, grads) = (dx.all_mut(), d_input.all_mut(), grads.all_mut());
            let (x, input, inv_rms, w) = (x.all(), input.all(), inv_rms.all(), w.all());
            let (adapters, segments) = (adapters.all(), batch.segments());
            device.rmsnorm_lora_backward(RmsNormLoraBackward {
                dx,
                d_input,
                grads,
                x,
                input,
                inv_rms,
                w_norm: w,
                adapters,
                segments,
                norm,
                dims,
            })
        },
    )
}

fn rotation<X: Real<Acc = f32>, D: Backend<X>>(bench: &mut Bench<'_, D>, shapes: &Shapes) -> Result<()> {
    if !bench.wants("rope forward") && !bench.wants("rope backward") {
        return Ok(());
    }
    let (device, t, config) = (bench.device, shapes.tokens, shapes.config());
    let dims =
        QkvDims { tokens: t, heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim };
    let row = dims.row();
    let mut qkv = random::<D, X>(device, t * row, 1.0, 1)?;
    let bias = random::<D, X>(device, row, 1e-3, 2)?;
    // Angles of a rotation, so that repeating it keeps lengths.
    let half = config.head_dim / 2;
    let angles: Vec<f32> = (0..t * half).map(|i| (i % 6283) as f32 / 1e3).collect();
    let cos = device.buffer_from(&angles.iter().map(|a| a.cos()).collect::<Vec<_>>())?;
    let sin = device.buffer_from(&angles.iter().map(|a| a.sin()).collect::<Vec<_>>())?;
    let positions = device.buffer_from(&(0..t as u32).collect::<Vec<_>>())?;
    let shape = format!("{t}x{row}");
    let v = config.kv_dim();
    bench.memory("rope forward", shape.as_str(), shapes.sizes().rotation(row), || {
        let (cos, sin, positions) = (cos.all(), sin.all(), positions.all());
        device.rope_forward(RopeForward {
            qkv: qkv.all_mut(),
            bias: Some(bias.all()),
            cos,
            sin,
            positions,
            dims,
        })
    })?;
    bench.memory("rope backward", shape, shapes.sizes().rotation_backward(row, v), || {
        let (cos, sin, positions) = (cos.all(), sin.all(), positions.all());
        device.rope_backward(RopeBackward { dqkv: qkv.all_mut(), dbias: None, cos, sin, positions, dims })
    })
}

fn gate<X: Real<Acc = f32>, D: Backend<X>>(
    bench: &mut Bench<'_, D>,
    shapes: &Shapes,
    name: &str,
    kind: GatedKind,
    cols: usize,
) -> Result<()> {
    let [forward, backward] = ["forward", "backward"].map(|way| format!("{name} {way}"));
    if !bench.wants(&forward) && !bench.wants(&backward) {
        return Ok(());
    }
    let (device, t) = (bench.device, shapes.tokens);
    let gate_up = random::<D, X>(device, t * 2 * cols, 1.0, 1)?;
    let mut h = random::<D, X>(device, t * cols, 1.0, 2)?;
    let dims = GatedDims { rows: t, cols, h_stride: cols, kind };
    let shape = format!("{t}x{cols}");
    bench.memory(&forward, shape.as_str(), shapes.sizes().gated(cols), || {
        device.gated_forward(h.all_mut(), gate_up.all(), dims)
    })?;
    let mut d_gate_up = device.zeros::<X>(t * 2 * cols)?;
    bench.memory(&backward, shape, shapes.sizes().gated_backward(cols), || {
        device.gated_backward(d_gate_up.all_mut(), h.all(), gate_up.all(), dims)
    })
}

fn embedding<X: Real<Acc = f32>, D: Backend<X>>(bench: &mut Bench<'_, D>, shapes: &Shapes) -> Result<()> {
    if !bench.wants("embedding") {
        return Ok(());
    }
    let (device, t, config) = (bench.device, shapes.tokens, shapes.config());
    let table = random::<D, X>(device, config.vocab * config.hidden, 1.0, 1)?;
    let ids = device.buffer_from(&tokens(t, config.vocab, 2))?;
    let mut x = device.zeros::<X>(t * config.hidden)?;
    let shape = format!("{t} of {}x{}", config.vocab, config.hidden);
    bench.memory("embedding", shape, shapes.sizes().embedding(), || {
        device.embedding_forward(x.all_mut(), table.all(), ids.all(), config.hidden)
    })
}

fn dropout<X: Real<Acc = f32>, D: Backend<X>>(bench: &mut Bench<'_, D>, shapes: &Shapes) -> Result<()> {
    if !bench.wants("dropout") {
        return Ok(());
    }
    let (device, t, width) = (bench.device, shapes.tokens, shapes.translator().t5.d_model);
    let mut x = random::<D, X>(device, t * width, 1.0, 1)?;
    let keys = device.buffer_from(&[7u64])?;
    // So rarely that repeating it leaves values.
    let dims = DropoutDims { rows: t, cols: width, rows_per_key: t, p: 1e-6, site: 1 };
    bench.memory("dropout", format!("{t}x{width}"), shapes.sizes().dropout(width), || {
        device.dropout(x.all_mut(), keys.all(), dims)
    })
}
