//! Kernels by name: loaded with their module when they are first used.

use super::cubin::{self, Cubins};
use super::limits::{Limits, Needs};
use super::signature::{self, Signature};
use super::{failed, gate, memory};
use crate::Result;
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::ffi::CString;
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
    pub raw: sys::CUfunction,
    pub needs: Needs,
    /// Bytes of dynamic shared memory that it may use.
    permitted: usize,
    pub signature: &'static Signature,
}
// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Function {}

impl Function {
    /// Bytes of shared memory that its code declares, at least.
    pub fn declared_shared(&self) -> usize {
        self.needs.shared.max(DECLARED)
    }
}

impl Functions {
    pub fn new(cubins: Cubins, architecture: String, driver: i32) -> Self {
        Self { cubins, architecture, driver, loaded: Mutex::default() }
    }

    /// The kernel `{name}_{suffix}` of module `module`.
    pub fn get(
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
        let mut function = Function { raw, needs, permitted: 0, signature };
        function.permitted = limits.plain_shared.saturating_sub(function.declared_shared());
        loaded.functions.insert((name, suffix), function);
        Ok(function)
    }

    /// Lets a kernel use `shared` bytes of dynamic shared memory.
    pub fn permit(
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
