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
    /// Memory for a number of elements.
    type Buf<T: Elem>: Send + Sync + 'static;
    /// Read access to part of a buffer.
    type View<'a, T: Elem>: Copy + Send + Sync;
    /// Write access to part of a buffer.
    type ViewMut<'a, T: Elem>: Send;

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

    /// Number of elements in a buffer.
    fn len<T: Elem>(buf: &Self::Buf<T>) -> usize;

    /// Lends part of a buffer for reading.
    fn view<T: Elem>(buf: &Self::Buf<T>, range: Range<usize>) -> Self::View<'_, T>;

    /// Lends part of a buffer for writing.
    fn view_mut<T: Elem>(buf: &mut Self::Buf<T>, range: Range<usize>) -> Self::ViewMut<'_, T>;

    /// Part of a view.
    fn slice<T: Elem>(view: Self::View<'_, T>, range: Range<usize>) -> Self::View<'_, T>;

    /// Part of a writable view, for as long as the view itself.
    fn slice_mut<T: Elem>(view: Self::ViewMut<'_, T>, range: Range<usize>) -> Self::ViewMut<'_, T>;

    /// The two parts of a writable view before and from element `mid`.
    fn split_mut<T: Elem>(
        view: Self::ViewMut<'_, T>,
        mid: usize,
    ) -> (Self::ViewMut<'_, T>, Self::ViewMut<'_, T>);

    /// A writable view lent on for a shorter time.
    fn reborrow<'b, T: Elem>(view: &'b mut Self::ViewMut<'_, T>) -> Self::ViewMut<'b, T>;

    /// A writable view lent on for reading.
    fn freeze<'b, T: Elem>(view: &'b Self::ViewMut<'_, T>) -> Self::View<'b, T>;

    /// Number of elements in a view.
    fn view_len<T: Elem>(view: Self::View<'_, T>) -> usize;

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

    /// A whole buffer, for reading.
    fn all<T: Elem>(buf: &Self::Buf<T>) -> Self::View<'_, T> {
        Self::view(buf, 0..Self::len(buf))
    }

    /// A whole buffer, for writing.
    fn all_mut<T: Elem>(buf: &mut Self::Buf<T>) -> Self::ViewMut<'_, T> {
        let len = Self::len(buf);
        Self::view_mut(buf, 0..len)
    }

    /// A new buffer with these values.
    fn buffer_from<T: Elem>(&self, src: &[T]) -> Result<Self::Buf<T>> {
        let mut buf = self.zeros(src.len())?;
        self.upload(Self::all_mut(&mut buf), src)?;
        Ok(buf)
    }

    /// A view's values, on the host.
    fn to_host<T: Elem>(&self, src: Self::View<'_, T>) -> Result<Vec<T>> {
        let mut out = vec![T::zeroed(); Self::view_len(src)];
        self.download(&mut out, src)?;
        Ok(out)
    }
}
