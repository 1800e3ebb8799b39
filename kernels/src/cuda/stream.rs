//! The queues of a device, and the events that order them.
//!
//! Operations go through one stream, and those that a model asks a second queue for through another,
//! in the order that events decide. Copies into and from buffers that no operation uses at the time go through
//! a third: a [`CudaCopyStream`] is the copies of one set of buffers, and its two events say when the operations are
//! done with them, and when what was uploaded has arrived.

use super::{Cuda, CudaPinned, CudaView, CudaViewMut, failed, gate, memory};
use crate::error::expect_len;
use crate::{AsyncCopy, CopyStream, Elem, Pinned, Queues, Result, View, ViewMut};
use cudarc::driver::{CudaContext, result, sys};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Priorities of streams: the lower number goes first. A device that has none takes any as the same.
const FIRST: i32 = -1;
const LAST: i32 = 0;

/// The streams, and the context that they belong to.
pub(super) struct Stream {
    /// Operations, and copies in their order.
    pub raw: sys::CUstream,
    /// Operations beside those.
    pub second: sys::CUstream,
    /// Copies beside them.
    pub copies: sys::CUstream,
    /// Pieces of memory taken so far, given back or not.
    pub allocations: AtomicU64,
    pub context: Arc<CudaContext>,
}

// SAFETY: the driver's handles may be used from any thread; every use binds the context first.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// New streams; the context is bound.
    pub fn new(context: Arc<CudaContext>) -> Result<Self> {
        let _call = gate::enter();
        let create = |priority| {
            let kind = result::stream::StreamKind::NonBlocking;
            result::stream::create_with_priority(kind, priority).map_err(failed("create a stream"))
        };
        Ok(Self {
            // Its blocks go before those of the second stream, for which nobody waits so soon.
            raw: create(FIRST)?,
            second: create(LAST)?,
            copies: create(LAST)?,
            allocations: AtomicU64::new(0),
            context,
        })
    }

    /// All streams, those first that operations wait for.
    pub fn all(&self) -> [sys::CUstream; 3] {
        [self.copies, self.second, self.raw]
    }

    /// Waits on the host for what all streams have been given so far. The context is bound.
    pub fn synchronize(&self) -> Result<()> {
        let wait = |raw| {
            // SAFETY: the stream is alive.
            unsafe { result::stream::synchronize(raw) }.map_err(failed("wait for the device"))
        };
        // For all of them, also after a failure; the last one says most.
        self.all().map(wait).into_iter().rev().collect()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let (streams, context) = (self.all(), Arc::clone(&self.context));
        gate::give_back(move || {
            if context.bind_to_thread().is_ok() {
                for raw in streams {
                    // SAFETY: created with this context, and destroyed once. Nothing can be done about a failure.
                    let _ = unsafe { result::stream::destroy(raw) };
                }
            }
        });
    }
}

/// A point in a stream. One that was never recorded counts as passed.
pub(super) struct Event {
    raw: sys::CUevent,
    context: Arc<CudaContext>,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    pub fn new(stream: &Stream) -> Result<Self> {
        Self::create(stream, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// One that takes the time.
    pub fn with_time(stream: &Stream) -> Result<Self> {
        Self::create(stream, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn create(stream: &Stream, flags: sys::CUevent_flags) -> Result<Self> {
        let raw = result::event::create(flags).map_err(failed("create an event"))?;
        Ok(Self { raw, context: Arc::clone(&stream.context) })
    }

    /// Seconds from here to a later event; both take the time and have passed.
    pub fn seconds_until(&self, later: &Self) -> Result<f64> {
        // SAFETY: both events are alive.
        let milliseconds = unsafe { result::event::elapsed(self.raw, later.raw) };
        Ok(f64::from(milliseconds.map_err(failed("ask for the time between events"))?) / 1e3)
    }

    /// After everything in this stream so far.
    pub fn record(&self, stream: sys::CUstream) -> Result<()> {
        // SAFETY: event and stream are alive and of the same context.
        unsafe { result::event::record(self.raw, stream) }.map_err(failed("record an event"))
    }

    /// What is put into this stream from now on comes after the event.
    pub fn hold(&self, stream: sys::CUstream) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: as above.
        unsafe { result::stream::wait_event(stream, self.raw, flags) }.map_err(failed("wait for an event"))
    }

    /// Whether everything before it is done.
    pub fn has_passed(&self) -> Result<bool> {
        // SAFETY: the event is alive.
        match unsafe { result::event::query(self.raw) } {
            Ok(()) => Ok(true),
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            Err(e) => Err(failed("do what was asked of it")(e)),
        }
    }

    /// Waits on the host.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the event is alive.
        unsafe { result::event::synchronize(self.raw) }.map_err(failed("wait for a copy"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: created in this context and destroyed once; the driver keeps it as long as
            // something waits for it. Nothing can be done about a failure.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}

/// Copies beside the operations, for one set of buffers.
pub struct CudaCopyStream {
    /// The operations are done with the buffers.
    released: Event,
    /// All uploads so far are there.
    arrived: Event,
    cuda: Cuda,
}

impl CudaCopyStream {
    /// A copy after the operations that used the buffers, and before those that wait.
    fn upload(&mut self, copy: impl FnOnce(&Cuda, sys::CUstream) -> Result<()>) -> Result<()> {
        let copies = self.cuda.stream()?.copies;
        self.released.hold(copies)?;
        copy(&self.cuda, copies)?;
        self.arrived.record(copies)
    }
}

impl AsyncCopy for Cuda {
    type CopyStream = CudaCopyStream;
    type Pinned<T: Elem> = CudaPinned<T>;

    fn copy_stream(&self) -> Result<CudaCopyStream> {
        let stream = self.stream()?;
        let (released, arrived) = (Event::new(stream)?, Event::new(stream)?);
        let mut copies = CudaCopyStream { released, arrived, cuda: self.clone() };
        // Its buffers may be new too, and still to be filled with zeros.
        copies.release()?;
        Ok(copies)
    }

    fn pinned<T: Elem>(&self, len: usize) -> Result<CudaPinned<T>> {
        CudaPinned::new(self, len)
    }
}

impl CopyStream<Cuda> for CudaCopyStream {
    fn upload_async<T: Elem>(&mut self, dst: CudaViewMut<'_, T>, src: &[T]) -> Result<()> {
        expect_len("upload_async", "src", src.len(), dst.len())?;
        self.cuda.refuse_in_graph("upload_async")?;
        self.cuda.inner.uploaded.fetch_add(size_of_val(src) as u64, Ordering::Relaxed);
        self.upload(|cuda, copies| {
            let mut staging = memory::lock(&cuda.inner.staging_beside);
            staging.upload(copies, dst.pointer(), bytemuck::cast_slice(src))
        })
    }

    fn upload_pinned<T: Elem>(
        &mut self,
        dst: CudaViewMut<'_, T>,
        src: &CudaPinned<T>,
        part: Range<usize>,
    ) -> Result<()> {
        let values = &src.values()[part];
        expect_len("upload_pinned", "src", values.len(), dst.len())?;
        self.cuda.refuse_in_graph("upload_pinned")?;
        if values.is_empty() {
            return Ok(());
        }
        self.cuda.inner.uploaded.fetch_add(size_of_val(values) as u64, Ordering::Relaxed);
        self.upload(|_, copies| {
            // SAFETY: `dst` holds as many bytes; `src` is not written to or given back before its copy is done.
            unsafe { src.copy_to(dst.pointer(), values, copies) }
        })
    }

    fn download<T: Elem>(&mut self, dst: &mut [T], src: CudaView<'_, T>) -> Result<()> {
        expect_len("download", "dst", dst.len(), src.len())?;
        self.cuda.refuse_in_graph("download")?;
        let copies = self.cuda.stream()?.copies;
        self.released.hold(copies)?;
        let (bytes, fault) = (bytemuck::cast_slice_mut(dst), self.cuda.fault_pointer());
        let code =
            memory::lock(&self.cuda.inner.staging_beside).download(copies, bytes, src.pointer(), fault)?;
        self.cuda.refuse_fault(code)
    }

    fn wait(&mut self) -> Result<()> {
        self.cuda.refuse_in_graph("wait")?;
        self.arrived.hold(self.cuda.stream()?.raw)
    }

    fn release(&mut self) -> Result<()> {
        self.cuda.refuse_in_graph("release")?;
        self.released.record(self.cuda.stream()?.raw)
    }
}

/// A point in a queue of operations; none before it is recorded.
#[derive(Default)]
pub struct CudaEvent {
    event: Option<Event>,
}

impl Cuda {
    /// The stream that this handle's operations go through. While a profile is taken that is the first
    /// one, so that nothing continues beside what is measured.
    pub(super) fn queue(&self) -> Result<sys::CUstream> {
        let stream = self.stream()?;
        Ok(if self.is_second && !self.inner.profile.is_on() { stream.second } else { stream.raw })
    }
}

impl Queues for Cuda {
    type Event = CudaEvent;

    fn second_queue(&self) -> Self {
        Self { is_second: true, ..self.clone() }
    }

    fn record(&self, event: &mut CudaEvent) -> Result<()> {
        let queue = self.queue()?;
        let recorded = match event.event.take() {
            Some(event) => event,
            None => Event::new(self.stream()?)?,
        };
        event.event.insert(recorded).record(queue)
    }

    fn wait_for(&self, event: &CudaEvent) -> Result<()> {
        event.event.as_ref().map_or(Ok(()), |event| event.hold(self.queue()?))
    }
}
