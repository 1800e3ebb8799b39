//! Matrix products of the models' layers, and the LM head.

use super::shapes::{Bench, Shapes};
use crate::ceilings::TAIL;
use crate::counts::product;
use crate::values::{random, tokens};
use anyhow::Result;
use gradtx_kernels::ops::{
    Backend, Gemm, GemmDims, Linear, LinearBackwardWeight, LinearDims, LmHead, LmHeadDims, LmHeadLoss,
    LmHeadScratch, Out,
};
use gradtx_kernels::{Buffer, Real};
use gradtx_models::lora::Projection;
use gradtx_plan::cost::rates::Kind;
use serde_json::{Value, json};

pub(super) fn measure<X: Real<Acc = f32>, D: Backend<X>>(
    bench: &mut Bench<'_, D>,
    shapes: &Shapes,
) -> Result<()> {
    let t = shapes.tokens;
    for (name, fused) in [
        ("qkv", Projection::Qkv),
        ("o", Projection::O),
        ("gate and up", Projection::GateUp),
        ("down", Projection::Down),
    ] {
        let (inputs, outputs) = fused.dims(&shapes.config().block());
        let tail = if shapes.layout.targets(0, fused).is_empty() { 0 } else { TAIL };
        forward::<X, D>(bench, name, t, outputs, inputs)?;
        if tail > 0 {
            forward::<X, D>(bench, &format!("{name} with tail"), t, outputs, inputs + tail)?;
        }
        backward::<X, D>(bench, name, t, inputs + tail, outputs)?;
    }
    translator::<X, D>(bench, shapes)?;
    head::<X, D>(bench, shapes)
}

/// `x Wᵀ`
fn forward<X: Real<Acc = f32>, D: Backend<X>>(
    bench: &mut Bench<'_, D>,
    name: &str,
    m: usize,
    n: usize,
    k: usize,
) -> Result<()> {
    products::<X, D>(bench, &format!("gemm {name} forward"), GemmDims::new(m, n, k, false, true))
}

/// `dy W`
fn backward<X: Real<Acc = f32>, D: Backend<X>>(
    bench: &mut Bench<'_, D>,
    name: &str,
    m: usize,
    n: usize,
    k: usize,
) -> Result<()> {
    products::<X, D>(bench, &format!("gemm {name} backward"), GemmDims::new(m, n, k, false, false))
}

fn products<X: Real<Acc = f32>, D: Backend<X>>(
    bench: &mut Bench<'_, D>,
    name: &str,
    dims: GemmDims,
) -> Result<()> {
    if !bench.wants(name) {
        return Ok(());
    }
    let (device, GemmDims { m, n, k, .. }) = (bench.device, dims);
    let a = random::<D, X>(device, m * k, 1.0, 1)?;
    let b = random::<D, X>(device, k * n, 1.0, 2)?;
    let mut c = device.zeros::<X>(m * n)?;
    let shape = format!("{m}x{n}x{k}");
    bench.measure(name, shape, product(m, n, k), Some(Kind::Gemm), Value::Null, || {
        Gemm::<X>::gemm(device, c.all_mut(), a.all(), b.all(), dims)
    })
}

/// The widest layers of the translator: forward, and the gradients of their weights.
fn translator<X: Real<Acc = f32>, D: Backend<X>>(bench: &mut Bench<'_, D>, shapes: &Shapes) -> Result<()> {
    let c = shapes.translator();
    let (d, f) = (c.t5.d_model, c.t5.d_ff);
    let (students, teachers) = (shapes.batch * c.student_blocks, shapes.batch * c.teacher_blocks);
    let layers = [
        ("input_proj", students, d, c.student_width),
        ("output_proj", teachers, c.teacher_width, d),
        ("t5 gate and up", students, 2 * f, d),
        ("t5 down", students, d, f),
    ];
    for (name, m, n, k) in layers {
        forward::<X, D>(bench, name, m, n, k)?;
        let name = format!("gemm {name} weight gradient");
        if !bench.wants(&name) {
            continue;
        }
        let device = bench.device;
        let x = random::<D, X>(device, m * k, 1.0, 1)?;
        let dy = random::<D, X>(device, m * n, 1e-3, 2)?;
        let mut dw = device.zeros::<f32>(n * k)?;
        let dims = LinearDims::new(m, k, n);
        let shape = format!("{n}x{k}x{m}");
        bench.compute(&name, shape, product(n, k, m), json!({"translator": true}), || {
            Linear::<X>::linear_backward_weight(
                device,
                LinearBackwardWeight {
                    dw: dw.all_mut(),
                    dbias: None,
                    dy: dy.all(),
                    x: x.all(),
                    dims,
                    out: Out::Assign,
                },
            )
        })?;
    }
    Ok(())
}

/// The head on an eighth of the stream's tokens, with the gradient of its input.
fn head<X: Real<Acc = f32>, D: Backend<X>>(bench: &mut Bench<'_, D>, shapes: &Shapes) -> Result<()> {
    if !bench.wants("lm head") {
        return Ok(());
    }
    let (device, c, t) = (bench.device, shapes.config(), shapes.tokens);
    let labels = (t / 8).max(1);
    let chunk = labels.min(<D as LmHead<X>>::CHUNK);
    let dims = LmHeadDims { tokens: t, labels, hidden: c.hidden, vocab: c.vocab, chunk };
    let x = random::<D, X>(device, t * c.hidden, 1.0, 1)?;
    let w = random::<D, X>(device, c.vocab * c.hidden, 0.02, 2)?;
    let rows = device.buffer_from(&(0..labels as u32).collect::<Vec<_>>())?;
    let targets = device.buffer_from(&tokens(labels, c.vocab, 3))?;
    let weights = device.buffer_from(&vec![1.0 / labels as f32; labels])?;
    let mut loss = device.zeros::<f32>(labels)?;
    let mut dx = device.zeros::<X>(t * c.hidden)?;
    let mut logits = device.zeros::<X>(chunk * c.vocab)?;
    let [mut some, mut d_some] = [device.zeros::<X>(chunk * c.hidden)?, device.zeros::<X>(chunk * c.hidden)?];
    let shape = format!("{labels} labels, {}x{}", c.vocab, c.hidden);
    bench.compute("lm head", shape, shapes.sizes().head(labels, c.vocab), Value::Null, || {
        let scratch =
            LmHeadScratch { logits: logits.all_mut(), rows: some.all_mut(), d_rows: d_some.all_mut() };
        let (loss, dx) = (loss.all_mut(), Some(dx.all_mut()));
        let (x, w, rows, targets) = (x.all(), w.all(), rows.all(), targets.all());
        device.lm_head_loss(LmHeadLoss {
            loss,
            dx,
            dw: None,
            scratch,
            x,
            w,
            rows,
            targets,
            weights: weights.all(),
            dims,
        })
    })
}
