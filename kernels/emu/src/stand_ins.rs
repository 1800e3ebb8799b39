//! The stand-in libraries in this process: loaded before anything asks for a driver, so that the
//! program's own code finds them by name; and how tests tell them what to do.

use crate::objects::{AMPERE, HOPPER, Variant, emulator_directory, modules, nccl_file, object_name};
use crate::places::gpu_check;
use gradtx_kernels::cuda::cubin::Cubins;
use gradtx_kernels::cuda::{CublasLt, Cuda};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

/// Order in which the threads of a block have their turn, and blocks theirs.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    /// By their numbers.
    Forward,
    /// The highest number first.
    Reverse,
    /// With a seed.
    Random(u64),
}

/// How kernels run: the order, and whether data races are looked for.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Whose turn it is.
    pub order: Order,
    /// Under the race checker, on a device of such a [`Variant`].
    pub race: bool,
}

/// The first schedule, for what needs only one.
pub const SCHEDULE: Schedule = Schedule { order: Order::Forward, race: false };

/// The stand-in library, loaded so that everybody finds it as `libcuda.so`.
fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let path = emulator_directory().join("libcuda.so");
        // SAFETY: our own library; loading it runs no code that has requirements.
        unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.expect("the emulator loads")
    })
}

/// The stand-in for NCCL, loaded so that everybody finds it as `libnccl.so.2`.
fn nccl() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        library();
        // SAFETY: our own library; loading it runs no code that has requirements.
        unsafe { Library::open(Some(nccl_file()), RTLD_NOW | RTLD_GLOBAL) }.expect("the stand-in loads")
    })
}

/// Calls a function of a stand-in that sets something for this host thread.
fn set(library: &Library, name: &[u8], value: i32) {
    // SAFETY: the functions that this is called with have this type in kernels/emu.
    let set: Symbol<unsafe extern "C" fn(i32)> = unsafe { library.get(name) }.expect("the stand-in has it");
    // SAFETY: takes any number.
    unsafe { set(value) };
}

/// From now on waits for events have no effect on this thread's streams: a planted fault.
pub fn forget_waits() {
    set(library(), b"emu_forget_waits\0", 1);
}

/// From now on NCCL fails on this thread.
pub fn break_nccl() {
    set(nccl(), b"emu_break_nccl\0", 1);
}

/// What can be wrong about a device for NCCL, as in `kernels/emu/nccl.cpp`.
#[derive(Clone, Copy, Debug)]
pub enum NcclFault {
    /// Ranks with it cannot join a group, and the others fail too.
    Join = 1,
    /// They cannot, and the others wait for them.
    SilentJoin = 2,
    /// Sums cannot be started.
    Sums = 3,
}

/// From now on that is wrong about a device, in the whole process.
pub fn plant_nccl_fault(ordinal: usize, fault: NcclFault) {
    // SAFETY: the function has this type in kernels/emu/nccl.cpp.
    let set: Symbol<unsafe extern "C" fn(i32, i32)> =
        unsafe { nccl().get(b"emu_nccl_fault\0") }.expect("the stand-in has it");
    // SAFETY: takes any device, and the numbers above.
    unsafe { set(ordinal as i32, fault as i32) };
}

/// Calls of the driver's that a capture makes illegal in its whole context.
#[derive(Clone, Copy, Debug)]
pub enum DriverCall {
    /// `cuCtxSynchronize`.
    SynchronizeContext,
    /// `cuMemFree`.
    FreeMemory,
    /// `cuMemFreeHost`.
    FreeHostMemory,
    /// `cuModuleLoadData`.
    LoadModule,
    /// `cuMemcpyHtoDAsync`, on the stream of all.
    CopyOnDefaultStream,
}

/// Makes one, in this thread's context, past the program's own code; what it returns. Arguments name nothing
/// that is there.
pub fn call_driver(call: DriverCall) -> i32 {
    type OfPointer = unsafe extern "C" fn(usize) -> i32;
    let of_pointer = |name: &[u8]| {
        // SAFETY: these functions of the driver's interface take one pointer or address.
        let function: Symbol<OfPointer> = unsafe { library().get(name) }.expect("the stand-in has it");
        // SAFETY: the stand-in knows none that is null, and looks for it only where the call is legal.
        unsafe { function(0) }
    };
    match call {
        DriverCall::SynchronizeContext => {
            // SAFETY: the function has this type in the driver's interface.
            let function: Symbol<unsafe extern "C" fn() -> i32> =
                unsafe { library().get(b"cuCtxSynchronize\0") }.expect("the stand-in has it");
            // SAFETY: no arguments.
            unsafe { function() }
        }
        DriverCall::FreeMemory => of_pointer(b"cuMemFree_v2\0"),
        DriverCall::FreeHostMemory => of_pointer(b"cuMemFreeHost\0"),
        DriverCall::LoadModule => {
            // SAFETY: the function has this type in the driver's interface.
            let function: Symbol<unsafe extern "C" fn(*mut usize, *const u8) -> i32> =
                unsafe { library().get(b"cuModuleLoadData\0") }.expect("the stand-in has it");
            let mut module = 0;
            // SAFETY: the image is longer than the header that the stand-in looks at, and no module.
            unsafe { function(&mut module, [0u8; 64].as_ptr()) }
        }
        DriverCall::CopyOnDefaultStream => {
            // SAFETY: the function has this type in the driver's interface.
            let function: Symbol<unsafe extern "C" fn(u64, *const u8, usize, usize) -> i32> =
                unsafe { library().get(b"cuMemcpyHtoDAsync_v2\0") }.expect("the stand-in has it");
            // SAFETY: nothing is copied.
            unsafe { function(0, [0u8; 4].as_ptr(), 0, 0) }
        }
    }
}

/// Whether the tests run on this machine's GPU instead of the emulator.
pub fn on_device() -> bool {
    std::env::var_os("GRADTX_TEST_ON_DEVICE").is_some()
}

/// The schedules to run in: all of them, or the first where kernels are what somebody else has built.
pub fn schedules(all: &[Schedule]) -> &[Schedule] {
    if on_device() || gpu_check().is_some() { &all[..1] } else { all }
}

/// Sets how launches of this thread run. A GPU has an order of its own, and only kernels that are
/// built for it can be watched by the race checker.
pub fn configure(schedule: Schedule) {
    if on_device() {
        return;
    }
    let race = schedule.race && gpu_check().is_none();
    let (order, seed) = match schedule.order {
        Order::Forward => (0, 1),
        Order::Reverse => (1, 1),
        Order::Random(seed) => (2, seed),
    };
    // SAFETY: the function has this type in kernels/emu/scheduler.cpp.
    let set: Symbol<unsafe extern "C" fn(i32, u64, i32)> =
        unsafe { library().get(b"emu_configure\0") }.expect("the emulator has it");
    // SAFETY: takes any numbers of the kinds above.
    unsafe { set(order, seed, race.into()) };
}

/// Sets whether it is kernels that this thread's streams do as late as they may, instead of copies.
pub fn late_kernels(late: bool) {
    if on_device() {
        return;
    }
    set(library(), b"emu_late_kernels\0", late.into());
}

/// The stand-in for cuBLASLt, or on a machine with a GPU its own.
pub fn cublaslt() -> CublasLt {
    if on_device() { CublasLt::Find } else { CublasLt::At(emulator_directory().join("libcublasLt.so")) }
}

/// The most bytes that were in use at a time on this device, by all that is on it in this process; `from_now_on`
/// forgets what was before.
pub fn peak_memory(cuda: &Cuda, from_now_on: bool) -> u64 {
    cuda.memory().expect("its context can be bound");
    // SAFETY: the function has this type in kernels/emu/driver.cpp.
    let ask: Symbol<unsafe extern "C" fn(*mut usize, i32)> =
        unsafe { library().get(b"emu_peak_memory\0") }.expect("the emulator has it");
    let mut bytes = 0;
    // SAFETY: one number is written.
    unsafe { ask(&mut bytes, from_now_on.into()) };
    bytes as u64
}

/// Bytes of shared memory that a block may ask this thread's device for, from now on.
pub fn limit_shared_memory(bytes: usize) {
    set(library(), b"emu_shared\0", bytes as i32);
}

/// Whether devices that this thread opens from now on are of Hopper's compute capability. All that it
/// changes is which kernels are launched.
pub fn pretend_hopper(hopper: bool) {
    let (major, minor) = if hopper { HOPPER } else { AMPERE };
    set(library(), b"emu_capability\0", major * 10 + minor);
}

/// Lets another program find the stand-in for the driver, and kernels of this variant in its cache.
pub fn lend(command: &mut Command, variant: Variant) {
    if !on_device() {
        command.env("GRADTX_CUDA_CACHE", modules(variant)).env("LD_LIBRARY_PATH", emulator_directory());
    }
}

/// A device of its own, with kernels of this variant, which multiply matrices too.
pub fn device(variant: Variant) -> Cuda {
    device_with(variant, &CublasLt::Off)
}

/// The same with this library for matrix products.
pub fn device_with(variant: Variant, cublaslt: &CublasLt) -> Cuda {
    numbered_device(0, variant, cublaslt)
}

/// Device `ordinal` of several, for a rank that is this thread.
pub fn device_of_rank(ordinal: usize) -> Cuda {
    if !on_device() {
        nccl();
        set(library(), b"emu_devices\0", ordinal as i32 + 1);
    }
    numbered_device(ordinal, Variant::PLAIN, &CublasLt::Off)
}

fn numbered_device(ordinal: usize, variant: Variant, cublaslt: &CublasLt) -> Cuda {
    if on_device() {
        assert!(variant.plant.is_none(), "faults are planted into emulated kernels only");
        return Cuda::with_parts(ordinal, Cubins::standard(), cublaslt).expect("a CUDA device was asked for");
    }
    library();
    let cubins = Cubins::directory(&modules(variant));
    Cuda::with_parts(ordinal, cubins, cublaslt).expect("the stand-in shows a device")
}

/// The shared object of a module, by the name of its file without `.cu`. It can be loaded into this process.
pub fn module_object(module: &str) -> PathBuf {
    library();
    modules(Variant::PLAIN).join(object_name(module))
}

/// A directory of kernels that a [`Cuda`] of this process, of whatever build of its package, can load: for
/// that package's own tests.
pub fn kernel_objects() -> PathBuf {
    library();
    modules(Variant::PLAIN)
}
