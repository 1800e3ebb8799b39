//! The CPU does everything at once and in order: copies are done when they return, and nothing is captured.

use super::{Cpu, CpuBuf};
use crate::{AsyncCopy, CopyStream, Device, Elem, Error, GraphCapture, Pinned, Queues, Result};
use std::ops::Range;

/// A stream of copies on the CPU.
pub struct CpuCopyStream {
    cpu: Cpu,
}

impl AsyncCopy for Cpu {
    type CopyStream = CpuCopyStream;
    type Pinned<T: Elem> = CpuBuf<T>;

    fn copy_stream(&self) -> Result<CpuCopyStream> {
        Ok(CpuCopyStream { cpu: self.clone() })
    }

    fn pinned<T: Elem>(&self, len: usize) -> Result<CpuBuf<T>> {
        CpuBuf::zeros(len)
    }
}

impl CopyStream<Cpu> for CpuCopyStream {
    fn upload_async<T: Elem>(&mut self, dst: &mut [T], src: &[T]) -> Result<()> {
        self.cpu.upload(dst, src)
    }

    fn upload_pinned<T: Elem>(&mut self, dst: &mut [T], src: &CpuBuf<T>, part: Range<usize>) -> Result<()> {
        self.cpu.upload(dst, &src[part])
    }

    fn download<T: Elem>(&mut self, dst: &mut [T], src: &[T]) -> Result<()> {
        self.cpu.download(dst, src)
    }

    fn wait(&mut self) -> Result<()> {
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        Ok(())
    }
}

impl<T: Elem> Pinned<T> for CpuBuf<T> {
    fn values(&self) -> &[T] {
        self
    }

    fn values_mut(&mut self) -> Result<&mut [T]> {
        Ok(self)
    }
}

impl Queues for Cpu {
    type Event = ();

    fn second_queue(&self) -> Self {
        self.clone()
    }

    fn record(&self, (): &mut ()) -> Result<()> {
        Ok(())
    }

    fn wait_for(&self, (): &()) -> Result<()> {
        Ok(())
    }
}

impl GraphCapture for Cpu {
    type Graph = ();

    fn capture_or_launch<E: From<Error>>(
        &self,
        (): &mut (),
        work: &mut dyn FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        work()
    }
}
