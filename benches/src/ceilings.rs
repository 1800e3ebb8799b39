//! What the device reaches at best: a large matrix product and a large copy, now, in the type
//! that is measured.
//!
//! The product is also measured with 16 further columns of the summed dimension: that is the
//! form in which adapters ride in the base model's products.

use super::counts::Count;
use super::machine::Machine;
pub use super::measured::Ceilings;
use super::options::Common;
use super::results::{Entry, Results};
use super::values::random;
use super::{Measured, On, measure};
use anyhow::Result;
use gradtx_kernels::ops::{Backend, Elementwise, Gemm, GemmDims};
use gradtx_kernels::{Buffer, Real};
use gradtx_plan::cost::rates::Kind;
use gradtx_runtime::plan::human_bytes;

/// The ceilings and nothing else.
#[derive(Debug, clap::Args)]
pub struct Job {
    #[command(flatten)]
    pub(super) common: Common,
}

impl Measured for Job {
    fn measure<X: Real<Acc = f32>, D: Backend<X>>(&self, _: &On<'_, D>, _: &mut Results) -> Result<()> {
        // Every benchmark begins with them.
        Ok(())
    }
}

/// Columns that adapters add to the summed dimension on CUDA, however few they need.
pub(crate) const TAIL: usize = 64;

/// Measures both.
pub fn measure<X: Real<Acc = f32>, D: Backend<X>>(
    device: &D,
    machine: &Machine,
    common: &Common,
    results: &mut Results,
) -> Result<Ceilings> {
    let n = common.large.unwrap_or(if machine.is_cpu() { 2048 } else { 8192 });
    let gemm = product::<X, D>(device, n, 0, results)?;
    product::<X, D>(device, n, TAIL, results)?;
    let copy = copies::<X, D>(device, 16 * n * n, results)?;
    Ok(Ceilings { gemm, copy })
}

/// `[n, n + tail] · [n, n + tail]ᵀ`, the form of a linear layer. Operations per second.
fn product<X: Real<Acc = f32>, D: Backend<X>>(
    device: &D,
    n: usize,
    tail: usize,
    results: &mut Results,
) -> Result<f64> {
    let k = n + tail;
    let (a, b) = (random::<D, X>(device, n * k, 1.0, 1)?, random::<D, X>(device, n * k, 1.0, 2)?);
    let mut c = device.zeros::<X>(n * n)?;
    let dims = GemmDims::new(n, n, k, false, true);
    let times = measure::operation(device, results.repeats(), || {
        Ok(Gemm::<X>::gemm(device, c.all_mut(), a.all(), b.all(), dims)?)
    })?;
    let count = Count::flops(2.0 * (n * n * k) as f64);
    let rate = count.flops / times.median();
    let name = if tail == 0 { "large gemm" } else { "large gemm with tail" };
    results.add(device, Entry::new(name, format!("{n}x{n}x{k}"), count, times).of(Kind::Gemm))?;
    Ok(rate)
}

/// The device's own copy, and the copy that our kernels can do (`y = x`), which on a CPU uses all
/// threads: the faster of the two is what memory gives. Bytes per second.
fn copies<X: Real<Acc = f32>, D: Backend<X>>(device: &D, bytes: usize, results: &mut Results) -> Result<f64> {
    let len = bytes / size_of::<X>();
    let from = random::<D, X>(device, len, 1.0, 3)?;
    let mut to = device.zeros::<X>(len)?;
    let count = Count::bytes(2.0 * bytes as f64);
    let shape = human_bytes(bytes as u64);
    let plain = measure::operation(device, results.repeats(), || Ok(device.copy(to.all_mut(), from.all())?))?;
    let ours = measure::operation(device, results.repeats(), || {
        Ok(Elementwise::<X>::axpby(device, to.all_mut(), 1.0, from.all(), 0.0)?)
    })?;
    let best = count.bytes / plain.median().min(ours.median());
    results.add(device, Entry::new("large copy", shape.as_str(), count, plain))?;
    results.add(device, Entry::new("large copy by axpby", shape, count, ours))?;
    Ok(best)
}
