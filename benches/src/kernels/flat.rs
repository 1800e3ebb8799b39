//! Operations on flat buffers: the optimizer, and update vectors on their way.

use super::shapes::{Bench, Shapes};
use crate::counts;
use crate::finetune::STEP;
use crate::values::random;
use anyhow::Result;
use gradtx_kernels::ops::{AdamWCast, AdamWUpdate, Backend, Cast, Elementwise, Mse, MseDims, SquaredError};
use gradtx_kernels::{Buffer, Elem, Real};

pub(super) fn measure<X: Real<Acc = f32>, D: Backend<X>>(
    bench: &mut Bench<'_, D>,
    shapes: &Shapes,
) -> Result<()> {
    optimizer::<X, D>(bench, shapes)?;
    updates::<X, D>(bench, shapes)?;
    squared_error::<X, D>(bench, shapes)
}

fn optimizer<X: Real<Acc = f32>, D: Backend<X>>(bench: &mut Bench<'_, D>, shapes: &Shapes) -> Result<()> {
    if !bench.wants("adamw") && !bench.wants("sum of squares") {
        return Ok(());
    }
    let (device, n) = (bench.device, shapes.values);
    let [mut p, mut m, g] = [
        random::<D, f32>(device, n, 0.02, 1)?,
        random::<D, f32>(device, n, 1e-3, 2)?,
        random::<D, f32>(device, n, 1e-3, 3)?,
    ];
    // Second moments are not negative.
    let mut v = device.zeros::<f32>(n)?;
    device.fill(v.all_mut(), 1e-6)?;
    let scale = device.buffer_from(&[1.0f32])?;
    let mut sums = device.zeros::<f32>(1)?;
    let shape = format!("{n} values");
    bench.memory("adamw", shape.as_str(), counts::adamw(n), || {
        let (p, m, v) = (p.all_mut(), m.all_mut(), v.all_mut());
        device.adamw(AdamWUpdate { p, m, v, g: g.all(), scale: scale.all(), rows: 1, len: n, step: STEP })
    })?;
    if X::DTYPE != f32::DTYPE {
        let mut y = device.zeros::<X>(n)?;
        let count = counts::adamw_with_copy(n, shapes.x);
        bench.memory("adamw with a copy", shape.as_str(), count, || {
            let (y, p) = (y.all_mut(), p.all_mut());
            let (m, v) = (m.all_mut(), v.all_mut());
            AdamWCast::<X>::adamw_cast(
                device,
                y,
                AdamWUpdate { p, m, v, g: g.all(), scale: scale.all(), rows: 1, len: n, step: STEP },
            )
        })?;
    }
    bench.memory("sum of squares", shape, counts::sum_squares(n), || {
        device.sum_squares(sums.all_mut(), g.all(), 1, n)
    })
}

/// An update is a difference of adapters; it is packed by converting it into the model's type.
fn updates<X: Real<Acc = f32>, D: Backend<X>>(bench: &mut Bench<'_, D>, shapes: &Shapes) -> Result<()> {
    if !["difference", "pack", "unpack"].iter().any(|name| bench.wants(name)) {
        return Ok(());
    }
    let (device, n) = (bench.device, shapes.values);
    let x = random::<D, f32>(device, n, 1.0, 1)?;
    let y = random::<D, f32>(device, n, 1.0, 2)?;
    let mut out = device.zeros::<f32>(n)?;
    let shape = format!("{n} values");
    bench.memory("difference", shape.as_str(), counts::difference(n), || {
        Elementwise::<f32>::difference(device, out.all_mut(), x.all(), y.all())
    })?;
    if X::DTYPE == f32::DTYPE {
        return Ok(());
    }
    let mut packed = device.zeros::<X>(n)?;
    bench.memory("pack", shape.as_str(), counts::conversion(n, shapes.x), || {
        <D as Cast<f32, X>>::cast(device, packed.all_mut(), x.all())
    })?;
    bench.memory("unpack", shape, counts::conversion(n, shapes.x), || {
        <D as Cast<X, f32>>::cast(device, out.all_mut(), packed.all())
    })
}

fn squared_error<X: Real<Acc = f32>, D: Backend<X>>(bench: &mut Bench<'_, D>, shapes: &Shapes) -> Result<()> {
    if !bench.wants("squared error") {
        return Ok(());
    }
    let (device, c) = (bench.device, shapes.translator());
    let (rows, cols) = (shapes.batch * c.teacher_blocks, c.teacher_width);
    let n = rows * cols;
    let pred = random::<D, X>(device, n, 1.0, 1)?;
    let target = random::<D, X>(device, n, 1.0, 2)?;
    let mut d_pred = device.zeros::<X>(n)?;
    let mut sums = device.zeros::<f32>(rows)?;
    let dims = MseDims { rows, cols, grad_scale: 2.0 / n as f64 };
    bench.memory("squared error", format!("{rows}x{cols}"), counts::squared_error(n, shapes.x), || {
        let (sums, d_pred) = (sums.all_mut(), Some(d_pred.all_mut()));
        Mse::<X>::mse(device, SquaredError { sums, d_pred, pred: pred.all(), target: target.all(), dims })
    })
}
