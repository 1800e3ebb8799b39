//! Pinned host memory that belongs to the caller: what is prepared there goes to the device without
//! another copy on the host, and without the host waiting.

use super::stream::Event;
use super::{Cuda, failed, gate};
use crate::{Elem, Pinned, Result};
use cudarc::driver::{result, sys};
use std::ffi::c_void;

/// Pinned host memory for a number of elements.
pub struct CudaPinned<T> {
    memory: *mut T,
    len: usize,
    /// The last copy from it.
    copied: Event,
    cuda: Cuda,
}

// SAFETY: the memory belongs to this value alone, elements are `Send`, and driver handles may be used
// from any thread.
unsafe impl<T: Elem> Send for CudaPinned<T> {}
// SAFETY: shared access only reads the memory, and records an event, which the driver orders.
unsafe impl<T: Elem> Sync for CudaPinned<T> {}

impl<T: Elem> CudaPinned<T> {
    /// Zeros.
    pub(super) fn new(cuda: &Cuda, len: usize) -> Result<Self> {
        let copied = Event::new(cuda.stream()?)?;
        let bytes = len.saturating_mul(size_of::<T>());
        let _call = gate::enter();
        // SAFETY: the context is bound; the memory is given back once, in `drop`. No bytes at all
        // cannot be asked for.
        let memory = unsafe { result::malloc_host(bytes.max(1), 0) }
            .map_err(failed(format!("pin {bytes} bytes of host memory")))?;
        // SAFETY: as many bytes were allocated.
        unsafe { memory.cast::<u8>().write_bytes(0, bytes) };
        Ok(Self { memory: memory.cast(), len, copied, cuda: cuda.clone() })
    }

    /// Queues a copy of some of its values, before which they are not written to or given back.
    ///
    /// # Safety
    /// `values` must be part of this memory, and `pointer` the address of as many bytes on the device.
    pub(super) unsafe fn copy_to(&self, pointer: u64, values: &[T], copies: sys::CUstream) -> Result<()> {
        // SAFETY: the caller's; writing and giving back wait for the event recorded below.
        unsafe { result::memcpy_htod_async(pointer, values, copies) }
            .map_err(failed("copy to the device"))?;
        self.copied.record(copies)
    }
}

impl<T: Elem> Pinned<T> for CudaPinned<T> {
    fn values(&self) -> &[T] {
        // SAFETY: `len` elements were allocated, aligned to pages, and their bytes are always values:
        // of plain data. The device only reads them.
        unsafe { std::slice::from_raw_parts(self.memory, self.len) }
    }

    fn values_mut(&mut self) -> Result<&mut [T]> {
        self.cuda.stream()?;
        self.copied.synchronize()?;
        // SAFETY: as in `values`; the device is done with them, and `&mut self` makes the access
        // exclusive: copies begin with a shared reference.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.memory, self.len) })
    }
}

impl<T> Drop for CudaPinned<T> {
    fn drop(&mut self) {
        let (memory, cuda) = (self.memory.cast::<c_void>(), self.cuda.clone());
        gate::give_back(move || {
            if let Ok(stream) = cuda.stream() {
                // Copies from it may be queued still. Nothing can be done about a failure.
                let _ = stream.synchronize();
                // SAFETY: allocated in this context and given back once; no copy reads it any more.
                let _ = unsafe { result::free_host(memory) };
            }
        });
    }
}
