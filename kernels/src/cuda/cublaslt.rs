//! Matrix products by NVIDIA's cuBLASLt, where it is installed: found at run time, never linked.
//!
//! In: addresses, strides and dimensions of one product. Out: it is queued, or the library has
//! nothing for it and a kernel of our own must do it (`gemm.rs`).
//!
//! What the library calls a heuristic names its algorithm for a product. It is asked once for
//! every shape, layout and alignment, and its first answer is taken, or the one that is stored for this product
//! ([`super::algorithms`]): nothing is timed in use, so that results do not depend on what else the device did meanwhile. They do depend on the device and the
//! library's version, and a row of a product on how many rows there are, since all of these decide the order of
//! sums. Sums are in f32 everywhere, also where an algorithm splits them, and f32 is never rounded to TF32.
//!
//! The library thinks in columns. Our row-major `C = op(A) op(B)` is its `Cᵀ = op(B)ᵀ op(A)ᵀ`: the
//! same memory, the operands exchanged, a row of ours a column of its own.

use super::CudaDevice;
use super::algorithms::{Algorithms, MAX_HEURISTICS, Measured};
use super::library::{candidates, first_usable, loader_says};
use super::memory::{self, Allocation};
use super::product::{Product, Shape};
use super::stream::Stream;
use super::{gate, timing};
use crate::{DType, Error, Result};
use cudarc::driver::sys;
use libloading::Library;
use std::collections::{HashMap, hash_map::Entry};
use std::ffi::{CStr, c_int, c_void};
use std::path::PathBuf;
use std::ptr;
use std::sync::{Arc, Mutex};

/// Names that the dynamic loader is asked for: current toolkits, then development links.
const NAMES: [&str; 3] = ["libcublasLt.so.12", "libcublasLt.so.13", "libcublasLt.so"];
/// Scratch memory for the library, as much as it wants on Hopper.
const WORKSPACE: usize = 32 << 20;
/// Shapes that are remembered. Packed streams differ in length from step to step.
const MAX_PLANS: usize = 4096;

type Status = c_int;
type Object = *mut c_void;

// Numbers of the library's interface (cublas_api.h, cublasLt.h, library_types.h).
const NO_TRANSPOSE: i32 = 0;
const TRANSPOSE: i32 = 1;
const COMPUTE_F32: c_int = 68;
const TYPE_F32: c_int = 0;
const TYPE_BF16: c_int = 14;
const EPILOGUE_BIAS: u32 = 4;
const DESC_TRANS_A: c_int = 3;
const DESC_TRANS_B: c_int = 4;
const DESC_EPILOGUE: c_int = 7;
const DESC_BIAS_POINTER: c_int = 8;
const PREFERENCE_WORKSPACE: c_int = 1;
const PREFERENCE_REDUCTIONS: c_int = 3;
/// Minimal alignments of A, B, C and D, in this order.
const PREFERENCE_ALIGNMENTS: [c_int; 4] = [5, 6, 7, 8];
/// Parts of a split sum are added in the type that it is computed in.
const REDUCE_IN_COMPUTE_TYPE: u32 = 2;

/// Which cuBLASLt a device uses for matrix products.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CublasLt {
    /// The first usable one of the dynamic loader and of `GRADTX_CUDA_LIBRARIES`; without one, kernels
    /// of our own.
    Find,
    /// None: kernels of our own.
    Off,
    /// This file; that it is not there is an error.
    At(PathBuf),
}

impl CublasLt {
    /// As the environment says: `GRADTX_CUBLASLT` is a path, or `off`.
    pub fn standard() -> Self {
        match std::env::var_os("GRADTX_CUBLASLT").filter(|v| !v.is_empty()) {
            None => Self::Find,
            Some(value) if value == "off" => Self::Off,
            Some(path) => Self::At(path.into()),
        }
    }

    /// The library's name and version, without a device; or in one sentence why there is none.
    pub fn describe(&self) -> std::result::Result<String, String> {
        Api::load(self, |api| Ok(api.description()))
    }
}

/// An algorithm as the library describes it; opaque.
#[repr(C)]
#[derive(Clone, Copy)]
struct Algorithm([u64; 8]);

/// What a heuristic says.
#[repr(C)]
#[derive(Clone, Copy)]
struct Heuristic {
    algorithm: Algorithm,
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

type Destroy = unsafe extern "C" fn(Object) -> Status;
type SetAttribute = unsafe extern "C" fn(Object, c_int, *const c_void, usize) -> Status;

/// The library's functions that are used here.
struct Api {
    version: unsafe extern "C" fn() -> usize,
    create: unsafe extern "C" fn(*mut Object) -> Status,
    destroy: Destroy,
    layout_create: unsafe extern "C" fn(*mut Object, c_int, u64, u64, i64) -> Status,
    layout_destroy: Destroy,
    desc_create: unsafe extern "C" fn(*mut Object, c_int, c_int) -> Status,
    desc_set: SetAttribute,
    desc_destroy: Destroy,
    preference_create: unsafe extern "C" fn(*mut Object) -> Status,
    preference_set: SetAttribute,
    preference_destroy: Destroy,
    heuristic: unsafe extern "C" fn(
        Object,
        Object,
        Object,
        Object,
        Object,
        Object,
        Object,
        c_int,
        *mut Heuristic,
        *mut c_int,
    ) -> Status,
    matmul: unsafe extern "C" fn(
        Object,
        Object,
        *const c_void,
        u64,
        Object,
        u64,
        Object,
        *const c_void,
        u64,
        Object,
        u64,
        Object,
        *const Algorithm,
        u64,
        usize,
        sys::CUstream,
    ) -> Status,
    /// Holds the functions above.
    _library: Library,
}

impl Api {
    /// What `accept` makes of the first library that has all functions and that it does not refuse.
    fn load<T>(
        which: &CublasLt,
        mut accept: impl FnMut(Self) -> std::result::Result<T, String>,
    ) -> std::result::Result<T, String> {
        let files = match which {
            CublasLt::Off => return Err("cuBLASLt is turned off".into()),
            CublasLt::At(path) => vec![path.as_os_str().to_os_string()],
            CublasLt::Find => candidates(&NAMES),
        };
        first_usable(&files, |library| accept(Self::bind(library)?))
    }

    fn bind(library: Library) -> std::result::Result<Self, String> {
        fn get<F: Copy>(library: &Library, name: &CStr) -> std::result::Result<F, String> {
            // SAFETY: the types above are those of the library's documented interface.
            let symbol = unsafe { library.get::<F>(name.to_bytes_with_nul()) };
            symbol.map(|f| *f).map_err(|e| loader_says(&e))
        }
        Ok(Self {
            version: get(&library, c"cublasLtGetVersion")?,
            create: get(&library, c"cublasLtCreate")?,
            destroy: get(&library, c"cublasLtDestroy")?,
            layout_create: get(&library, c"cublasLtMatrixLayoutCreate")?,
            layout_destroy: get(&library, c"cublasLtMatrixLayoutDestroy")?,
            desc_create: get(&library, c"cublasLtMatmulDescCreate")?,
            desc_set: get(&library, c"cublasLtMatmulDescSetAttribute")?,
            desc_destroy: get(&library, c"cublasLtMatmulDescDestroy")?,
            preference_create: get(&library, c"cublasLtMatmulPreferenceCreate")?,
            preference_set: get(&library, c"cublasLtMatmulPreferenceSetAttribute")?,
            preference_destroy: get(&library, c"cublasLtMatmulPreferenceDestroy")?,
            heuristic: get(&library, c"cublasLtMatmulAlgoGetHeuristic")?,
            matmul: get(&library, c"cublasLtMatmul")?,
            _library: library,
        })
    }

    fn version(&self) -> usize {
        // SAFETY: takes nothing and returns a number.
        unsafe { (self.version)() }
    }

    fn description(&self) -> String {
        let version = self.version();
        let (major, minor, patch) = (version / 10_000, version / 100 % 100, version % 100);
        format!("cuBLASLt {major}.{minor}.{patch}")
    }
}

/// Fails with the number that the library gave.
fn check(what: &str, status: Status) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    Err(Error::Driver { what: what.into(), why: format!("cuBLASLt says status {status}") })
}

/// One of the library's objects; given back when dropped.
struct Owned {
    raw: Object,
    destroy: Destroy,
}

// SAFETY: the library's objects are not bound to a thread, and are used under a lock.
unsafe impl Send for Owned {}

impl Owned {
    fn new(what: &str, destroy: Destroy, create: impl FnOnce(*mut Object) -> Status) -> Result<Self> {
        let mut raw = ptr::null_mut();
        check(what, create(&mut raw))?;
        Ok(Self { raw, destroy })
    }

    fn set<T: Copy>(&self, set: SetAttribute, attribute: c_int, value: T) -> Result<()> {
        // SAFETY: the object is alive, and the attribute's value is as long as `T`.
        let status = unsafe { set(self.raw, attribute, (&raw const value).cast(), size_of::<T>()) };
        check("describe a matrix product", status)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: created by this library, which is still loaded, and destroyed once. Nothing can
        // be done about a failure.
        let _ = unsafe { (self.destroy)(self.raw) };
    }
}

/// A product as the library knows it, and its algorithm.
struct Plan {
    desc: Owned,
    /// Of its A, B, C and D: our b, a, start and c.
    layouts: [Owned; 4],
    algorithm: Algorithm,
}

fn type_of(dtype: DType) -> Result<c_int> {
    match dtype {
        DType::F32 => Ok(TYPE_F32),
        DType::Bf16 => Ok(TYPE_BF16),
        other => Err(Error::Unsupported { op: "cublaslt", why: format!("products of {other:?}") }),
    }
}

/// What one product at a time uses of the library.
struct Known {
    /// By shape; none where the library has no algorithm.
    plans: HashMap<Shape, Option<Plan>>,
    handle: Owned,
}

/// The library, ready for one device.
pub(super) struct Products {
    /// Dropped before the library.
    known: Mutex<Known>,
    /// For each of the device's streams of operations.
    workspaces: [Allocation; 2],
    algorithms: Algorithms,
    device: String,
    /// What was measured, while that is asked for.
    tuning: Mutex<Option<Vec<Measured>>>,
    api: Api,
}

/// Launches of a product by an algorithm that are timed together, and how often; the fastest time counts.
const TIMED_LAUNCHES: usize = 20;
const TIMED_ROUNDS: usize = 5;

impl Products {
    /// The library, or in one sentence why there is none. The device's context is bound.
    ///
    /// # Errors
    /// If the library was named and cannot be used, or if there is no memory for it.
    pub fn open(
        which: &CublasLt,
        stream: &Arc<Stream>,
        device: &CudaDevice,
    ) -> Result<std::result::Result<Self, String>> {
        // A library that is newer than the driver loads, and fails here: then the next one is tried.
        let opened = Api::load(which, |api| {
            // SAFETY: the context is bound; one handle is written.
            let handle = Owned::new("start", api.destroy, |to| unsafe { (api.create)(to) });
            handle.map(|handle| (api, handle)).map_err(|e| e.to_string())
        });
        match opened {
            Ok((api, handle)) => {
                let workspace = || Allocation::new(stream, device, WORKSPACE);
                let workspaces = [workspace()?, workspace()?];
                let known = Mutex::new(Known { plans: HashMap::new(), handle });
                let algorithms = Algorithms::standard(&device.name, api.version())?;
                let (device, tuning) = (device.name.clone(), Mutex::new(None));
                Ok(Ok(Self { known, workspaces, algorithms, device, tuning, api }))
            }
            Err(why) if matches!(which, CublasLt::At(_)) => Err(Error::Unavailable { what: "cuBLASLt", why }),
            Err(why) => Ok(Err(why)),
        }
    }

    /// The library and its version, and which stored choices of its algorithms there are for this device.
    pub fn description(&self) -> String {
        let (library, stored) = (self.api.description(), &self.algorithms);
        match stored.len() {
            0 => library,
            count => {
                format!("{library} with {count} stored algorithms ({:08x})", stored.fingerprint() as u32)
            }
        }
    }

    /// Measures the library's algorithms for every product that is new from now on, in its first launch. What that
    /// launch computes is of no use.
    pub fn start_tuning(&self) {
        memory::lock(&self.known).plans.clear();
        *memory::lock(&self.tuning) = Some(Vec::new());
    }

    /// Lines for a file of choices, of what was measured since [`Self::start_tuning`].
    pub fn stop_tuning(&self) -> Vec<String> {
        let measured = memory::lock(&self.tuning).take().unwrap_or_default();
        let version = self.api.version();
        measured.iter().filter_map(|each| each.line(&self.device, version)).collect()
    }

    /// Queues a product in one of the device's two streams of operations; false if the library has nothing for it.
    ///
    /// # Safety
    /// All addresses must be of matrices of this device that hold what the dimensions say, none of
    /// which is empty, and the stream must be of this device.
    pub unsafe fn run(&self, stream: sys::CUstream, is_second: bool, product: &Product) -> Result<bool> {
        let shape = Shape::of(product);
        // The library loads kernels when it is asked for an algorithm, or in its first product.
        let is_new = !memory::lock(&self.known).plans.contains_key(&shape);
        let _call = is_new.then(gate::enter);
        let mut known = memory::lock(&self.known);
        let Known { plans, handle } = &mut *known;
        if plans.len() >= MAX_PLANS && !plans.contains_key(&shape) {
            plans.clear();
        }
        let plan = match plans.entry(shape) {
            Entry::Occupied(held) => held.into_mut(),
            Entry::Vacant(free) => {
                let plan = self.plan(handle, &shape, product.bias)?;
                if let (Some(plan), Some(measured)) = (&plan, &mut *memory::lock(&self.tuning)) {
                    // SAFETY: as of this function.
                    measured.push(unsafe { self.measure(handle, stream, is_second, plan, &shape, product) }?);
                }
                free.insert(plan)
            }
        };
        let Some(plan) = plan else { return Ok(false) };
        // SAFETY: as of this function.
        unsafe { self.launch(handle, stream, is_second, plan, &plan.algorithm, &shape, product) }?;
        Ok(true)
    }

    /// Seconds of a product by each of the library's algorithms. The result is written again and again.
    ///
    /// # Safety
    /// As of [`Self::run`].
    unsafe fn measure(
        &self,
        handle: &Owned,
        stream: sys::CUstream,
        is_second: bool,
        plan: &Plan,
        shape: &Shape,
        product: &Product,
    ) -> Result<Measured> {
        let mut seconds = Vec::new();
        for algorithm in self.heuristics(handle, &plan.desc, &plan.layouts, shape, MAX_HEURISTICS)? {
            // SAFETY: as of this function.
            let launch =
                || unsafe { self.launch(handle, stream, is_second, plan, &algorithm, shape, product) };
            // Its kernel is loaded.
            launch()?;
            let repeat = || (0..TIMED_LAUNCHES).try_for_each(|_| launch());
            // SAFETY: the stream is the caller's, and the product's memory is alive meanwhile.
            let times = unsafe { timing::times(stream, repeat, TIMED_ROUNDS) }?;
            let least = times.into_iter().fold(f64::INFINITY, f64::min);
            seconds.push(least / TIMED_LAUNCHES as f64);
        }
        Ok(Measured { product: shape.to_string(), seconds })
    }

    /// Queues a product by one algorithm.
    ///
    /// # Safety
    /// As of [`Self::run`].
    #[allow(clippy::too_many_arguments)]
    unsafe fn launch(
        &self,
        handle: &Owned,
        stream: sys::CUstream,
        is_second: bool,
        Plan { desc, layouts, .. }: &Plan,
        algorithm: &Algorithm,
        shape: &Shape,
        product: &Product,
    ) -> Result<()> {
        if shape.bias_alignment > 0 {
            desc.set(self.api.desc_set, DESC_BIAS_POINTER, product.bias)?;
        }
        let (alpha, beta) = (product.dims.alpha as f32, if shape.add { 1.0f32 } else { 0.0 });
        let start = if shape.add { product.start } else { product.c };
        let [a, b, c, d] = layouts;
        // SAFETY: the objects are alive; the caller vouches for the matrices, and the heuristic
        // has kept to the workspace.
        let status = unsafe {
            (self.api.matmul)(
                handle.raw,
                desc.raw,
                (&raw const alpha).cast(),
                product.b,
                a.raw,
                product.a,
                b.raw,
                (&raw const beta).cast(),
                start,
                c.raw,
                product.c,
                d.raw,
                algorithm,
                self.workspaces[usize::from(is_second)].pointer(),
                WORKSPACE,
                stream,
            )
        };
        check(&format!("multiply matrices {:?}", product.dims), status)
    }

    /// Describes a product to the library, and asks for an algorithm.
    fn plan(&self, handle: &Owned, shape: &Shape, bias: u64) -> Result<Option<Plan>> {
        let api = &self.api;
        let [m, n, k] = shape.mnk;
        let [trans_a, trans_b] = shape.transposed;
        let [a_stride, b_stride, start_stride, c_stride] = shape.strides;
        let (inputs, output) = (type_of(shape.inputs)?, type_of(shape.output)?);
        // A stored row is a column of the library's: its rows are our columns.
        let layout = |dtype: c_int, cols: usize, rows: usize, stride: usize| {
            // SAFETY: one object is written.
            Owned::new("describe a matrix", api.layout_destroy, |to| unsafe {
                (api.layout_create)(to, dtype, cols as u64, rows as u64, stride as i64)
            })
        };
        let stored = |transposed: bool, rows: usize, cols: usize| {
            if transposed { (rows, cols) } else { (cols, rows) }
        };
        let ((b_cols, b_rows), (a_cols, a_rows)) = (stored(trans_b, k, n), stored(trans_a, m, k));
        let layouts = [
            layout(inputs, b_cols, b_rows, b_stride)?,
            layout(inputs, a_cols, a_rows, a_stride)?,
            layout(output, n, m, start_stride)?,
            layout(output, n, m, c_stride)?,
        ];
        // SAFETY: one object is written.
        let desc = Owned::new("describe a product", api.desc_destroy, |to| unsafe {
            (api.desc_create)(to, COMPUTE_F32, TYPE_F32)
        })?;
        let turned = |transposed: bool| if transposed { TRANSPOSE } else { NO_TRANSPOSE };
        desc.set(api.desc_set, DESC_TRANS_A, turned(trans_b))?;
        desc.set(api.desc_set, DESC_TRANS_B, turned(trans_a))?;
        if shape.bias_alignment > 0 {
            desc.set(api.desc_set, DESC_EPILOGUE, EPILOGUE_BIAS)?;
            desc.set(api.desc_set, DESC_BIAS_POINTER, bias)?;
        }
        let choice = if self.algorithms.len() > 0 { self.algorithms.choice(&shape.to_string()) } else { 0 };
        let found = self.heuristics(handle, &desc, &layouts, shape, choice + 1)?;
        // The library may have fewer than where the choice was measured.
        let algorithm = found.get(choice).or(found.first()).copied();
        Ok(algorithm.map(|algorithm| Plan { desc, layouts, algorithm }))
    }

    /// The library's choices within the workspace, at most so many, the one first that it expects to be the fastest.
    fn heuristics(
        &self,
        handle: &Owned,
        desc: &Owned,
        layouts: &[Owned; 4],
        shape: &Shape,
        most: usize,
    ) -> Result<Vec<Algorithm>> {
        let api = &self.api;
        // SAFETY: one object is written.
        let wish = Owned::new("describe what is wanted", api.preference_destroy, |to| unsafe {
            (api.preference_create)(to)
        })?;
        wish.set(api.preference_set, PREFERENCE_WORKSPACE, WORKSPACE as u64)?;
        wish.set(api.preference_set, PREFERENCE_REDUCTIONS, REDUCE_IN_COMPUTE_TYPE)?;
        let [a, b, start, c] = shape.alignments;
        for (attribute, alignment) in PREFERENCE_ALIGNMENTS.into_iter().zip([b, a, start, c]) {
            wish.set(api.preference_set, attribute, alignment)?;
        }
        let nothing =
            Heuristic { algorithm: Algorithm([0; 8]), workspace: 0, state: 0, waves: 0.0, reserved: [0; 4] };
        let mut found = vec![nothing; most];
        let mut count = 0;
        let [la, lb, lc, ld] = layouts.each_ref().map(|layout| layout.raw);
        let to = found.as_mut_ptr();
        // SAFETY: all objects are alive; room for so many answers is given, and their size is the library's.
        let status = unsafe {
            (api.heuristic)(handle.raw, desc.raw, la, lb, lc, ld, wish.raw, most as c_int, to, &mut count)
        };
        // Whatever it dislikes, our own kernel takes it.
        found.truncate(if status == 0 { count.max(0) as usize } else { 0 });
        let usable = |each: &Heuristic| each.state == 0 && each.workspace <= WORKSPACE;
        Ok(found.into_iter().filter(usable).map(|each| each.algorithm).collect())
    }
}
