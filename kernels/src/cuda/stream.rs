//! The driver's streams, and the events that order them.

use super::{failed, gate};
use crate::Result;
use cudarc::driver::{CudaContext, result, sys};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

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
