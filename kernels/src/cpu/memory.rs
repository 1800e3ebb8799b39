//! Host memory aligned to cache lines, zeroed lazily by the operating system.
//!
//! Large buffers ask for huge pages. Packing a weight matrix walks down its columns, a
//! new page at almost every step: with small pages a product waits for address
//! translation, and a fresh buffer costs a page fault every 4 KiB.

use super::Cpu;
use crate::{Buffer, DType, Elem, Error, Result, View, ViewMut};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;

/// Bytes of a cache line; also the widest vector register.
const ALIGN: usize = 64;
/// Bytes of a huge page (of the smallest kind, on x86-64 and most 64-bit ARM); buffers of
/// at least this size are mapped rather than allocated.
const HUGE_PAGE: usize = 2 << 20;

/// A fixed number of elements on the host. Dereferences to a slice.
#[derive(Debug)]
pub struct CpuBuf<T: Elem> {
    start: NonNull<T>,
    len: usize,
    memory: Memory,
    owns: PhantomData<T>,
}

/// Where a buffer's memory came from, and goes back to.
#[derive(Debug)]
enum Memory {
    /// Nowhere: there are no elements.
    None,
    /// The allocator.
    Heap(Layout),
    /// A mapping of its own: its address and bytes, which exceed the buffer on both sides.
    #[cfg(target_os = "linux")]
    Map(NonNull<u8>, usize),
}

// SAFETY: a CpuBuf owns its memory like a Vec, and elements are Send.
unsafe impl<T: Elem> Send for CpuBuf<T> {}
// SAFETY: shared access only reads, and elements are plain data.
unsafe impl<T: Elem> Sync for CpuBuf<T> {}

impl<T: Elem> CpuBuf<T> {
    /// `len` zero elements, or [`Error::OutOfMemory`].
    pub fn zeros(len: usize) -> Result<Self> {
        let bytes = len.saturating_mul(size_of::<T>());
        let (start, memory) = match bytes {
            0 => return Ok(Self::default()),
            #[cfg(target_os = "linux")]
            HUGE_PAGE.. => map(bytes),
            _ => allocate(bytes),
        }
        .ok_or_else(|| Error::OutOfMemory { device: "CPU".into(), bytes })?;
        Ok(Self { start: start.cast(), len, memory, owns: PhantomData })
    }
}

impl<T: Elem> Default for CpuBuf<T> {
    fn default() -> Self {
        // Dangling, but aligned as a slice of no elements must be.
        Self { start: NonNull::dangling(), len: 0, memory: Memory::None, owns: PhantomData }
    }
}

/// `bytes` zero bytes from the allocator.
fn allocate(bytes: usize) -> Option<(NonNull<u8>, Memory)> {
    let layout = Layout::from_size_align(bytes, ALIGN).ok()?;
    // SAFETY: the layout is not empty, for its only caller asks for at least one byte.
    let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
    Some((start, Memory::Heap(layout)))
}

/// `bytes` zero bytes of a mapping of their own, aligned to huge pages and with the wish
/// for them. Where the system has none to give, the buffer works all the same.
#[cfg(target_os = "linux")]
fn map(bytes: usize) -> Option<(NonNull<u8>, Memory)> {
    let mapped = bytes.checked_add(HUGE_PAGE)?;
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new anonymous mapping, at an address that the system chooses.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), mapped, access, kind, -1, 0) };
    if base == libc::MAP_FAILED {
        return None;
    }
    let base = base.cast::<u8>();
    // SAFETY: at most HUGE_PAGE - 1 bytes on, with `bytes` left behind, so inside the mapping.
    let start = unsafe { base.add(base.align_offset(HUGE_PAGE)) };
    // SAFETY: whole huge pages inside the mapping; the advice does not change their content.
    unsafe { libc::madvise(start.cast(), bytes - bytes % HUGE_PAGE, libc::MADV_HUGEPAGE) };
    Some((NonNull::new(start)?, Memory::Map(NonNull::new(base)?, mapped)))
}

impl<T: Elem> Drop for CpuBuf<T> {
    fn drop(&mut self) {
        match self.memory {
            Memory::None => {}
            // SAFETY: allocated with this very layout, and freed once.
            Memory::Heap(layout) => unsafe { dealloc(self.start.as_ptr().cast(), layout) },
            #[cfg(target_os = "linux")]
            // SAFETY: mapped with this address and length, and unmapped once.
            Memory::Map(base, bytes) => unsafe {
                libc::munmap(base.as_ptr().cast(), bytes);
            },
        }
    }
}

impl<T: Elem> Deref for CpuBuf<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` elements were allocated (or len is 0); zero bytes are a value of Pod types.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Elem> DerefMut for CpuBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T: Elem> Buffer<Cpu, T> for CpuBuf<T> {
    fn len(&self) -> usize {
        self.len
    }

    fn view(&self, range: Range<usize>) -> &[T] {
        &self[range]
    }

    fn view_mut(&mut self, range: Range<usize>) -> &mut [T] {
        &mut self[range]
    }
}

impl<T: Elem> View<T> for &[T] {
    fn len(self) -> usize {
        <[T]>::len(self)
    }

    fn slice(self, range: Range<usize>) -> Self {
        &self[range]
    }
}

impl<T: Elem> ViewMut<Cpu, T> for &mut [T] {
    fn len(&self) -> usize {
        <[T]>::len(self)
    }

    fn slice(self, range: Range<usize>) -> Self {
        &mut self[range]
    }

    fn split_at_mut(self, mid: usize) -> (Self, Self) {
        <[T]>::split_at_mut(self, mid)
    }

    fn reborrow(&mut self) -> &mut [T] {
        self
    }

    fn freeze(&self) -> &[T] {
        self
    }
}

const _: () = assert!(DType::C128.size() == size_of::<crate::Complex64>());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroed_aligned_and_writable() {
        let mut buf = CpuBuf::<f32>::zeros(123).unwrap();
        assert!(buf.iter().all(|&x| x == 0.0));
        assert_eq!(buf.as_ptr() as usize % ALIGN, 0);
        buf[122] = 5.0;
        assert_eq!(buf[122], 5.0);
        assert!(CpuBuf::<f64>::zeros(0).unwrap().is_empty());
    }

    #[test]
    fn large_buffers_are_whole_too() {
        for len in [HUGE_PAGE - 1, HUGE_PAGE, 2 * HUGE_PAGE + 5] {
            let mut buf = CpuBuf::<u8>::zeros(len).unwrap();
            assert!(buf.iter().all(|&x| x == 0));
            assert_eq!(buf.as_ptr() as usize % ALIGN, 0);
            buf.fill(7);
            assert_eq!((buf[0], buf[len - 1], buf.len()), (7, 7, len));
        }
    }

    #[test]
    fn impossible_sizes_are_errors() {
        assert!(matches!(CpuBuf::<f64>::zeros(usize::MAX), Err(Error::OutOfMemory { .. })));
    }
}
