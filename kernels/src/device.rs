//! [`Device`]: who owns memory, and how parts of it are lent to operations.
//!
//! A device lends a buffer as views. Views carry a lifetime, so the borrow checker
//! keeps an operation's outputs apart from its inputs on every device; on the CPU
//! a view is a slice. Out-of-range slicing is a mistake of the program and panics,
//! as it does for slices; wrong dimensions in an operation are errors.

use crate::{Elem, Result};
use std::ops::Range;

/// One place where operations run. Cheap to clone; clones share memory and queue.
pub trait Device: Clone + Send + Sync + 'static {
    /// Memory for a number of elements; by default for none, which needs no device.
    type Buf<T: Elem>: Buffer<Self, T> + Default;
    /// Read access to part of a buffer.
    type View<'a, T: Elem>: View<T>;
    /// Write access to part of a buffer.
    type ViewMut<'a, T: Elem>: ViewMut<Self, T>;

    /// What a person would call this device, e.g. "CPU, 2 threads".
    fn name(&self) -> String;

    /// Bytes of its own memory that nobody has; none for a device that works in the host's.
    fn free_memory(&self) -> Result<Option<u64>>;

    /// Memory for `len` elements, all bytes zero.
    fn zeros<T: Elem>(&self, len: usize) -> Result<Self::Buf<T>>;

    /// Copies from the host; done when it returns. Lengths must be equal.
    fn upload<T: Elem>(&self, dst: Self::ViewMut<'_, T>, src: &[T]) -> Result<()>;

    /// Copies to the host, after everything that was asked for before. Lengths must be equal.
    fn download<T: Elem>(&self, dst: &mut [T], src: Self::View<'_, T>) -> Result<()>;

    /// `dst = src`. Lengths must be equal.
    fn copy<T: Elem>(&self, dst: Self::ViewMut<'_, T>, src: Self::View<'_, T>) -> Result<()>;

    /// `dst = value`, everywhere.
    fn fill<T: Elem>(&self, dst: Self::ViewMut<'_, T>, value: T) -> Result<()>;

    /// Returns when everything asked for so far is done.
    fn synchronize(&self) -> Result<()>;

    /// A new buffer with these values.
    fn buffer_from<T: Elem>(&self, src: &[T]) -> Result<Self::Buf<T>> {
        let mut buf = self.zeros(src.len())?;
        self.upload(buf.all_mut(), src)?;
        Ok(buf)
    }

    /// A view's values, on the host.
    fn to_host<T: Elem>(&self, src: Self::View<'_, T>) -> Result<Vec<T>> {
        let mut out = vec![T::zeroed(); src.len()];
        self.download(&mut out, src)?;
        Ok(out)
    }
}

/// Memory of a device for a number of elements, which it lends as views.
pub trait Buffer<D: Device, T: Elem>: Send + Sync + 'static {
    /// Number of elements.
    fn len(&self) -> usize;

    /// Whether there are no elements.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Lends a part for reading.
    fn view(&self, range: Range<usize>) -> D::View<'_, T>;

    /// Lends a part for writing.
    fn view_mut(&mut self, range: Range<usize>) -> D::ViewMut<'_, T>;

    /// Lends everything for reading.
    fn all(&self) -> D::View<'_, T> {
        self.view(0..self.len())
    }

    /// Lends everything for writing.
    fn all_mut(&mut self) -> D::ViewMut<'_, T> {
        self.view_mut(0..self.len())
    }
}

/// Read access to part of a buffer.
pub trait View<T: Elem>: Copy + Send + Sync {
    /// Number of elements.
    fn len(self) -> usize;

    /// Whether there are no elements.
    fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// A part, for as long as the view itself.
    fn slice(self, range: Range<usize>) -> Self;
}

/// Write access to part of a buffer.
pub trait ViewMut<D: Device, T: Elem>: Send + Sized {
    /// Number of elements.
    fn len(&self) -> usize;

    /// Whether there are no elements.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A part, for as long as the view itself.
    fn slice(self, range: Range<usize>) -> Self;

    /// The parts before and from element `mid`.
    fn split_at_mut(self, mid: usize) -> (Self, Self);

    /// The view lent on for a shorter time.
    fn reborrow(&mut self) -> D::ViewMut<'_, T>;

    /// The view lent on for reading.
    fn freeze(&self) -> D::View<'_, T>;
}
