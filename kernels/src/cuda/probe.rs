//! Which CUDA devices this process could use.

use cudarc::driver::{result, sys};

/// What the driver says of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaDevice {
    /// Its number, as in `CUDA_VISIBLE_DEVICES` order.
    pub ordinal: usize,
    /// Its product name.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Bytes of memory.
    pub memory: usize,
}

/// The devices of this machine, or one sentence saying why there are none: no driver
/// library, a driver that does not start, or no device that it shows.
pub fn devices() -> std::result::Result<Vec<CudaDevice>, String> {
    // SAFETY: only looks whether the driver's library can be loaded. Asked first,
    // because every other call panics without it.
    if !unsafe { sys::is_culib_present() } {
        return Err("no CUDA driver here: libcuda.so was not found by the dynamic loader".into());
    }
    let failed = |what: &str, e: result::DriverError| format!("the CUDA driver cannot {what}: {e}");
    result::init().map_err(|e| failed("start", e))?;
    let count = result::device::get_count().map_err(|e| failed("count its devices", e))?;
    if count == 0 {
        return Err("the CUDA driver shows no device (is CUDA_VISIBLE_DEVICES empty?)".into());
    }
    (0..count).map(|i| describe(i).map_err(|e| failed(&format!("describe device {i}"), e))).collect()
}

/// The CUDA version that the driver is for, as 1000 · major + 10 · minor.
pub(super) fn driver_version() -> std::result::Result<i32, String> {
    let mut version = 0;
    // SAFETY: writes one number; the driver's library is there, for it has shown a device.
    let status = unsafe { sys::cuDriverGetVersion(&mut version) };
    status.result().map_err(|e| format!("the CUDA driver does not give its version: {e}"))?;
    Ok(version)
}

fn describe(ordinal: i32) -> std::result::Result<CudaDevice, result::DriverError> {
    use sys::CUdevice_attribute as Attribute;
    let device = result::device::get(ordinal)?;
    // SAFETY: `device` is a handle that the driver has just given out.
    let (memory, major, minor) = unsafe {
        (
            result::device::total_mem(device)?,
            result::device::get_attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            result::device::get_attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        )
    };
    let name = result::device::get_name(device)?;
    Ok(CudaDevice { ordinal: ordinal as usize, name, capability: (major, minor), memory })
}

#[cfg(test)]
mod tests {
    /// With a driver: at least one device with memory. Without: one sentence, no panic.
    #[test]
    fn asking_never_panics() {
        match super::devices() {
            Ok(found) => assert!(!found.is_empty() && found.iter().all(|d| d.memory > 0)),
            Err(why) => assert!(why.contains("CUDA"), "{why}"),
        }
    }
}
