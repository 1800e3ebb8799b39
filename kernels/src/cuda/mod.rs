//! The CUDA device: memory, and the operations as kernels of our own (`kernels/cu`).
//!
//! Nothing is linked. The driver is found at run time, so the same program starts on a
//! machine without one and says there what is missing ([`devices`]); a kernel is loaded
//! from a cubin that is part of the program, lies in a cache, or is compiled when it is
//! first needed ([`cubin`]).
//!
//! Everything goes through one stream, in order. An operation checks its arguments on the
//! host and returns when its kernels are queued. Numbers that only the device sees (token
//! ids, positions) are checked by the kernels, which refuse them and leave a note that the
//! next [`Device::download`] or [`Device::synchronize`] turns into an error (`fault.rs`).
//!
//! Sums are always taken in the same order, without floating-point atomics, so results do
//! not depend on timing.

mod activation;
mod adamw;
mod attention;
pub mod cubin;
mod dropout;
mod elementwise;
mod embedding;
mod fault;
mod gemm;
mod launch;
mod lm_head;
mod lora;
mod memory;
mod mse;
mod nvrtc;
mod probe;
mod rmsnorm;
mod rope;
mod t5_attention;

pub use memory::{CudaBuf, CudaView, CudaViewMut};
pub use probe::{CudaDevice, devices};

use crate::error::{Error, Result, expect_len};
use crate::{Device, Elem, Real, bf16};
use cubin::Cubins;
use cudarc::driver::{CudaContext, result, sys};
use launch::Functions;
use memory::{Allocation, Staging};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// Oldest driver whose cubins these are: CUDA 12.0.
const OLDEST_DRIVER: i32 = 12_000;
/// Least compute capability: bf16 tensor cores and asynchronous copies.
const LEAST_CAPABILITY: (i32, i32) = (8, 0);

/// A CUDA device as a device of ours: memory, one stream, and kernels.
#[derive(Clone)]
pub struct Cuda {
    inner: Arc<Inner>,
}

/// Number types with kernels: `f32` and `bf16`, accumulating in f32.
pub trait CudaReal: Real<Acc = f32> {
    /// End of the names of its kernels.
    const SUFFIX: &'static str;
}

impl CudaReal for f32 {
    const SUFFIX: &'static str = "f32";
}
impl CudaReal for bf16 {
    const SUFFIX: &'static str = "bf16";
}

struct Inner {
    description: CudaDevice,
    /// Streaming multiprocessors.
    processors: usize,
    functions: Functions,
    staging: Mutex<Staging>,
    /// Scratch memory of operations that need two passes; grows to what they ask for.
    workspace: Mutex<Option<Allocation>>,
    fault: Allocation,
    // Last, so that everything above is given back while the context is alive.
    stream: Stream,
}

/// The stream, and the context that it belongs to.
struct Stream {
    raw: sys::CUstream,
    context: Arc<CudaContext>,
}

// SAFETY: the driver's handles may be used from any thread; every use binds the context first.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: created with this context, and destroyed once. Nothing can be done about a failure.
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}

/// Turns the driver's error into ours.
fn failed(what: impl Into<String>) -> impl FnOnce(result::DriverError) -> Error {
    let what = what.into();
    move |e| Error::Driver { what, why: e.to_string() }
}

impl Cuda {
    /// Device `ordinal` of [`devices`], with kernels from the usual places ([`Cubins::standard`]).
    ///
    /// # Errors
    /// [`Error::Unavailable`] without a driver or such a device, or if either is too old.
    pub fn new(ordinal: usize) -> Result<Self> {
        Self::with_cubins(ordinal, Cubins::standard())
    }

    /// The same with kernels from elsewhere.
    pub fn with_cubins(ordinal: usize, cubins: Cubins) -> Result<Self> {
        let unavailable = |why: String| Error::Unavailable { what: "CUDA", why };
        let found = devices().map_err(unavailable)?;
        let count = found.len();
        let description = found.into_iter().nth(ordinal).ok_or_else(|| {
            unavailable(format!("there is no device {ordinal}; the driver shows {count} of them"))
        })?;
        check_age(&description).map_err(unavailable)?;
        let context = CudaContext::new(ordinal).map_err(|e| {
            unavailable(format!("device {ordinal} ({}) cannot be used: {e}", description.name))
        })?;
        let processors = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(failed("count multiprocessors"))?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("create a stream"))?;
        let stream = Stream { raw, context };
        let staging = Mutex::new(Staging::new(&stream)?);
        let fault = Allocation::new(&stream, &description, size_of::<u32>())?;
        let functions = Functions::new(cubins, cubin::architecture(description.capability));
        let inner = Inner {
            description,
            processors: processors.max(1) as usize,
            functions,
            staging,
            workspace: Mutex::default(),
            fault,
            stream,
        };
        let cuda = Self { inner: Arc::new(inner) };
        cuda.set_bytes(cuda.inner.fault.pointer(), 0, size_of::<u32>())?;
        Ok(cuda)
    }

    /// What the driver says of this device.
    pub fn description(&self) -> &CudaDevice {
        &self.inner.description
    }

    /// Bytes of memory that nobody has, and of the whole device.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.stream()?.context.mem_get_info().map_err(failed("tell how much memory is free"))
    }

    /// The stream, its context bound to this thread.
    fn stream(&self) -> Result<&Stream> {
        self.inner.stream.context.bind_to_thread().map_err(failed("bind the device to a thread"))?;
        Ok(&self.inner.stream)
    }

    fn set_bytes(&self, pointer: u64, value: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.stream()?;
        // SAFETY: callers pass memory of this device that holds as many bytes.
        unsafe { result::memset_d8_async(pointer, value, bytes, stream.raw) }.map_err(failed("set memory"))
    }

    /// Scratch memory of at least this many bytes, for kernels queued while the guard is held.
    fn workspace(&self, bytes: usize) -> Result<Workspace<'_>> {
        let mut guard = memory::lock(&self.inner.workspace);
        if guard.as_ref().is_none_or(|held| held.bytes() < bytes) {
            // Dropping waits for the kernels that still use the old one.
            *guard = None;
            let bytes = bytes.next_power_of_two().max(1 << 20);
            *guard = Some(Allocation::new(self.stream()?, &self.inner.description, bytes)?);
        }
        let pointer = guard.as_ref().map_or(0, Allocation::pointer);
        Ok(Workspace { pointer, _held: guard })
    }
}

/// Scratch memory while operations are queued that use it.
struct Workspace<'a> {
    pointer: u64,
    _held: MutexGuard<'a, Option<Allocation>>,
}

/// One sentence if the driver or the device is too old.
fn check_age(device: &CudaDevice) -> std::result::Result<(), String> {
    let driver = probe::driver_version()?;
    if driver < OLDEST_DRIVER {
        let version = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
        let (found, wanted) = (version(driver), version(OLDEST_DRIVER));
        return Err(format!(
            "the driver is too old: it is for CUDA {found}, and {wanted} or newer is needed"
        ));
    }
    if device.capability < LEAST_CAPABILITY {
        let ((major, minor), (least, _)) = (device.capability, LEAST_CAPABILITY);
        let name = &device.name;
        return Err(format!(
            "{name} is too old: compute capability {major}.{minor}, at least {least}.0 is needed"
        ));
    }
    Ok(())
}

impl Device for Cuda {
    type Buf<T: Elem> = CudaBuf<T>;
    type View<'a, T: Elem> = CudaView<'a, T>;
    type ViewMut<'a, T: Elem> = CudaViewMut<'a, T>;

    fn name(&self) -> String {
        let CudaDevice { ordinal, name, .. } = self.description();
        format!("CUDA device {ordinal}, {name}")
    }

    fn free_memory(&self) -> Result<Option<u64>> {
        Ok(Some(self.memory()?.0 as u64))
    }

    fn zeros<T: Elem>(&self, len: usize) -> Result<CudaBuf<T>> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or_else(|| Error::OutOfMemory { device: self.name(), bytes: usize::MAX })?;
        let buf = CudaBuf::new(self, len, Allocation::new(self.stream()?, self.description(), bytes)?);
        self.set_bytes(buf.pointer(), 0, bytes)?;
        Ok(buf)
    }

    fn len<T: Elem>(buf: &CudaBuf<T>) -> usize {
        buf.len()
    }

    fn view<T: Elem>(buf: &CudaBuf<T>, range: Range<usize>) -> CudaView<'_, T> {
        buf.view().slice(range)
    }

    fn view_mut<T: Elem>(buf: &mut CudaBuf<T>, range: Range<usize>) -> CudaViewMut<'_, T> {
        buf.view_mut().slice(range)
    }

    fn slice<T: Elem>(view: Self::View<'_, T>, range: Range<usize>) -> Self::View<'_, T> {
        view.slice(range)
    }

    fn slice_mut<T: Elem>(view: Self::ViewMut<'_, T>, range: Range<usize>) -> Self::ViewMut<'_, T> {
        view.slice(range)
    }

    fn split_mut<T: Elem>(
        view: Self::ViewMut<'_, T>,
        mid: usize,
    ) -> (Self::ViewMut<'_, T>, Self::ViewMut<'_, T>) {
        view.split(mid)
    }

    fn reborrow<'b, T: Elem>(view: &'b mut CudaViewMut<'_, T>) -> CudaViewMut<'b, T> {
        view.reborrow()
    }

    fn freeze<'b, T: Elem>(view: &'b CudaViewMut<'_, T>) -> CudaView<'b, T> {
        view.freeze()
    }

    fn view_len<T: Elem>(view: CudaView<'_, T>) -> usize {
        view.len()
    }

    fn upload<T: Elem>(&self, dst: CudaViewMut<'_, T>, src: &[T]) -> Result<()> {
        expect_len("upload", "src", src.len(), dst.len())?;
        memory::lock(&self.inner.staging).upload(self.stream()?, dst.pointer(), bytemuck::cast_slice(src))
    }

    fn download<T: Elem>(&self, dst: &mut [T], src: CudaView<'_, T>) -> Result<()> {
        expect_len("download", "dst", dst.len(), src.len())?;
        let bytes = bytemuck::cast_slice_mut(dst);
        memory::lock(&self.inner.staging).download(self.stream()?, bytes, src.pointer())?;
        self.check_fault()
    }

    fn copy<T: Elem>(&self, dst: CudaViewMut<'_, T>, src: CudaView<'_, T>) -> Result<()> {
        expect_len("copy", "src", src.len(), dst.len())?;
        if src.is_empty() {
            return Ok(());
        }
        let stream = self.stream()?;
        let bytes = src.len() * size_of::<T>();
        // SAFETY: both views hold `bytes` bytes of this device, and cannot overlap: one is exclusive.
        unsafe { result::memcpy_dtod_async(dst.pointer(), src.pointer(), bytes, stream.raw) }
            .map_err(failed("copy on the device"))
    }

    fn fill<T: Elem>(&self, dst: CudaViewMut<'_, T>, value: T) -> Result<()> {
        self.fill_bytes(dst.pointer(), dst.len(), bytemuck::bytes_of(&value))
    }

    fn synchronize(&self) -> Result<()> {
        let stream = self.stream()?;
        // SAFETY: the stream is alive as long as the device.
        unsafe { result::stream::synchronize(stream.raw) }.map_err(failed("wait for the device"))?;
        self.check_fault()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // What is freed next may still be in use.
        if self.stream.context.bind_to_thread().is_ok() {
            // SAFETY: the stream is destroyed after this. Nothing can be done about a failure.
            let _ = unsafe { result::stream::synchronize(self.stream.raw) };
        }
    }
}
