//! Kernels by name, and launches.

use super::cubin::Cubins;
use super::{Cuda, CudaReal, CudaView, CudaViewMut, failed, memory};
use crate::{Elem, Error, Result};
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::Mutex;

/// Dynamic shared memory that needs no permission.
const PLAIN_SHARED: usize = 48 * 1024;
/// Blocks in the second and third dimension of a grid.
const MOST_BLOCKS_YZ: usize = 65_535;

/// The kernels that have been used so far.
pub(super) struct Functions {
    cubins: Cubins,
    architecture: String,
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
        // SAFETY: loaded once; the device binds its context and waits for its kernels before it
        // drops them. Nothing can be done about a failure.
        let _ = unsafe { result::module::unload(self.0) };
    }
}

#[derive(Clone, Copy)]
struct Function {
    raw: sys::CUfunction,
    /// Bytes of dynamic shared memory that it may use.
    permitted: usize,
}
// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Function {}

impl Functions {
    pub fn new(cubins: Cubins, architecture: String) -> Self {
        Self { cubins, architecture, loaded: Mutex::default() }
    }

    /// The kernel `{name}_{suffix}` of module `module`, allowed to use `shared` bytes.
    fn get(
        &self,
        module: &'static str,
        name: &'static str,
        suffix: &'static str,
        shared: usize,
    ) -> Result<sys::CUfunction> {
        let mut loaded = memory::lock(&self.loaded);
        let mut function = match loaded.functions.get(&(name, suffix)) {
            Some(function) => *function,
            None => {
                let raw = self.find(&mut loaded, module, name, suffix)?;
                Function { raw, permitted: PLAIN_SHARED }
            }
        };
        if shared > function.permitted {
            use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as LARGEST;
            // SAFETY: the function is one of a loaded module.
            unsafe { result::function::set_function_attribute(function.raw, LARGEST, shared as i32) }
                .map_err(failed(format!("permit {shared} bytes of shared memory to `{name}`")))?;
            function.permitted = shared;
        }
        loaded.functions.insert((name, suffix), function);
        Ok(function.raw)
    }

    fn find(
        &self,
        loaded: &mut Loaded,
        module: &'static str,
        name: &str,
        suffix: &str,
    ) -> Result<sys::CUfunction> {
        let handle = match loaded.modules.get(module) {
            Some(module) => module.0,
            None => {
                let image = self.cubins.image(module, &self.architecture)?;
                // SAFETY: the image is a whole file made for this architecture; the driver copies it.
                let handle = unsafe { result::module::load_data(image.as_ptr().cast()) }
                    .map_err(failed(format!("load the kernels of `{module}` for {}", self.architecture)))?;
                loaded.modules.insert(module, Module(handle));
                handle
            }
        };
        let full = if suffix.is_empty() { name.to_string() } else { format!("{name}_{suffix}") };
        let symbol = CString::new(full.as_str()).expect("names of kernels have no zero byte");
        // SAFETY: the module stays loaded as long as the context.
        unsafe { result::module::get_function(handle, symbol) }
            .map_err(failed(format!("find the kernel `{full}` in `{module}`")))
    }
}

/// A kernel with its arguments, in the order of its parameters.
pub(super) struct Launch<'a> {
    cuda: &'a Cuda,
    module: &'static str,
    name: &'static str,
    suffix: &'static str,
    arguments: Vec<u64>,
    /// A size that the kernel's parameter cannot hold.
    too_large: Option<usize>,
}

impl Cuda {
    /// The kernel `name` of `cu/{module}.cu`.
    pub(super) fn kernel(&self, module: &'static str, name: &'static str) -> Launch<'_> {
        Launch { cuda: self, module, name, suffix: "", arguments: Vec::with_capacity(24), too_large: None }
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
}

impl Launch<'_> {
    /// A pointer to what is written.
    pub fn write<T: Elem>(mut self, view: &CudaViewMut<'_, T>) -> Self {
        self.arguments.push(view.pointer());
        self
    }

    /// A pointer to what is written, or none.
    pub fn write_if<T: Elem>(mut self, view: &Option<CudaViewMut<'_, T>>) -> Self {
        self.arguments.push(view.as_ref().map_or(0, CudaViewMut::pointer));
        self
    }

    /// A pointer to what is read.
    pub fn read<T: Elem>(mut self, view: CudaView<'_, T>) -> Self {
        self.arguments.push(view.pointer());
        self
    }

    /// A pointer to what is read, or none.
    pub fn read_if<T: Elem>(mut self, view: Option<CudaView<'_, T>>) -> Self {
        self.arguments.push(view.map_or(0, CudaView::pointer));
        self
    }

    /// Any address.
    pub fn pointer(mut self, address: u64) -> Self {
        self.arguments.push(address);
        self
    }

    /// A `u64` or `size_t`.
    pub fn long(mut self, n: usize) -> Self {
        self.arguments.push(n as u64);
        self
    }

    /// A `u32`.
    pub fn int(mut self, n: usize) -> Self {
        if u32::try_from(n).is_err() {
            self.too_large = Some(n);
        }
        self.arguments.push(n as u64);
        self
    }

    /// A `float`.
    pub fn float(mut self, x: f64) -> Self {
        self.arguments.push((x as f32).to_bits().into());
        self
    }

    /// Queues the kernel with `grid` blocks (in three dimensions) of `threads`, and `shared` bytes
    /// of dynamic shared memory. An empty grid does nothing.
    ///
    /// # Safety
    /// The arguments must be those of the kernel, and memory at pointers must hold what the kernel
    /// touches for these arguments.
    pub unsafe fn run(mut self, grid: [usize; 3], threads: usize, shared: usize) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let unsupported = |why: String| Err(Error::Unsupported { op: self.name, why });
        if let Some(n) = self.too_large {
            return unsupported(format!("a dimension of {n} does not fit 32 bits"));
        }
        if grid[0] > i32::MAX as usize || grid[1].max(grid[2]) > MOST_BLOCKS_YZ {
            return unsupported(format!("a grid of {grid:?} blocks is too large for the device"));
        }
        let stream = self.cuda.stream()?.raw;
        let function = self.cuda.inner.functions.get(self.module, self.name, self.suffix, shared)?;
        let mut pointers: Vec<*mut c_void> =
            self.arguments.iter_mut().map(|a| std::ptr::from_mut(a).cast()).collect();
        let [x, y, z] = grid.map(|n| n as u32);
        // SAFETY: the caller vouches for the arguments; each has a slot of 8 bytes, of which the
        // driver reads the parameter's size, and the lower bytes come first on every host of CUDA.
        unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (threads as u32, 1, 1),
                shared as u32,
                stream,
                &mut pointers,
            )
        }
        .map_err(failed(format!("launch `{}`", self.name)))
    }
}
