//! Builds the emulator, and the kernels for the host: shared objects under the file names of cubins,
//! in a directory that a device is told to take its cubins from.

use crate::places::{built, gpu_check, sources};
use gradtx_kernels::cuda::cubin::{MODULES, architecture, file_name};
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

/// A fault planted into a module: text of a source, and what takes its place.
#[derive(Clone, Copy, Debug, Hash)]
pub struct Plant {
    /// The module that gets it, by the name of its file.
    pub module: &'static str,
    /// The file that the text is in: the module's own or a header.
    pub file: &'static str,
    /// Text of that file.
    pub text: &'static str,
    /// What takes its place.
    pub instead: &'static str,
}

/// What kernels are compiled from and with.
#[derive(Clone, Copy, Debug, Hash)]
pub struct Variant {
    /// Under the race checker.
    pub race: bool,
    /// At most one fault.
    pub plant: Option<Plant>,
}

impl Variant {
    /// As the program has them.
    pub const PLAIN: Self = Self { race: false, plant: None };
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
    let paths = entries.map(|e| e.expect("they can be listed").path());
    let mut files: Vec<PathBuf> = paths.filter(|path| path.is_file()).collect();
    files.sort();
    for file in files {
        file.file_name().hash(state);
        std::fs::read(&file).expect("they can be read").hash(state);
    }
}

/// The stand-in for NCCL, by its name.
pub(crate) const NCCL: &str = "libnccl.so.2";

/// The directory of the stand-in library, by the hash of its sources.
pub(crate) fn emulator_directory() -> PathBuf {
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

/// The files of the stand-ins for the driver and for cuBLASLt.
pub fn library_files() -> [PathBuf; 2] {
    ["libcuda.so", "libcublasLt.so"].map(|name| emulator_directory().join(name))
}

/// The stand-in for NCCL.
pub fn nccl_file() -> PathBuf {
    emulator_directory().join(NCCL)
}

/// The source of a file with a fault planted in it, at the first such place. Fails if there is none.
fn planted(plant: &Plant) -> String {
    let source = std::fs::read_to_string(sources("cu").join(plant.file)).expect("the source can be read");
    assert!(source.contains(plant.text), "{plant:?}: no such text");
    source.replacen(plant.text, plant.instead, 1)
}

/// A directory with the kernels of this variant, as shared objects under the names of cubins.
pub(crate) fn modules(variant: Variant) -> PathBuf {
    if let Some(home) = gpu_check() {
        assert!(variant.plant.is_none(), "faults are planted where kernels can be built");
        return home.join("emulated/kernels");
    }
    // Where a fault is planted, all other modules are as they should be.
    let faultless = variant.plant.map(|_| modules(Variant { plant: None, ..variant }));
    // One at a time: two tests may want the same variant.
    static BUILDING: Mutex<()> = Mutex::new(());
    let _alone = BUILDING.lock().unwrap_or_else(|e| e.into_inner());
    let mut state = DefaultHasher::new();
    emulator_directory().hash(&mut state);
    variant.hash(&mut state);
    // How kernels are compiled and faults planted.
    include_str!("objects.rs").hash(&mut state);
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
    let link = |to: &Path, name: String| {
        if !directory.join(&name).exists() {
            std::os::unix::fs::symlink(to, directory.join(&name)).expect("a link to a module");
        }
    };
    for (file, _) in MODULES.iter().filter(|(file, _)| !wanted(file)) {
        let name = object_name(file);
        link(&faultless.as_ref().expect("a fault is planted").join(&name), name);
    }
    // For a device that says to be another one.
    for (file, _) in MODULES {
        link(&directory.join(object_name(file)), name_for(file, HOPPER));
    }
    directory
}

/// Compute capabilities of the stand-in device: what it has, and what tests of Hopper's kernels give it.
pub(crate) const AMPERE: (i32, i32) = (8, 0);
pub(crate) const HOPPER: (i32, i32) = (9, 0);

/// The name under which a device of this compute capability looks for a module.
fn name_for(file: &str, capability: (i32, i32)) -> String {
    file_name(file.trim_end_matches(".cu"), &architecture(capability), 12)
        .expect("it is in the list of modules")
}

/// The name under which the stand-in device looks for a module.
pub(crate) fn object_name(file: &str) -> String {
    name_for(file, AMPERE)
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
            if let (true, Some(name)) = (path.is_file() && !path.is_symlink(), path.file_name()) {
                std::fs::copy(&path, to.join(name)).expect("a part can be copied");
            }
        }
    };
    copy_all(emulator_directory(), to);
    copy_all(modules(Variant::PLAIN), &kernels);
}
