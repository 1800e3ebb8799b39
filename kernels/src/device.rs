//! [`Device`]: who owns memory, and how parts of it are lent to operations.
//!
//! A device lends a buffer as views. Views carry a lifetime, so the borrow checker
//! keeps an operation's outputs apart from its inputs on every device; on the CPU
//! a view is a slice. Out-of-range slicing is a mistake of the program and panics,
//! as it does for slices; wrong dimensions in an operation are errors.

use crate::{Elem, Error, Result};
use std::ops::Range;

/// One place where operations run. Cheap to clone; clones share memory and queue.
pub trait Device: Clone + Send + Sync + 'static {
    /// Memory for a number of elements; by default for none, which needs no device.
    type Buf<T: Elem>: Buffer<Self, T> + Default;
    /// Read access to part of a buffer.
    type View<'a, T: Elem>: View<T>;
    /// Write access to part of a buffer.
    type ViewMut<'a, T: Elem>: ViewMut<Self, T>;

    /// A lane for uploads that continue beside operations; see [`Self::upload_in`].
    type Lane: Send;
    /// Host memory that copies to this device can start from; see [`Self::upload_pinned`].
    type Pinned<T: Elem>: Send + Sync + 'static;
    /// What [`Self::replay`] remembers of some work; new for each.
    type Graph: Default + Send;
    /// A point in a queue of operations; see [`Self::mark`].
    type Mark: Default + Send;

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

    /// A new lane, released: its buffers are taken before it.
    fn lane(&self) -> Result<Self::Lane>;

    /// Copies from the host beside operations: after those that were asked for before the lane was
    /// last released, and possibly before later ones. `src` may be changed when this returns; `dst`
    /// must not be used before [`Self::await_lane`]. A lane belongs to one set of buffers.
    fn upload_in<T: Elem>(&self, lane: &mut Self::Lane, dst: Self::ViewMut<'_, T>, src: &[T]) -> Result<()>;

    /// Host memory for `len` elements, all bytes zero, where [`Self::upload_pinned`] copies from.
    fn pinned<T: Elem>(&self, len: usize) -> Result<Self::Pinned<T>>;

    /// What pinned memory holds.
    fn pinned_values<T: Elem>(pinned: &Self::Pinned<T>) -> &[T];

    /// The same for writing, once all copies from it are done: this waits for them. Any thread may
    /// ask.
    fn pinned_values_mut<T: Elem>(pinned: &mut Self::Pinned<T>) -> Result<&mut [T]>;

    /// [`Self::upload_in`] of a part of pinned memory: nothing is copied on the host, and this returns
    /// before the copy is done.
    fn upload_pinned<T: Elem>(
        &self,
        lane: &mut Self::Lane,
        dst: Self::ViewMut<'_, T>,
        src: &Self::Pinned<T>,
        part: Range<usize>,
    ) -> Result<()>;

    /// Operations asked for from now on come after all uploads in this lane.
    fn await_lane(&self, lane: &mut Self::Lane) -> Result<()>;

    /// Uploads in this lane come from now on after all operations asked for so far.
    fn release_lane(&self, lane: &mut Self::Lane) -> Result<()>;

    /// Does `work`, which asks for the same operations on the same memory whenever this is called
    /// with this graph. A device may ask for them once and then repeat what it remembers, for less
    /// than the cost of asking: `work` is then not called. Between two calls buffers may change what
    /// they hold. `work` must not take memory, copy from or to the host, or wait: a device that
    /// remembers refuses that the second time.
    fn replay<E: From<Error>>(
        &self,
        graph: &mut Self::Graph,
        work: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E>;

    /// Copies to the host beside operations: after those that were asked for before the lane was last
    /// released, without waiting for later ones. Done when it returns. Lengths must be equal.
    fn download_in<T: Elem>(
        &self,
        lane: &mut Self::Lane,
        dst: &mut [T],
        src: Self::View<'_, T>,
    ) -> Result<()>;

    /// This device with its second queue of operations, which share its memory: operations asked of
    /// one may be done beside those asked of the other, in the order that marks decide. A device with
    /// one queue gives itself. Uploads, downloads and graphs belong to the first queue.
    fn beside(&self) -> Self;

    /// Puts the mark behind everything that was asked of this queue so far.
    fn mark(&self, mark: &mut Self::Mark) -> Result<()>;

    /// What is asked of this queue from now on comes after the mark, if it was ever put. In work that
    /// is replayed, a mark must have been put in this very work, and the first queue must at its end
    /// have followed all that was asked of the second.
    fn follow(&self, mark: &Self::Mark) -> Result<()>;

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
