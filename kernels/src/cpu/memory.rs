//! Host memory aligned to cache lines, zeroed lazily by the operating system.

use crate::{DType, Elem, Error, Result};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Bytes of a cache line; also the widest vector register.
const ALIGN: usize = 64;

/// A fixed number of elements on the host. Dereferences to a slice.
#[derive(Debug)]
pub struct CpuBuf<T: Elem> {
    start: NonNull<T>,
    len: usize,
    owns: PhantomData<T>,
}

// SAFETY: a CpuBuf owns its memory like a Vec, and elements are Send.
unsafe impl<T: Elem> Send for CpuBuf<T> {}
// SAFETY: shared access only reads, and elements are plain data.
unsafe impl<T: Elem> Sync for CpuBuf<T> {}

impl<T: Elem> CpuBuf<T> {
    /// `len` zero elements, or [`Error::OutOfMemory`].
    pub fn zeros(len: usize) -> Result<Self> {
        let failed =
            || Error::OutOfMemory { device: "CPU".into(), bytes: len.saturating_mul(T::DTYPE.size()) };
        if len == 0 {
            return Ok(Self { start: NonNull::dangling(), len, owns: PhantomData });
        }
        let layout = Self::layout(len).ok_or_else(failed)?;
        // SAFETY: the layout is not empty, for len > 0 and no element type is empty.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }.cast::<T>()).ok_or_else(failed)?;
        Ok(Self { start, len, owns: PhantomData })
    }

    fn layout(len: usize) -> Option<Layout> {
        let bytes = len.checked_mul(size_of::<T>())?;
        Layout::from_size_align(bytes, ALIGN).ok()
    }
}

impl<T: Elem> Drop for CpuBuf<T> {
    fn drop(&mut self) {
        if let (true, Some(layout)) = (self.len > 0, Self::layout(self.len)) {
            // SAFETY: allocated in `zeros` with this very layout, and freed once.
            unsafe { dealloc(self.start.as_ptr().cast(), layout) }
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
        assert!(CpuBuf::<u8>::zeros(0).unwrap().is_empty());
    }

    #[test]
    fn impossible_sizes_are_errors() {
        assert!(matches!(CpuBuf::<f64>::zeros(usize::MAX), Err(Error::OutOfMemory { .. })));
    }
}
