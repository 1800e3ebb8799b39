//! What a device does beside its queue of operations, or instead of asking for each of them: copies that continue meanwhile
//! ([`AsyncCopy`]), a second queue ([`Queues`]), and work that is captured once and launched as a whole ([`GraphCapture`]).

use crate::{Device, Elem, Error, Result};
use std::ops::Range;

/// Copies between host and device that continue beside operations.
pub trait AsyncCopy: Device {
    /// A stream of such copies.
    type CopyStream: CopyStream<Self>;
    /// Host memory that copies to this device can start from; see [`CopyStream::upload_pinned`].
    type Pinned<T: Elem>: Pinned<T>;

    /// A new stream, released: its buffers are taken before it.
    fn copy_stream(&self) -> Result<Self::CopyStream>;

    /// Host memory for `len` elements, all bytes zero.
    fn pinned<T: Elem>(&self, len: usize) -> Result<Self::Pinned<T>>;
}

/// Copies beside operations, for one set of buffers. They come after what was asked of the device before the stream was last
/// released. Lengths must be equal.
pub trait CopyStream<D: AsyncCopy>: Send {
    /// Copies from the host. `src` may be changed when this returns; `dst` must not be used before [`Self::wait`].
    fn upload_async<T: Elem>(&mut self, dst: D::ViewMut<'_, T>, src: &[T]) -> Result<()>;

    /// [`Self::upload_async`] of a part of pinned memory: nothing is copied on the host, and this returns before the copy is
    /// done.
    fn upload_pinned<T: Elem>(
        &mut self,
        dst: D::ViewMut<'_, T>,
        src: &D::Pinned<T>,
        part: Range<usize>,
    ) -> Result<()>;

    /// Copies to the host, without waiting for later operations. Done when it returns.
    fn download<T: Elem>(&mut self, dst: &mut [T], src: D::View<'_, T>) -> Result<()>;

    /// Operations asked for from now on come after all uploads in this stream.
    fn wait(&mut self) -> Result<()>;

    /// Copies in this stream come from now on after all operations asked for so far.
    fn release(&mut self) -> Result<()>;
}

/// Host memory that copies to a device can start from.
pub trait Pinned<T: Elem>: Send + Sync + 'static {
    /// What it holds.
    fn values(&self) -> &[T];

    /// The same for writing, once all copies from it are done: this waits for them. Any thread may ask.
    fn values_mut(&mut self) -> Result<&mut [T]>;
}

/// Two queues of operations, ordered by events. Copies and graphs belong to the first.
pub trait Queues: Device {
    /// A point in a queue; new ones have passed.
    type Event: Default + Send;

    /// This device with its second queue, which shares its memory: operations asked of one may be done beside those asked of
    /// the other. A device with one queue gives itself.
    fn second_queue(&self) -> Self;

    /// Moves the event behind everything that was asked of this queue so far.
    fn record(&self, event: &mut Self::Event) -> Result<()>;

    /// What is asked of this queue from now on comes after the event. In work that is captured, the event must have been
    /// recorded in this very work, and the first queue must at its end have waited for all that was asked of the second.
    fn wait_for(&self, event: &Self::Event) -> Result<()>;
}

/// Operations that are asked for again and again.
pub trait GraphCapture: Device {
    /// What is remembered of some work; new for each.
    type Graph: Default + Send;

    /// Does `work`, which asks for the same operations on the same memory whenever this is called with this graph. A device may
    /// ask for them once and then launch what it has captured, for less than the cost of asking: `work` is then not called.
    /// Between two calls buffers may change what they hold. `work` must not take memory, copy from or to the host, or wait: a
    /// device that captures refuses that the second time.
    fn capture_or_launch<E: From<Error>>(
        &self,
        graph: &mut Self::Graph,
        work: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E>;
}
