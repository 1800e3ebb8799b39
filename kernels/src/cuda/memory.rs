//! Device memory: allocations, and pinned host memory that copies go through.

use super::stream::{Event, Stream};
use super::{CudaDevice, failed, gate};
use crate::{Error, Result};
use cudarc::driver::{CudaContext, result, sys};
use std::ffi::c_void;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Locks what one operation at a time uses. A panic elsewhere leaves nothing half done in it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Some bytes of device memory; freed when dropped, after what its device's streams still do with them.
pub(super) struct Allocation {
    pointer: u64,
    bytes: usize,
    stream: Arc<Stream>,
}

impl Allocation {
    /// Memory that holds anything. No bytes take no memory.
    pub fn new(stream: &Arc<Stream>, device: &CudaDevice, bytes: usize) -> Result<Self> {
        let stream = Arc::clone(stream);
        if bytes == 0 {
            return Ok(Self { pointer: 0, bytes, stream });
        }
        stream.allocations.fetch_add(1, Ordering::Relaxed);
        let _call = gate::enter();
        // SAFETY: the context is bound; the memory is given back once, in `drop`.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(pointer) => Ok(Self { pointer, bytes, stream }),
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let free = stream.context.mem_get_info().map_or(0, |(free, _)| free);
                let device = format!("{} ({free} of {} bytes are free)", device.name, device.memory);
                Err(Error::OutOfMemory { device, bytes })
            }
            Err(e) => Err(failed(format!("allocate {bytes} bytes"))(e)),
        }
    }

    pub fn pointer(&self) -> u64 {
        self.pointer
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let (pointer, stream) = (self.pointer, Arc::clone(&self.stream));
        gate::give_back(move || {
            if stream.context.bind_to_thread().is_ok() {
                // What is still queued may use it. Nothing can be done about a failure.
                let _ = stream.synchronize();
                // SAFETY: allocated in this context and freed once, when nothing uses it any more.
                let _ = unsafe { result::free_sync(pointer) };
            }
        });
    }
}

/// Bytes of one piece of pinned memory: enough that a copy's fixed cost does not show.
const PIECE: usize = 4 << 20;

/// Bytes behind a piece, for the word where kernels report.
const WORD: usize = size_of::<u32>();

/// Pinned host memory. The driver copies from and to it at full speed and without waiting;
/// while one piece is on its way to the device the host fills the other.
pub(super) struct Staging {
    pieces: [Piece; 2],
    next: usize,
}

struct Piece {
    memory: *mut u8,
    /// The last copy from this piece.
    copied: Event,
    context: Arc<CudaContext>,
}

// SAFETY: the memory belongs to the piece alone, and driver handles may be used from any thread.
unsafe impl Send for Piece {}

impl Piece {
    fn new(stream: &Stream) -> Result<Self> {
        let copied = Event::new(stream)?;
        let _call = gate::enter();
        // SAFETY: the context is bound; the memory is given back once, in `drop`.
        let memory = unsafe { result::malloc_host(PIECE + WORD, 0) }.map_err(failed("pin host memory"))?;
        Ok(Self { memory: memory.cast(), copied, context: Arc::clone(&stream.context) })
    }

    /// Waits until the last copy from this piece is done, and lends its bytes.
    fn bytes(&mut self) -> Result<&mut [u8]> {
        Ok(self.parts()?.0)
    }

    /// The same, and the bytes behind them.
    fn parts(&mut self) -> Result<(&mut [u8], &mut [u8])> {
        self.copied.synchronize()?;
        // SAFETY: as many bytes were allocated, and the device is done with them.
        let all = unsafe { std::slice::from_raw_parts_mut(self.memory, PIECE + WORD) };
        Ok(all.split_at_mut(PIECE))
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let (memory, context) = (self.memory, Arc::clone(&self.context));
        gate::give_back(move || {
            if context.bind_to_thread().is_ok() {
                // SAFETY: allocated in this context and given back once; whoever drops a device waits for
                // its streams first. Nothing can be done about a failure.
                let _ = unsafe { result::free_host(memory.cast::<c_void>()) };
            }
        });
    }
}

impl Staging {
    pub fn new(stream: &Stream) -> Result<Self> {
        Ok(Self { pieces: [Piece::new(stream)?, Piece::new(stream)?], next: 0 })
    }

    /// Copies `src` to the device, in this stream's order; `src` may be changed when this returns.
    pub fn upload(&mut self, stream: sys::CUstream, dst: u64, src: &[u8]) -> Result<()> {
        for (i, part) in src.chunks(PIECE).enumerate() {
            let piece = &mut self.pieces[self.next];
            self.next = 1 - self.next;
            let bytes = &mut piece.bytes()?[..part.len()];
            bytes.copy_from_slice(part);
            let dst = dst + (i * PIECE) as u64;
            // SAFETY: the caller's view holds `src.len()` bytes at `dst`; the piece is not
            // written to before the event recorded below has passed.
            unsafe { result::memcpy_htod_async(dst, bytes, stream) }.map_err(failed("copy to the device"))?;
            piece.copied.record(stream)?;
        }
        Ok(())
    }

    /// Copies to the host, after everything in this stream, and waits for it. Returns the word at
    /// `word` as it was then, which comes in the same wait.
    pub fn download(&mut self, stream: sys::CUstream, dst: &mut [u8], src: u64, word: u64) -> Result<u32> {
        let pieces = dst.len().div_ceil(PIECE).max(1);
        let mut parts = dst.chunks_mut(PIECE);
        let mut code = [0; WORD];
        for i in 0..pieces {
            let part = parts.next().unwrap_or_default();
            let (bytes, behind) = self.pieces[self.next].parts()?;
            let bytes = &mut bytes[..part.len()];
            if !part.is_empty() {
                let src = src + (i * PIECE) as u64;
                // SAFETY: the caller's view holds `dst.len()` bytes at `src`; the host does not touch
                // the piece before the stream is done.
                unsafe { result::memcpy_dtoh_async(&mut *bytes, src, stream) }
                    .map_err(failed("copy from the device"))?;
            }
            if i + 1 == pieces {
                // SAFETY: as above, of the caller's word.
                unsafe { result::memcpy_dtoh_async(&mut *behind, word, stream) }
                    .map_err(failed("copy from the device"))?;
            }
            // SAFETY: the stream is alive.
            unsafe { result::stream::synchronize(stream) }.map_err(failed("wait for the device"))?;
            part.copy_from_slice(bytes);
            code.copy_from_slice(behind);
        }
        Ok(u32::from_ne_bytes(code))
    }
}
