//! The queues of a device, and the events that order them.
//!
//! Operations go through one stream, and those that a model asks a second queue for through another,
//! in the order that events decide. Copies into and from buffers that no operation uses at the time go through
//! a third: a [`CudaCopyStream`] is the copies of one set of buffers, and its two events say when the operations are
//! done with them, and when what was uploaded has arrived.

use super::stream::Event;
use super::{Cuda, CudaPinned, CudaView, CudaViewMut, memory};
use crate::error::expect_len;
use crate::{AsyncCopy, CopyStream, Elem, Pinned, Queues, Result, View, ViewMut};
use cudarc::driver::sys;
use std::ops::Range;
use std::sync::atomic::Ordering;

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
