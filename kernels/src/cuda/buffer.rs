//! Buffers of device memory, and views of them.

use super::Cuda;
use super::memory::Allocation;
use crate::{Buffer, Elem, View, ViewMut};
use std::marker::PhantomData;
use std::ops::Range;

/// Memory of a CUDA device for a number of elements.
pub struct CudaBuf<T> {
    /// None for no elements, where no device was asked.
    memory: Option<Allocation>,
    len: usize,
    /// Keeps the stream alive on which the memory is used.
    _device: Option<Cuda>,
    _elements: PhantomData<T>,
}

impl<T> Default for CudaBuf<T> {
    fn default() -> Self {
        Self { memory: None, len: 0, _device: None, _elements: PhantomData }
    }
}

impl<T: Elem> CudaBuf<T> {
    pub(super) fn new(device: &Cuda, len: usize, memory: Allocation) -> Self {
        Self { memory: Some(memory), len, _device: Some(device.clone()), _elements: PhantomData }
    }

    pub(super) fn pointer(&self) -> u64 {
        self.memory.as_ref().map_or(0, Allocation::pointer)
    }
}

impl<T: Elem> Buffer<Cuda, T> for CudaBuf<T> {
    fn len(&self) -> usize {
        self.len
    }

    fn view(&self, range: Range<usize>) -> CudaView<'_, T> {
        CudaView { pointer: self.pointer(), len: self.len, _memory: PhantomData }.slice(range)
    }

    fn view_mut(&mut self, range: Range<usize>) -> CudaViewMut<'_, T> {
        CudaViewMut { pointer: self.pointer(), len: self.len, _memory: PhantomData }.slice(range)
    }
}

/// Fails like a slice would.
fn check_range(range: &Range<usize>, len: usize) {
    assert!(range.start <= range.end && range.end <= len, "range {range:?} of a view of {len} elements");
}

/// Read access to part of a buffer.
pub struct CudaView<'a, T> {
    pointer: u64,
    len: usize,
    _memory: PhantomData<&'a T>,
}

impl<T> Clone for CudaView<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for CudaView<'_, T> {}

impl<T: Elem> CudaView<'_, T> {
    /// Address on the device.
    pub(super) fn pointer(self) -> u64 {
        self.pointer
    }
}

impl<T: Elem> View<T> for CudaView<'_, T> {
    fn len(self) -> usize {
        self.len
    }

    fn slice(self, range: Range<usize>) -> Self {
        check_range(&range, self.len);
        let pointer = self.pointer + (range.start * size_of::<T>()) as u64;
        Self { pointer, len: range.len(), _memory: PhantomData }
    }
}

/// Write access to part of a buffer.
pub struct CudaViewMut<'a, T> {
    pointer: u64,
    len: usize,
    _memory: PhantomData<&'a mut T>,
}

impl<T: Elem> CudaViewMut<'_, T> {
    /// Address on the device.
    pub(super) fn pointer(&self) -> u64 {
        self.pointer
    }
}

impl<T: Elem> ViewMut<Cuda, T> for CudaViewMut<'_, T> {
    fn len(&self) -> usize {
        self.len
    }

    fn slice(self, range: Range<usize>) -> Self {
        check_range(&range, self.len);
        let pointer = self.pointer + (range.start * size_of::<T>()) as u64;
        Self { pointer, len: range.len(), _memory: PhantomData }
    }

    fn split_at_mut(self, mid: usize) -> (Self, Self) {
        check_range(&(0..mid), self.len);
        let pointer = self.pointer + (mid * size_of::<T>()) as u64;
        let after = Self { pointer, len: self.len - mid, _memory: PhantomData };
        (Self { len: mid, ..self }, after)
    }

    fn reborrow(&mut self) -> CudaViewMut<'_, T> {
        CudaViewMut { pointer: self.pointer, len: self.len, _memory: PhantomData }
    }

    fn freeze(&self) -> CudaView<'_, T> {
        CudaView { pointer: self.pointer, len: self.len, _memory: PhantomData }
    }
}
