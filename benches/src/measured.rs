//! [`Measured`]: a benchmark, and what it is given.

use super::machine::Machine;
use super::results::Results;
use anyhow::Result;
use gradtx_kernels::{Backend, Real};
use std::time::Instant;

/// A benchmark that runs on any device.
pub trait Measured {
    /// Measures, and adds lines.
    fn measure<X: Real<Acc = f32>, D: Backend<X>>(&self, on: &On<'_, D>, results: &mut Results)
    -> Result<()>;
}

/// What every benchmark is given.
pub struct On<'a, D> {
    /// The device.
    pub device: &'a D,
    /// Facts about it.
    pub machine: &'a Machine,
    /// What it reaches at best.
    pub ceilings: &'a Ceilings,
    /// When the command began.
    pub started: Instant,
    /// Whether operations are measured one by one, too.
    pub profile: bool,
    /// Threads of the host.
    pub threads: usize,
}

/// The best rates of this run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Operations per second of the large product.
    pub gemm: f64,
    /// Bytes read and written per second of the large copy.
    pub copy: f64,
}
