//! Kernels by name, and launches.

use super::cubin::{self, Cubins};
use super::limits::{Limits, Needs};
use super::profile::Work;
use super::signature::{self, Kind, Signature};
use super::{Cuda, CudaReal, CudaView, CudaViewMut, failed, gate, memory};
use crate::{Elem, Error, Result, View, ViewMut};
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::Mutex;

/// Bytes that a kernel is taken to declare at least, so that permission is asked for a little early.
const DECLARED: usize = 1024;

/// The kernels that have been used so far.
pub(super) struct Functions {
    cubins: Cubins,
    architecture: String,
    /// Major version of CUDA that the driver is for.
    driver: i32,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    modules: HashMap<&'static str, Module>,
    /// By name and type.
    functions: HashMap<(&'static str, &'static str), Function>,
}

struct Module(sys::CUmodule);
// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        let module = self.0;
        gate::give_back(move || {
            // SAFETY: loaded once; the device binds its context and waits for its kernels before it
            // drops them. Nothing can be done about a failure.
            let _ = unsafe { result::module::unload(module) };
        });
    }
}

/// A kernel, and what it needs of a device.
#[derive(Clone, Copy)]
pub(super) struct Function {
    raw: sys::CUfunction,
    needs: Needs,
    /// Bytes of dynamic shared memory that it may use.
    permitted: usize,
    signature: &'static Signature,
}
// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Function {}

impl Functions {
    pub fn new(cubins: Cubins, architecture: String, driver: i32) -> Self {
        Self { cubins, architecture, driver, loaded: Mutex::default() }
    }

    /// The kernel `{name}_{suffix}` of module `module`.
    fn get(
        &self,
        module: &'static str,
        name: &'static str,
        suffix: &'static str,
        limits: &Limits,
    ) -> Result<Function> {
        if let Some(function) = memory::lock(&self.loaded).functions.get(&(name, suffix)) {
            return Ok(*function);
        }
        let _call = gate::enter();
        let mut loaded = memory::lock(&self.loaded);
        // Another thread may have been faster.
        if let Some(function) = loaded.functions.get(&(name, suffix)) {
            return Ok(*function);
        }
        let full = if suffix.is_empty() { name.to_string() } else { format!("{name}_{suffix}") };
        let signature = signature::find(module, &full)?;
        let raw = self.find(&mut loaded, module, &full)?;
        // SAFETY: the module stays loaded as long as the context.
        let needs = unsafe { Needs::of(raw) }?;
        let permitted = limits.plain_shared.saturating_sub(needs.shared.max(DECLARED));
        let function = Function { raw, needs, permitted, signature };
        loaded.functions.insert((name, suffix), function);
        Ok(function)
    }

    /// Lets a kernel use `shared` bytes of dynamic shared memory.
    fn permit(
        &self,
        name: &'static str,
        suffix: &'static str,
        function: &Function,
        shared: usize,
    ) -> Result<()> {
        if shared <= function.permitted {
            return Ok(());
        }
        let _call = gate::enter();
        // Another thread may have asked for more since: what is permitted only grows.
        let mut loaded = memory::lock(&self.loaded);
        let held = loaded.functions.get(&(name, suffix));
        if held.is_some_and(|held| shared <= held.permitted) {
            return Ok(());
        }
        use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as LARGEST;
        // SAFETY: the function is one of a loaded module.
        unsafe { result::function::set_function_attribute(function.raw, LARGEST, shared as i32) }
            .map_err(failed(format!("permit {shared} bytes of shared memory to `{name}`")))?;
        loaded.functions.insert((name, suffix), Function { permitted: shared, ..*function });
        Ok(())
    }

    fn find(&self, loaded: &mut Loaded, module: &'static str, kernel: &str) -> Result<sys::CUfunction> {
        let handle = match loaded.modules.get(module) {
            Some(module) => module.0,
            None => {
                let image = cubin::aligned(&self.cubins.image(module, &self.architecture, self.driver)?);
                // SAFETY: the image is a whole file made for this architecture; the driver copies it.
                let handle = unsafe { result::module::load_data(image.as_ptr().cast()) }
                    .map_err(failed(format!("load the kernels of `{module}` for {}", self.architecture)))?;
                loaded.modules.insert(module, Module(handle));
                handle
            }
        };
        let symbol = CString::new(kernel).expect("names of kernels have no zero byte");
        // SAFETY: the module stays loaded as long as the context.
        unsafe { result::module::get_function(handle, symbol) }
            .map_err(failed(format!("find the kernel `{kernel}` in `{module}`")))
    }
}

/// An argument. Numbers of 4 bytes are the lower half.
#[derive(Clone, Copy)]
struct Argument {
    bits: u64,
    kind: Kind,
}

/// A kernel with its arguments, in the order of its parameters.
pub(super) struct Launch<'a> {
    cuda: &'a Cuda,
    module: &'static str,
    name: &'static str,
    suffix: &'static str,
    arguments: Vec<Argument>,
    /// A size that the kernel's parameter cannot hold.
    too_large: Option<usize>,
    /// An address that is no multiple of its elements' alignment.
    misaligned: Option<u64>,
    /// For a profile.
    work: Work,
}

impl Cuda {
    /// The kernel `name` of `cu/{module}.cu`.
    pub(super) fn kernel(&self, module: &'static str, name: &'static str) -> Launch<'_> {
        let arguments = Vec::with_capacity(24);
        let (too_large, misaligned, work) = (None, None, Work::default());
        Launch { cuda: self, module, name, suffix: "", arguments, too_large, misaligned, work }
    }

    /// Its instance for `X`.
    pub(super) fn kernel_of<X: CudaReal>(&self, module: &'static str, name: &'static str) -> Launch<'_> {
        Launch { suffix: X::SUFFIX, ..self.kernel(module, name) }
    }

    /// Its instance with this end of its name.
    pub(super) fn kernel_typed(
        &self,
        module: &'static str,
        name: &'static str,
        suffix: &'static str,
    ) -> Launch<'_> {
        Launch { suffix, ..self.kernel(module, name) }
    }

    /// Blocks of `threads` that share `items` between them in a loop: enough to fill the device.
    pub(super) fn blocks_for(&self, items: usize, threads: usize) -> usize {
        items.div_ceil(threads).min(16 * self.inner.processors)
    }

    /// Bytes of dynamic shared memory that a block of this kernel may have here.
    pub(super) fn most_shared<X: CudaReal>(&self, module: &'static str, name: &'static str) -> Result<usize> {
        let limits = &self.inner.limits;
        self.stream()?;
        let function = self.inner.functions.get(module, name, X::SUFFIX, limits)?;
        Ok(limits.most_shared.saturating_sub(function.needs.shared.max(DECLARED)))
    }
}

impl Launch<'_> {
    fn argument(mut self, bits: u64, kind: Kind) -> Self {
        self.arguments.push(Argument { bits, kind });
        self
    }

    /// The address of so many elements.
    fn elements<T: Elem>(mut self, address: u64, len: usize, kind: Kind) -> Self {
        if len > 0 && !address.is_multiple_of(align_of::<T>() as u64) {
            self.misaligned = Some(address);
        }
        self.work.bytes += (len * size_of::<T>()) as f64;
        self.argument(address, kind)
    }

    /// A `T*`.
    pub fn write<T: Elem>(self, view: &CudaViewMut<'_, T>) -> Self {
        self.elements::<T>(view.pointer(), view.len(), Kind::Write(T::DTYPE))
    }

    /// A `T*` that may be null.
    pub fn write_if<T: Elem>(self, view: &Option<CudaViewMut<'_, T>>) -> Self {
        match view {
            Some(view) => self.write(view),
            None => self.argument(0, Kind::Write(T::DTYPE)),
        }
    }

    /// A `const T*`.
    pub fn read<T: Elem>(self, view: CudaView<'_, T>) -> Self {
        self.elements::<T>(view.pointer(), view.len(), Kind::Read(T::DTYPE))
    }

    /// A `const T*` that may be null.
    pub fn read_if<T: Elem>(self, view: Option<CudaView<'_, T>>) -> Self {
        match view {
            Some(view) => self.read(view),
            None => self.argument(0, Kind::Read(T::DTYPE)),
        }
    }

    /// A `T*` or `const T*` to memory without a view: scratch memory, or what the caller has checked. 0 is null.
    pub fn address<T: Elem>(self, address: u64) -> Self {
        self.argument(address, Kind::Address(T::DTYPE))
    }

    /// The `u32*` where a kernel reports a number that it refuses.
    pub fn fault(self) -> Self {
        let word = self.cuda.fault_pointer();
        self.argument(word, Kind::Write(u32::DTYPE))
    }

    /// A `u64`.
    pub fn long(self, n: usize) -> Self {
        self.argument(n as u64, Kind::U64)
    }

    /// A `u32`.
    pub fn int(mut self, n: usize) -> Self {
        if u32::try_from(n).is_err() {
            self.too_large = Some(n);
        }
        self.argument(n as u64, Kind::U32)
    }

    /// A `float`.
    pub fn float(self, x: f64) -> Self {
        self.argument((x as f32).to_bits().into(), Kind::F32)
    }

    /// What it has to do at least, for a profile, in the place of the bytes of all its views.
    pub fn work(mut self, work: Work) -> Self {
        self.work = work;
        self
    }

    /// Operations beside the bytes of its views.
    pub fn flops(mut self, flops: f64) -> Self {
        self.work.flops = flops;
        self
    }

    /// Bytes in the place of those of its views, of which it does not need all.
    pub fn moves(mut self, bytes: usize) -> Self {
        self.work.bytes = bytes as f64;
        self
    }

    /// Queues the kernel with `grid` blocks (in three dimensions) of `threads`, and `shared` bytes
    /// of dynamic shared memory. An empty grid does nothing.
    ///
    /// # Safety
    /// Memory at pointers must hold what the kernel touches for these arguments. (Their number and kinds are checked.)
    pub unsafe fn run(mut self, grid: [usize; 3], threads: usize, shared: usize) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let unsupported = |why: String| Err(Error::Unsupported { op: self.name, why });
        if let Some(n) = self.too_large {
            return unsupported(format!("a dimension of {n} does not fit 32 bits"));
        }
        if let Some(address) = self.misaligned {
            return unsupported(format!("the address {address:#x} is not aligned to its elements"));
        }
        let (cuda, limits) = (self.cuda, &self.cuda.inner.limits);
        let stream = cuda.queue()?;
        let function = cuda.inner.functions.get(self.module, self.name, self.suffix, limits)?;
        function.signature.check(self.arguments.iter().map(|argument| argument.kind))?;
        if let Some(why) = limits.refusal(&function.needs, grid, threads, shared) {
            return unsupported(why);
        }
        cuda.inner.functions.permit(self.name, self.suffix, &function, shared)?;
        let mut pointers: Vec<*mut c_void> =
            self.arguments.iter_mut().map(|a| std::ptr::from_mut(&mut a.bits).cast()).collect();
        let [x, y, z] = grid.map(|n| n as u32);
        let (name, block) = (self.name, (threads as u32, 1, 1));
        // SAFETY: the arguments are of the kernel's kinds, and the caller vouches for memory; each has a slot of 8
        // bytes, of which the driver reads the parameter's size: lower bytes come first on every host of CUDA.
        let mut queue = || unsafe {
            result::launch_kernel(function.raw, (x, y, z), block, shared as u32, stream, &mut pointers)
        };
        cuda.measured(|| name.into(), self.work, || queue().map_err(failed(format!("launch `{name}`"))))
    }
}
