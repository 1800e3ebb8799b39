//! Facts about the device that lines of results carry.

use super::measure::rounded;
use anyhow::Result;
use gradtx_kernels::Device;
use gradtx_kernels::cpu::Cpu;
use gradtx_run::failure::unusable;
use gradtx_runtime::plan::{Room, available_memory};
use serde_json::{Map, Value};
use std::any::Any;

/// The device of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    /// `cpu`, or the driver's name of a GPU.
    pub device: String,
    /// Model of the host's processor.
    pub processor: String,
    /// Threads, of a CPU.
    pub threads: Option<usize>,
}

/// The CPU, where the device is one.
pub(crate) fn as_cpu<D: Device>(device: &D) -> Option<&Cpu> {
    (device as &dyn Any).downcast_ref()
}

impl Machine {
    /// Of this device.
    pub fn of<D: Device>(device: &D) -> Self {
        let (threads, name) = (as_cpu(device).map(Cpu::threads), device.name());
        // What comes after a device's number is what the driver calls it.
        let of_driver = name.split_once(", ").map_or(name.as_str(), |(_, rest)| rest);
        let device = if threads.is_some() { "cpu" } else { of_driver };
        Self { device: device.into(), processor: processor(), threads }
    }

    /// Whether it is the host's processor.
    pub(crate) fn is_cpu(&self) -> bool {
        self.threads.is_some()
    }
}

/// As the system calls it.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split_once(':')).map_or("unknown".into(), |(_, name)| name.trim().into())
}

/// Memory that buffers can have.
pub fn room<D: Device>(device: &D) -> Result<Room> {
    match device.free_memory()? {
        Some(free) => Ok(Room::Device { free, group: false }),
        None => Ok(Room::Host(available_memory()?)),
    }
}

/// Bytes that nobody has.
pub fn free_memory<D: Device>(device: &D) -> Result<u64> {
    Ok(device.free_memory()?.map_or_else(available_memory, Ok)?)
}

/// Bytes that are in use, where `before` were free at first: on a device with memory of its own
/// those of now, which is the most there was, since buffers are taken before the first step; on
/// a CPU the most that this process has had.
pub(crate) fn used_memory<D: Device>(device: &D, before: u64) -> Option<u64> {
    if let Some(free) = device.free_memory().ok()? {
        return Some(before.saturating_sub(free));
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|k| k * 1024)
}

/// Device time of the launches of one name.
#[derive(Clone, Debug, PartialEq)]
pub struct Operation {
    /// Its name.
    pub name: String,
    /// Launches.
    pub calls: u64,
    /// Seconds of the device.
    pub seconds: f64,
    /// Floating-point operations, or 0.
    pub flops: f64,
    /// Bytes, or 0.
    pub bytes: f64,
}

/// What the operations of a step took, the longest first; nothing where the device is a CPU, and then
/// the step is not run.
///
/// # Errors
/// Those of the step, and if the device cannot take the time.
#[cfg(feature = "cuda")]
pub fn operations<D: Device>(
    device: &D,
    step: impl FnOnce() -> Result<()>,
) -> Result<Option<Vec<Operation>>> {
    let Some(cuda) = (device as &dyn Any).downcast_ref::<gradtx_kernels::cuda::Cuda>() else {
        return Ok(None);
    };
    cuda.start_profile()?;
    let done = step();
    let times = cuda.stop_profile()?;
    done?;
    let of = |t: gradtx_kernels::cuda::OperationTime| {
        let gradtx_kernels::cuda::OperationTime { name, calls, seconds, flops, bytes } = t;
        Operation { name, calls, seconds, flops, bytes }
    };
    Ok(Some(times.into_iter().map(of).collect()))
}

/// The same in a program without GPUs.
///
/// # Errors
/// None.
#[cfg(not(feature = "cuda"))]
pub fn operations<D: Device>(_: &D, _: impl FnOnce() -> Result<()>) -> Result<Option<Vec<Operation>>> {
    Ok(None)
}

/// Has the device measure algorithms of matrix products meanwhile; lines of those that are worth a choice.
///
/// # Errors
/// Those of the work, and on devices without such algorithms.
pub fn tuned<D: Device>(device: &D, work: impl FnOnce() -> Result<()>) -> Result<Vec<String>> {
    #[cfg(feature = "cuda")]
    if let Some(cuda) = (device as &dyn Any).downcast_ref::<gradtx_kernels::cuda::Cuda>() {
        cuda.start_tuning();
        let done = work();
        let lines = cuda.stop_tuning();
        return done.map(|()| lines);
    }
    let _ = (device, work);
    Err(unusable("--tune: products on a CPU have one algorithm; it is for --device cuda"))
}

/// Begins to add up times of operations, where the device does that.
pub fn start_profile<D: Device>(device: &D) {
    if let Some(cpu) = as_cpu(device) {
        cpu.start_profile();
    }
}

/// Parts of `seconds` that operations took since [`start_profile`], the longest first, and what
/// none of them took; null on other devices than a CPU.
pub(crate) fn shares_of_time<D: Device>(device: &D, seconds: f64) -> Value {
    let Some(cpu) = as_cpu(device) else { return Value::Null };
    let profile = cpu.stop_profile();
    let mut shares: Vec<(&str, f64)> =
        profile.iter().map(|(op, t)| (*op, t.time.as_secs_f64() / seconds)).collect();
    shares.sort_by(|a, b| b.1.total_cmp(&a.1));
    let rest = 1.0 - shares.iter().map(|(_, share)| share).sum::<f64>();
    shares.push(("outside operations", rest));
    let share = |(op, part): &(&str, f64)| (op.to_string(), rounded(*part));
    Value::Object(shares.iter().map(share).collect::<Map<_, _>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_tells_what_it_is() {
        let cpu = Cpu::new(3);
        let machine = Machine::of(&cpu);
        assert_eq!((machine.device.as_str(), machine.threads), ("cpu", Some(3)));
        assert!(used_memory(&cpu, 0).unwrap() > 0 && free_memory(&cpu).unwrap() > 0);
    }
}
