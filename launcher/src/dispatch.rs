//! The one place where a device and an element type are chosen.
//!
//! Stages are generic over both; here the settings become type arguments.

use crate::config::{DeviceConfig, DeviceKind, DtypeKind};
use anyhow::Result;
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::ops::Backend;
use gradtx_kernels::Real;

/// Work that runs on any device and in any element type.
pub trait Work {
    /// What it gives back.
    type Output;

    /// Does it on this device, in the element type `X`.
    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Self::Output>;
}

/// Does work on the device that the settings name.
pub fn dispatch<W: Work>(settings: &DeviceConfig, threads: usize, work: W) -> Result<W::Output> {
    match (settings.kind, settings.dtype) {
        (DeviceKind::Cpu, DtypeKind::F32) => work.run::<f32, Cpu>(&Cpu::new(threads)),
    }
}
