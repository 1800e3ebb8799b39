//! The device: its driver's context, its memory, and what all operations need of it.

use super::cubin::{self, Cubins};
use super::functions::Functions;
use super::limits::Limits;
use super::memory::{self, Allocation, Staging};
use super::profile::{OperationTime, Profile, Work};
use super::stream::Stream;
use super::{CublasLt, CudaBuf, CudaDevice, CudaView, CudaViewMut, cublaslt, devices, failed, gate, probe};
use crate::error::{Error, Result, expect_len};
use crate::{Device, Elem, View, ViewMut};
use cudarc::driver::{CudaContext, result, sys};
use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// Oldest driver whose cubins these are: CUDA 12.0.
const OLDEST_DRIVER: i32 = 12_000;
/// Least compute capability: bf16 tensor cores and asynchronous copies.
const MIN_CAPABILITY: (i32, i32) = (8, 0);
/// Bytes of scratch memory from the start: partial sums of a few rows.
const WORKSPACE: usize = 4 << 10;

/// A CUDA device as a device of ours: memory, one stream, and kernels.
#[derive(Clone)]
pub struct Cuda {
    pub(super) inner: Arc<Inner>,
    /// Operations go through the second stream.
    pub(super) is_second: bool,
}

/// What all handles of a device share.
pub(super) struct Inner {
    pub description: CudaDevice,
    /// Streaming multiprocessors.
    pub processors: usize,
    pub limits: Limits,
    pub functions: Functions,
    pub staging: Mutex<Staging>,
    /// For uploads beside the operations.
    pub staging_beside: Mutex<Staging>,
    /// Scratch memory of operations that need two passes. Should one need more than there is, it
    /// grows: in a loop's first steps, not in all of them. One for each stream of operations.
    pub workspaces: [Mutex<Allocation>; 2],
    /// A graph is being captured.
    pub capturing: AtomicBool,
    pub graph_launches: AtomicU64,
    /// Bytes copied from the host so far.
    pub uploaded: AtomicU64,
    pub profile: Profile,
    pub fault: Allocation,
    /// Matrix products by the vendor's library, or why they are not.
    pub products: std::result::Result<cublaslt::Products, String>,
    // Last, so that everything above is given back while the context is alive.
    pub stream: Arc<Stream>,
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
        Self::with_parts(ordinal, cubins, &CublasLt::standard())
    }

    /// The same with kernels from elsewhere, and this library for matrix products.
    ///
    /// # Errors
    /// As of [`Self::new`], and if a library is named that cannot be used.
    pub fn with_parts(ordinal: usize, cubins: Cubins, cublaslt: &CublasLt) -> Result<Self> {
        let unavailable = |why: String| Error::Unavailable { what: "CUDA", why };
        let found = devices().map_err(unavailable)?;
        let count = found.len();
        let description = found.into_iter().nth(ordinal).ok_or_else(|| {
            unavailable(format!("there is no device {ordinal}; the driver shows {count} of them"))
        })?;
        let driver = probe::driver_version().map_err(unavailable)?;
        check_age(driver, &description).map_err(unavailable)?;
        let _call = gate::enter();
        let context = CudaContext::new(ordinal).map_err(|e| {
            unavailable(format!("device {ordinal} ({}) cannot be used: {e}", description.name))
        })?;
        let processors = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(failed("count multiprocessors"))?;
        let limits = Limits::of(&context)?;
        let stream = Arc::new(Stream::new(context)?);
        let staging = Mutex::new(Staging::new(&stream)?);
        let staging_beside = Mutex::new(Staging::new(&stream)?);
        let workspace = || Ok(Mutex::new(Allocation::new(&stream, &description, WORKSPACE)?));
        let workspaces = [workspace()?, workspace()?];
        let fault = Allocation::new(&stream, &description, size_of::<u32>())?;
        let products = cublaslt::Products::open(cublaslt, &stream, &description)?;
        let functions = Functions::new(cubins, cubin::architecture(description.capability), driver / 1000);
        let inner = Inner {
            description,
            processors: processors.max(1) as usize,
            limits,
            functions,
            staging,
            staging_beside,
            workspaces,
            capturing: AtomicBool::new(false),
            graph_launches: AtomicU64::new(0),
            uploaded: AtomicU64::new(0),
            profile: Profile::default(),
            fault,
            products,
            stream,
        };
        let cuda = Self { inner: Arc::new(inner), is_second: false };
        cuda.set_bytes(cuda.inner.fault.pointer(), 0, size_of::<u32>())?;
        Ok(cuda)
    }

    /// What the driver says of this device.
    pub fn description(&self) -> &CudaDevice {
        &self.inner.description
    }

    /// Whether kernels for Hopper run here: instructions that later generations do not have.
    pub(super) fn is_hopper(&self) -> bool {
        self.inner.description.capability == (9, 0)
    }

    /// What multiplies matrices here, as a person would say it.
    pub fn gemm_backend(&self) -> String {
        match &self.inner.products {
            Ok(library) => library.description(),
            Err(why) => format!("kernels of our own ({why})"),
        }
    }

    /// Measures cuBLASLt's algorithms for every matrix product that is new from now on, in its first launch; what such a
    /// launch computes is of no use. Nothing happens where products are by other kernels.
    pub fn start_tuning(&self) {
        if let Ok(library) = &self.inner.products {
            library.start_tuning();
        }
    }

    /// Lines for a file of choices (`GRADTX_CUBLASLT_ALGORITHMS`), of what was measured since [`Self::start_tuning`].
    pub fn stop_tuning(&self) -> Vec<String> {
        self.inner.products.as_ref().map_or_else(|_| Vec::new(), |library| library.stop_tuning())
    }

    /// What decides the bits of results here beside inputs and this program: the device, and what multiplies matrices.
    pub fn provenance(&self) -> String {
        let CudaDevice { name, capability: (major, minor), .. } = self.description();
        format!("{name} (compute capability {major}.{minor}), matrix products by {}", self.gemm_backend())
    }

    /// Pieces of memory taken from the device so far, whether given back or not. In a loop of steps
    /// this number stands still.
    pub fn allocations(&self) -> u64 {
        self.inner.stream.allocations.load(Ordering::Relaxed)
    }

    /// Bytes copied from the host to the device so far.
    pub fn uploaded(&self) -> u64 {
        self.inner.uploaded.load(Ordering::Relaxed)
    }

    /// Bytes of scratch memory of operations that need two passes: what [`crate::ops::LoraLinear::lora_scratch`]
    /// says, after such a pass.
    pub fn scratch(&self) -> usize {
        memory::lock(&self.inner.workspaces[usize::from(self.is_second)]).bytes()
    }

    /// Bytes of memory that nobody has, and of the whole device.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.stream()?.context.mem_get_info().map_err(failed("tell how much memory is free"))
    }

    /// The stream, its context bound to this thread.
    pub(super) fn stream(&self) -> Result<&Arc<Stream>> {
        self.inner.stream.context.bind_to_thread().map_err(failed("bind the device to a thread"))?;
        Ok(&self.inner.stream)
    }

    /// The stream that this handle's operations go through. While a profile is taken that is the first
    /// one, so that nothing continues beside what is measured.
    pub(super) fn queue(&self) -> Result<sys::CUstream> {
        let stream = self.stream()?;
        Ok(if self.is_second && !self.inner.profile.is_on() { stream.second } else { stream.raw })
    }

    /// Begins to measure every operation; forgets what was measured before.
    ///
    /// # Errors
    /// As of [`Device::synchronize`].
    pub fn start_profile(&self) -> Result<()> {
        self.synchronize()?;
        self.inner.profile.start();
        Ok(())
    }

    /// Ends it; what operations took since [`Self::start_profile`], the longest first.
    ///
    /// # Errors
    /// As of [`Device::synchronize`].
    pub fn stop_profile(&self) -> Result<Vec<OperationTime>> {
        self.inner.profile.stop();
        self.synchronize()?;
        self.inner.profile.times()
    }

    /// Does what puts one operation into the stream, between two events while a profile is taken.
    pub(super) fn measured(
        &self,
        name: impl FnOnce() -> Cow<'static, str>,
        work: Work,
        launch: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.measured_if(name, work, || launch().map(|()| true)).map(|_| ())
    }

    /// The same for what may put nothing into the stream, and then says false.
    pub(super) fn measured_if(
        &self,
        name: impl FnOnce() -> Cow<'static, str>,
        work: Work,
        launch: impl FnOnce() -> Result<bool>,
    ) -> Result<bool> {
        if !self.inner.profile.is_on() {
            return launch();
        }
        self.inner.profile.span(name, work, self.stream()?, self.queue()?, launch)
    }

    pub(super) fn set_bytes(&self, pointer: u64, value: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let queue = self.queue()?;
        let work = Work { bytes: bytes as f64, ..Default::default() };
        // SAFETY: callers pass memory of this device that holds as many bytes.
        let set = || unsafe { result::memset_d8_async(pointer, value, bytes, queue) };
        self.measured(|| "set memory".into(), work, || set().map_err(failed("set memory")))
    }

    /// Scratch memory of at least this many bytes, for kernels queued while the guard is held.
    pub(super) fn workspace(&self, bytes: usize) -> Result<Workspace<'_>> {
        let workspace = &self.inner.workspaces[usize::from(self.is_second)];
        let mut guard = memory::lock(workspace);
        if guard.bytes() < bytes {
            self.refuse_in_graph("growing scratch memory")?;
            drop(guard);
            let _call = gate::enter();
            guard = memory::lock(workspace);
            let (stream, device) = (self.stream()?, &self.inner.description);
            // Dropping the old one waits for the kernels that still use it, before there are two.
            *guard = Allocation::new(stream, device, 0)?;
            *guard = Allocation::new(stream, device, workspace_bytes(bytes))?;
        }
        Ok(Workspace { pointer: guard.pointer(), _held: guard })
    }
}

/// Bytes of scratch memory after an operation that needs so many.
pub(super) fn workspace_bytes(needed: usize) -> usize {
    needed.next_power_of_two().max(WORKSPACE)
}

/// Scratch memory while operations are queued that use it.
pub(super) struct Workspace<'a> {
    pub pointer: u64,
    _held: MutexGuard<'a, Allocation>,
}

/// One sentence if the driver or the device is too old.
fn check_age(driver: i32, device: &CudaDevice) -> std::result::Result<(), String> {
    if driver < OLDEST_DRIVER {
        let version = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
        let (found, wanted) = (version(driver), version(OLDEST_DRIVER));
        return Err(format!(
            "the driver is too old: it is for CUDA {found}, and {wanted} or newer is needed"
        ));
    }
    if device.capability < MIN_CAPABILITY {
        let ((major, minor), (least, _)) = (device.capability, MIN_CAPABILITY);
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
        self.refuse_in_graph("zeros")?;
        let buf = CudaBuf::new(self, len, Allocation::new(self.stream()?, self.description(), bytes)?);
        self.set_bytes(buf.pointer(), 0, bytes)?;
        Ok(buf)
    }

    fn upload<T: Elem>(&self, dst: CudaViewMut<'_, T>, src: &[T]) -> Result<()> {
        expect_len("upload", "src", src.len(), dst.len())?;
        self.refuse_in_graph("upload")?;
        self.inner.uploaded.fetch_add(size_of_val(src) as u64, Ordering::Relaxed);
        memory::lock(&self.inner.staging).upload(self.stream()?.raw, dst.pointer(), bytemuck::cast_slice(src))
    }

    fn download<T: Elem>(&self, dst: &mut [T], src: CudaView<'_, T>) -> Result<()> {
        expect_len("download", "dst", dst.len(), src.len())?;
        self.refuse_in_graph("download")?;
        let (bytes, fault) = (bytemuck::cast_slice_mut(dst), self.fault_pointer());
        let stream = self.stream()?.raw;
        let code = memory::lock(&self.inner.staging).download(stream, bytes, src.pointer(), fault)?;
        self.refuse_fault(code)
    }

    fn copy<T: Elem>(&self, dst: CudaViewMut<'_, T>, src: CudaView<'_, T>) -> Result<()> {
        expect_len("copy", "src", src.len(), dst.len())?;
        if src.is_empty() {
            return Ok(());
        }
        let queue = self.queue()?;
        let bytes = src.len() * size_of::<T>();
        let work = Work { bytes: 2.0 * bytes as f64, ..Default::default() };
        // SAFETY: both views hold `bytes` bytes of this device, and cannot overlap: one is exclusive.
        let copy = || unsafe { result::memcpy_dtod_async(dst.pointer(), src.pointer(), bytes, queue) };
        self.measured(|| "copy".into(), work, || copy().map_err(failed("copy on the device")))
    }

    fn fill<T: Elem>(&self, dst: CudaViewMut<'_, T>, value: T) -> Result<()> {
        self.fill_bytes(dst.pointer(), dst.len(), bytemuck::bytes_of(&value))
    }

    fn synchronize(&self) -> Result<()> {
        self.refuse_in_graph("synchronize")?;
        self.stream()?.synchronize()?;
        self.check_fault()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // What is freed next may still be in use.
        if self.stream.context.bind_to_thread().is_ok() {
            // Nothing can be done about a failure.
            let _ = self.stream.synchronize();
        }
    }
}
