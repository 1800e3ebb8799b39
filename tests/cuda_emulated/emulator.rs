//! Builds the emulator and the kernels for the host, and loads them into this process.
//!
//! The stand-in for `libcuda.so` is loaded before anything asks for a driver, so the
//! program's own code finds it by name. Kernels become shared objects under the file names
//! of cubins, in a directory that the device is told to take its cubins from.

use crate::places::gpu_check;
use gradtx_kernels::cuda::cubin::{Cubins, MODULES, architecture, file_name};
use gradtx_kernels::cuda::{CublasLt, Cuda};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

/// Where kernels and emulator are in the sources.
fn sources(directory: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels").join(directory)
}

/// Where what is built here lies.
fn built() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-emulator")
}

/// Order in which the threads of a block have their turn, and blocks theirs.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    Forward,
    Reverse,
    /// With a seed.
    Random(u64),
}

/// How kernels run: the order, and whether data races are looked for.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    pub order: Order,
    pub race: bool,
}

/// The first schedule, for what needs only one.
pub const SCHEDULE: Schedule = Schedule { order: Order::Forward, race: false };

/// A fault planted into a module: text of a source, and what takes its place.
#[derive(Clone, Copy, Debug, Hash)]
pub struct Plant {
    /// The module that gets it, by the name of its file.
    pub module: &'static str,
    /// The file that the text is in: the module's own or a header.
    pub file: &'static str,
    pub text: &'static str,
    pub instead: &'static str,
}

/// What kernels are compiled from and with.
#[derive(Clone, Copy, Debug, Hash)]
pub struct Variant {
    pub race: bool,
    pub plant: Option<Plant>,
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
}

fn compiler() -> Command {
    let mut command = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "g++".into()));
    command.args(["-std=c++17", "-O2", "-fPIC", "-fno-strict-aliasing", "-shared"]);
    command.arg(format!("-march={}", processor()));
    command.args(["-Wall", "-Wno-unknown-pragmas", "-DGRADTX_EMULATE", "-U_FORTIFY_SOURCE"]);
    command.arg("-I").arg(sources("emu")).arg("-I").arg(sources("cu"));
    command
}

/// The processor that is compiled for: this one, or that of `GRADTX_EMULATOR_CPU` for another machine.
fn processor() -> String {
    std::env::var("GRADTX_EMULATOR_CPU").unwrap_or_else(|_| "native".into())
}

/// Hash of what files of a directory hold, and of their names.
fn hash_of(directory: &Path, state: &mut DefaultHasher) {
    let entries = std::fs::read_dir(directory).expect("the sources are there");
    let mut files: Vec<PathBuf> = entries.map(|e| e.expect("they can be listed").path()).collect();
    files.sort();
    for file in files {
        file.file_name().hash(state);
        std::fs::read(&file).expect("they can be read").hash(state);
    }
}

/// The stand-in for NCCL, by its name.
const NCCL: &str = "libnccl.so.2";

/// The directory of the stand-in library, by the hash of its sources.
fn emulator_directory() -> PathBuf {
    if let Some(home) = gpu_check() {
        return home.join("emulated");
    }
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        let mut state = DefaultHasher::new();
        hash_of(&sources("emu"), &mut state);
        processor().hash(&mut state);
        let directory = built().join(format!("emulator-{:016x}", state.finish()));
        let library = directory.join("libcuda.so");
        if !library.exists() {
            std::fs::create_dir_all(&directory).expect("a directory for the emulator");
            let unfinished = directory.join(format!("unfinished-{}.so", std::process::id()));
            let parts = ["scheduler", "collectives", "memory", "driver", "streams"];
            let files = parts.map(|part| sources("emu").join(format!("{part}.cpp")));
            let strict = ["-Wextra", "-Werror", "-Wl,-z,defs"];
            run(compiler()
                .args(strict)
                .args(["-Wl,-soname,libcuda.so", "-o"])
                .arg(&unfinished)
                .args(files)
                .args(["-lpthread", "-ldl"]));
            // What is looked for is built last, so that all is there when it is.
            for (name, source) in [("libcublasLt.so", "cublaslt.cpp"), (NCCL, "nccl.cpp")] {
                let mut command = compiler();
                command.args(strict).arg(format!("-Wl,-soname,{name}")).arg("-o").arg(directory.join(name));
                run(command.arg(sources("emu").join(source)).arg(&unfinished));
            }
            std::fs::rename(&unfinished, &library).expect("the emulator can be put in place");
        }
        directory
    };
    DIRECTORY.get_or_init(build).clone()
}

/// The stand-in library, loaded so that everybody finds it as `libcuda.so`.
fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let path = emulator_directory().join("libcuda.so");
        // SAFETY: our own library; loading it runs no code that has requirements.
        unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.expect("the emulator loads")
    })
}

/// The stand-in for NCCL.
pub fn nccl_file() -> PathBuf {
    emulator_directory().join(NCCL)
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
    SynchronizeContext,
    FreeMemory,
    FreeHostMemory,
    LoadModule,
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

/// The files of the stand-ins for the driver and for cuBLASLt.
pub fn library_files() -> [PathBuf; 2] {
    ["libcuda.so", "libcublasLt.so"].map(|name| emulator_directory().join(name))
}

/// The source of a file with a fault planted in it, at the first such place. Fails if there is none.
fn planted(plant: &Plant) -> String {
    let source = std::fs::read_to_string(sources("cu").join(plant.file)).expect("the source can be read");
    assert!(source.contains(plant.text), "{plant:?}: no such text");
    source.replacen(plant.text, plant.instead, 1)
}

/// A directory with the kernels of this variant, as shared objects under the names of cubins.
fn modules(variant: Variant) -> PathBuf {
    if let Some(home) = gpu_check() {
        assert!(variant.plant.is_none(), "faults are planted where kernels can be built");
        return home.join("emulated/kernels");
    }
    // Where a fault is planted, all other modules are as they should be.
    let faultless = variant.plant.map(|_| modules(Variant { plant: None, ..variant }));
    // One at a time: two tests may want the same variant.
    static BUILDING: Mutex<()> = Mutex::new(());
    let _alone = BUILDING.lock().unwrap_or_else(|e| e.into_inner());
    library();
    let mut state = DefaultHasher::new();
    emulator_directory().hash(&mut state);
    variant.hash(&mut state);
    // How kernels are compiled and faults planted.
    include_str!("emulator.rs").hash(&mut state);
    let directory = built().join(format!("kernels-{:016x}", state.finish()));
    let include = directory.join("planted");
    std::fs::create_dir_all(&include).expect("a directory for kernels");
    let wanted = |file: &&str| variant.plant.is_none_or(|plant| plant.module == *file);
    if let Some(plant) = &variant.plant {
        // A header is looked for beside the file that includes it first, so the module goes along.
        let module = std::fs::read(sources("cu").join(plant.module)).expect("the source can be read");
        std::fs::write(include.join(plant.module), module).expect("a module can be copied");
        std::fs::write(include.join(plant.file), planted(plant)).expect("a planted fault can be written");
    }
    let missing = Mutex::new(MODULES.iter().map(|(file, _)| *file).filter(wanted).collect::<Vec<_>>());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                while let Some(file) = { missing.lock().expect("nobody panics with it").pop() } {
                    build_module(file, variant, &directory, &include);
                }
            });
        }
    });
    for (file, _) in MODULES.iter().filter(|(file, _)| !wanted(file)) {
        let (name, faultless) = (object_name(file), faultless.as_ref().expect("a fault is planted"));
        if !directory.join(&name).exists() {
            std::os::unix::fs::symlink(faultless.join(&name), directory.join(&name))
                .expect("a link to a module");
        }
    }
    directory
}

/// The name under which the device looks for a module.
fn object_name(file: &str) -> String {
    // The stand-in device has this compute capability.
    let architecture = architecture((8, 0));
    file_name(file.trim_end_matches(".cu"), &architecture, 12).expect("it is in the list of modules")
}

/// The shared object of a module, by the name of its file without `.cu`.
pub fn module_object(module: &str) -> PathBuf {
    modules(Variant { race: false, plant: None }).join(object_name(module))
}

/// Builds one module unless it is there.
fn build_module(file: &str, variant: Variant, directory: &Path, include: &Path) {
    let module = file.trim_end_matches(".cu");
    let object = directory.join(object_name(file));
    if object.exists() {
        return;
    }
    let mut command = compiler();
    if variant.race {
        command.arg("-fsanitize=thread");
    }
    let replaced = include.join(file);
    let source = if replaced.exists() { replaced } else { sources("cu").join(file) };
    let unfinished = directory.join(format!("unfinished-{module}-{}.so", std::process::id()));
    command.arg("-I").arg(include).arg("-x").arg("c++").arg(source).arg("-o").arg(&unfinished);
    // The instrumentation's functions are the emulator's; no runtime of the compiler is wanted.
    command.arg("-nodefaultlibs").arg("-L").arg(emulator_directory());
    command.args(["-lcuda", "-lstdc++", "-lm", "-lc", "-lgcc_s", "-lgcc"]);
    run(&mut command);
    std::fs::rename(&unfinished, &object).expect("a module can be put in place");
}

/// Copies the stand-in libraries, and kernels without faults, to where an executable that was put
/// into a directory by `make gpu-check` looks for them.
pub fn copy_parts(to: &Path) {
    let kernels = to.join("kernels");
    std::fs::create_dir_all(&kernels).expect("a directory for the emulator's parts");
    let copy_all = |from: PathBuf, to: &Path| {
        for entry in std::fs::read_dir(from).expect("it was built") {
            let path = entry.expect("it can be listed").path();
            if let (true, Some(name)) = (path.is_file(), path.file_name()) {
                std::fs::copy(&path, to.join(name)).expect("a part can be copied");
            }
        }
    };
    copy_all(emulator_directory(), to);
    copy_all(modules(Variant { race: false, plant: None }), &kernels);
}

/// Bytes of shared memory that a block may ask this thread's device for, from now on.
pub fn limit_shared_memory(bytes: usize) {
    set(library(), b"emu_shared\0", bytes as i32);
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
    numbered_device(ordinal, Variant { race: false, plant: None }, &CublasLt::Off)
}

fn numbered_device(ordinal: usize, variant: Variant, cublaslt: &CublasLt) -> Cuda {
    if on_device() {
        assert!(variant.plant.is_none(), "faults are planted into emulated kernels only");
        return Cuda::with_parts(ordinal, Cubins::standard(), cublaslt).expect("a CUDA device was asked for");
    }
    let cubins = Cubins::directory(&modules(variant));
    Cuda::with_parts(ordinal, cubins, cublaslt).expect("the stand-in shows a device")
}
