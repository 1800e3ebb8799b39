//! The one place where a device and an element type are chosen.
//!
//! Stages are generic over both; here the settings become type arguments. A rank takes the
//! GPU of its number among the ranks of its node, unless the starter shows it only one.

use crate::config::DeviceConfig;
#[cfg(feature = "cuda")]
use crate::config::DeviceKind;
use crate::context::Context;
use crate::device::take;
use anyhow::Result;
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::ops::Backend;
use gradtx_kernels::{Device, Real};
use gradtx_runtime::comm::RankInfo;
use gradtx_runtime::plan::{Room, available_memory};

#[cfg(feature = "cuda")]
use {
    crate::config::DtypeKind, crate::device::ordinal, crate::failure::unusable_with, gradtx_kernels::bf16,
    gradtx_kernels::cuda::Cuda,
};

/// Work that runs on any device and in any element type.
pub trait Work {
    /// What it gives back.
    type Output;

    /// Does it on this device, in the element type `X`.
    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Self::Output>;
}

/// A question whose answer depends on device and element type, but needs no device to be there.
pub trait Question {
    /// The answer.
    type Answer;

    /// Answers it for the element type `X` on devices of type `D`.
    fn answer<X: Real<Acc = f32>, D: Backend<X>>(self) -> Self::Answer;
}

/// Does work on the device that the settings name.
///
/// # Errors
/// Those of the work; and if the device is not there, or this program cannot use such devices.
pub fn dispatch<W: Work>(settings: &DeviceConfig, context: &Context, work: W) -> Result<W::Output> {
    let settings = take(settings, &context.place)?.settings;
    match settings.kind {
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => {
            let device = cuda(&context.place)?;
            context.note_device(device.provenance());
            match settings.dtype {
                DtypeKind::Bf16 => work.run::<bf16, Cuda>(&device),
                DtypeKind::Auto | DtypeKind::F32 => work.run::<f32, Cuda>(&device),
            }
        }
        // It computes in f32 only, which is what was taken with it.
        _ => work.run::<f32, Cpu>(&Cpu::new(context.threads)),
    }
}

/// Answers a question for the device and element type that the settings name, `auto` being
/// replaced by what was taken ([`take`]).
pub fn answer<Q: Question>(settings: &DeviceConfig, question: Q) -> Q::Answer {
    match (settings.kind, settings.dtype) {
        #[cfg(feature = "cuda")]
        (DeviceKind::Cuda, DtypeKind::F32) => question.answer::<f32, Cuda>(),
        #[cfg(feature = "cuda")]
        (DeviceKind::Cuda, DtypeKind::Auto | DtypeKind::Bf16) => question.answer::<bf16, Cuda>(),
        _ => question.answer::<f32, Cpu>(),
    }
}

/// Memory that this rank can have on a device: what the device has left, or its part of what
/// the host has left for the ranks of its node.
pub fn memory_for<D: Device>(device: &D, place: &RankInfo) -> Result<Room> {
    match device.free_memory()? {
        Some(free) => Ok(Room::Device { free, group: false }),
        None => Ok(Room::Host(host_memory(place)?)),
    }
}

/// Bytes of main memory that this rank can have.
pub fn host_memory(place: &RankInfo) -> Result<u64> {
    Ok(available_memory()? / place.local_size.max(1) as u64)
}

/// [`memory_for`] the device that the settings name.
pub fn memory(settings: &DeviceConfig, place: &RankInfo) -> Result<Room> {
    match take(settings, place)?.settings.kind {
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => memory_for(&cuda(place)?, place),
        _ => memory_for(&Cpu::new(1), place),
    }
}

/// The GPU of the rank at this place.
#[cfg(feature = "cuda")]
fn cuda(place: &RankInfo) -> Result<Cuda> {
    let hint = || Some("`gradtx doctor` lists what is here; `--device cpu` works everywhere".into());
    let found = gradtx_kernels::cuda::devices().map_err(|why| unusable_with(why, hint()))?;
    let ordinal = ordinal(place, found.len()).map_err(|why| unusable_with(why, hint()))?;
    Cuda::new(ordinal).map_err(|e| unusable_with(e.to_string(), hint()))
}
