//! What a device takes of a launch, asked of it once, and what a kernel needs.
//!
//! Devices of one generation differ: a block may have 163 KiB of shared memory on an A100, 227 KiB
//! on an H100, and 99 KiB on devices of capability 8.6 and 8.9. A launch that does not fit is
//! refused here, with numbers, before the driver would fail with "invalid value".

use super::failed;
use crate::Result;
use cudarc::driver::{CudaContext, result, sys};

/// Bytes of shared memory, declared and dynamic, that a block has without asking, where the device
/// says nothing.
const PLAIN_SHARED: usize = 48 * 1024;

/// Limits of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Bytes of shared memory of a block, declared and dynamic, without asking.
    pub plain_shared: usize,
    /// The same for kernels that ask.
    pub most_shared: usize,
    /// Threads of a block.
    pub threads: usize,
    /// Registers of a block.
    pub registers: usize,
    /// Blocks of a grid in its three dimensions.
    pub grid: [usize; 3],
}

/// What a kernel needs, as its code says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// Bytes of declared shared memory.
    pub shared: usize,
    /// Registers of a thread; 0 if not known.
    pub registers: usize,
    /// Threads that a block of it may have on this device; 0 if not known.
    pub threads: usize,
}

impl Limits {
    /// Those of the device of this context.
    pub fn of(context: &CudaContext) -> Result<Self> {
        use sys::CUdevice_attribute as Attribute;
        let ask = |attribute| {
            let value = context.attribute(attribute).map_err(failed("ask for the device's limits"))?;
            Ok::<usize, crate::Error>(value.max(0) as usize)
        };
        let plain = ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK)?;
        let on_request = ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let plain = if plain == 0 { PLAIN_SHARED } else { plain };
        Ok(Self {
            plain_shared: plain,
            most_shared: on_request.max(plain),
            threads: ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
            registers: ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK)?,
            grid: [
                ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X)?,
                ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y)?,
                ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z)?,
            ],
        })
    }

    /// Why a launch is not possible, or nothing.
    pub fn refusal(&self, needs: &Needs, grid: [usize; 3], threads: usize, shared: usize) -> Option<String> {
        if grid.iter().zip(self.grid).any(|(blocks, most)| *blocks > most) {
            return Some(format!("a grid of {grid:?} blocks; the device takes {:?}", self.grid));
        }
        let most = if needs.threads == 0 { self.threads } else { needs.threads.min(self.threads) };
        if threads > most {
            return Some(format!("a block of {threads} threads; the device takes {most} of this kernel"));
        }
        // Registers are given out by warps, in units of eight a thread.
        let registers = threads.next_multiple_of(32) * needs.registers.next_multiple_of(8);
        if registers > self.registers {
            let Needs { registers: each, .. } = needs;
            return Some(format!(
                "{threads} threads of {each} registers; a block has {} registers on this device",
                self.registers
            ));
        }
        let total = needs.shared + shared;
        if total > self.most_shared {
            return Some(format!(
                "a block needs {total} bytes of shared memory ({} declared, {shared} asked for), and this \
                 device gives {} at most",
                needs.shared, self.most_shared
            ));
        }
        None
    }
}

impl Needs {
    /// Those of a kernel.
    ///
    /// # Safety
    /// The function must be one of a loaded module.
    pub unsafe fn of(function: sys::CUfunction) -> Result<Self> {
        use sys::CUfunction_attribute as Attribute;
        let ask = |attribute| {
            // SAFETY: the caller vouches for the function.
            let value = unsafe { result::function::get_function_attribute(function, attribute) };
            value.map(|v| v.max(0) as usize).map_err(failed("ask what a kernel needs"))
        };
        Ok(Self {
            shared: ask(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
            registers: ask(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            threads: ask(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A10: Limits = Limits {
        plain_shared: 48 << 10,
        most_shared: 99 << 10,
        threads: 1024,
        registers: 65_536,
        grid: [i32::MAX as usize, 65_535, 65_535],
    };
    const NEEDS: Needs = Needs { shared: 512, registers: 64, threads: 1024 };

    #[test]
    fn launches_at_the_limits_are_taken() {
        assert_eq!(A10.refusal(&NEEDS, A10.grid, 1024, (99 << 10) - 512), None);
        assert_eq!(A10.refusal(&Needs::default(), [1, 1, 1], 1024, 99 << 10), None);
    }

    #[test]
    fn what_is_beyond_a_limit_is_named() {
        let refusal = |needs: Needs, grid, threads, shared| {
            A10.refusal(&needs, grid, threads, shared).expect("it is beyond a limit")
        };
        let shared = refusal(NEEDS, [1, 1, 1], 32, (99 << 10) - 511);
        assert!(shared.contains("101377 bytes") && shared.contains("512 declared"), "{shared}");
        let registers = refusal(Needs { registers: 65, ..NEEDS }, [1, 1, 1], 1024, 0);
        assert!(registers.contains("1024 threads of 65 registers"), "{registers}");
        let threads = refusal(Needs { threads: 256, ..NEEDS }, [1, 1, 1], 257, 0);
        assert!(threads.contains("257 threads") && threads.contains("takes 256"), "{threads}");
        for grid in [[1, 65_536, 1], [1, 1, 65_536], [1 << 31, 1, 1]] {
            assert!(refusal(NEEDS, grid, 32, 0).contains("blocks"), "{grid:?}");
        }
    }
}
