//! The CPU as a device.

use super::CpuBuf;
use super::profile::{OpTime, Profile, Timed};
use crate::error::expect_len;
use crate::{Device, Elem, Result};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The CPU as a device: a pool of threads.
#[derive(Clone)]
pub struct Cpu {
    pool: Arc<rayon::ThreadPool>,
    profile: Arc<Profile>,
}

impl Cpu {
    /// A CPU device with this many threads of its own.
    pub fn new(threads: usize) -> Self {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|i| format!("cpu-{i}"))
            .build()
            .expect("the operating system starts threads");
        Self { pool: Arc::new(pool), profile: Arc::default() }
    }

    /// Threads of this device.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Runs `work` inside the pool, so that rayon's iterators use it. One thread alone is the
    /// caller's: waking another one takes longer than many operations, and no work for one
    /// thread may use rayon.
    pub(crate) fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        if self.threads() == 1 { work() } else { self.pool.install(work) }
    }

    /// Begins to measure, from nothing.
    pub fn start_profile(&self) {
        self.profile.start();
    }

    /// Stops measuring; calls and time by operation.
    pub fn stop_profile(&self) -> BTreeMap<&'static str, OpTime> {
        self.profile.stop()
    }

    /// Measures an operation until the returned value is dropped.
    pub(super) fn timed(&self, op: &'static str) -> Timed<'_> {
        self.profile.timed(op)
    }
}

impl Default for Cpu {
    /// As many threads as this process may run on.
    fn default() -> Self {
        Self::new(std::thread::available_parallelism().map_or(1, |n| n.get()))
    }
}

impl Device for Cpu {
    type Buf<T: Elem> = CpuBuf<T>;
    type View<'a, T: Elem> = &'a [T];
    type ViewMut<'a, T: Elem> = &'a mut [T];

    fn name(&self) -> String {
        format!("CPU, {} threads", self.threads())
    }

    fn free_memory(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    fn zeros<T: Elem>(&self, len: usize) -> Result<CpuBuf<T>> {
        CpuBuf::zeros(len)
    }

    fn upload<T: Elem>(&self, dst: &mut [T], src: &[T]) -> Result<()> {
        expect_len("upload", "src", src.len(), dst.len())?;
        dst.copy_from_slice(src);
        Ok(())
    }

    fn download<T: Elem>(&self, dst: &mut [T], src: &[T]) -> Result<()> {
        expect_len("download", "dst", dst.len(), src.len())?;
        dst.copy_from_slice(src);
        Ok(())
    }

    fn copy<T: Elem>(&self, dst: &mut [T], src: &[T]) -> Result<()> {
        expect_len("copy", "src", src.len(), dst.len())?;
        dst.copy_from_slice(src);
        Ok(())
    }

    fn fill<T: Elem>(&self, dst: &mut [T], value: T) -> Result<()> {
        dst.fill(value);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
