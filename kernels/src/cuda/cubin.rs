//! Where device code comes from.
//!
//! A module is one file of `kernels/cu`; its text is part of the program. For a device of
//! some architecture its cubin is looked for, under one file name everywhere,
//!
//! 1. in the directory that `GRADTX_CUDA_CACHE` names, if it names one;
//! 2. in the program, if it was built with `GRADTX_CUBINS=<directory>` (see `make cubins`):
//!    then a machine needs nothing but the driver;
//! 3. in `gradtx/cubins` in the user's cache;
//! 4. else it is compiled by NVRTC, and put into the directory of 1 or 3.
//!
//! The name holds a hash of the source, of all it includes and of the options, so a cubin
//! can never be out of date. It also holds the major version of CUDA that the compiler is of: a driver
//! takes cubins of its own major version and of older ones, but of no newer one. So a cache on a file
//! system that machines share may be filled by a newer compiler, and each finds what its driver takes.
//!
//! Compiling for the device, not for a virtual one (PTX), is deliberate: only then are inline
//! assembly, registers and shared memory checked before a device is there. Spilled registers
//! are errors.

pub use super::nvrtc::Compiled;

use super::nvrtc;
use crate::{Error, Result};
use std::borrow::Cow;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Architectures that cubins are built for ahead of time: A100 and what runs its code, and H100.
pub const ARCHITECTURES: [&str; 2] = ["sm_80", "sm_90a"];

/// Of the major versions of CUDA whose compilers take these sources.
const OLDEST_CUDA: i32 = 12;

macro_rules! sources {
    ($($name:literal),*) => {
        &[$(($name, include_str!(concat!("../../cu/", $name)))),*]
    };
}

/// The modules: name and source.
pub const MODULES: &[(&str, &str)] = sources![
    "activation.cu",
    "adamw.cu",
    "attention.cu",
    "decode.cu",
    "dropout.cu",
    "elementwise.cu",
    "embedding.cu",
    "flash.cu",
    "flash_hopper.cu",
    "gemm.cu",
    "layernorm.cu",
    "lm_head.cu",
    "lora.cu",
    "lora_rows.cu",
    "mse.cu",
    "relu.cu",
    "residual.cu",
    "rmsnorm.cu",
    "rope.cu",
    "t5_attention.cu",
    "t5_tiles.cu"
];

/// What they may include.
const HEADERS: &[(&str, &str)] = sources![
    "gpu.cuh",
    "common.cuh",
    "packed.cuh",
    "flash.cuh",
    "lora.cuh",
    "lora_rows.cuh",
    "lora_rows_forward.cuh",
    "lora_rows_backward.cuh",
    "lora_rows_pair.cuh",
    "tiles.cuh"
];

// `EMBEDDED: &[(&str, &[u8])]`, file names and cubins: written by the build script.
include!(concat!(env!("OUT_DIR"), "/embedded_cubins.rs"));

/// The architecture whose cubins a device runs: that of its generation where there is one ahead of time.
pub fn architecture((major, minor): (i32, i32)) -> String {
    match (major, minor) {
        (8, _) => "sm_80".into(),
        (9, 0) => "sm_90a".into(),
        _ => format!("sm_{major}{minor}"),
    }
}

/// Options of the compiler; the assembler reports what kernels use and refuses spills.
fn options(architecture: &str) -> Vec<String> {
    [
        &format!("--gpu-architecture={architecture}"),
        "--std=c++17",
        // Lambdas have no place to say that they are for the device.
        "--device-as-default-execution-space",
        "--ptxas-options=-v",
        "--ptxas-options=--warn-on-spills",
        "--ptxas-options=-Werror",
    ]
    .map(String::from)
    .to_vec()
}

/// The source of a module, by the name of its file without `.cu`.
fn source(module: &str) -> Result<&'static str> {
    let named = |(file, _): &&(&str, &str)| file.strip_suffix(".cu") == Some(module);
    match MODULES.iter().find(named) {
        Some((_, text)) => Ok(text),
        None => Err(Error::Unsupported { op: "cubin", why: format!("there is no module `{module}`") }),
    }
}

/// FNV-1a, 64 bits: distinguishes versions of our own sources.
fn hash<'a>(parts: impl Iterator<Item = &'a str>) -> u64 {
    let bytes = parts.flat_map(|part| part.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |h, byte| (h ^ byte as u64).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The file name of a module's cubin for an architecture, made by a compiler of this major version of CUDA.
///
/// # Errors
/// If there is no such module.
pub fn file_name(module: &str, architecture: &str, cuda: i32) -> Result<String> {
    let options = options(architecture);
    let texts = HEADERS.iter().map(|h| h.1).chain([source(module)?]);
    let hash = hash(texts.chain(options.iter().map(String::as_str)));
    Ok(format!("{module}.{architecture}.cuda{cuda}.{hash:016x}.cubin"))
}

/// Compiles a module, with the first compiler that there is.
///
/// # Errors
/// As of the compiler: not found, or the source is refused (a spill is an error).
pub fn compile(module: &str, architecture: &str) -> Result<Compiled> {
    compile_source(&format!("{module}.cu"), source(module)?, architecture)
}

/// Compiles any source that includes no more than the modules do; `name` is for messages.
///
/// # Errors
/// As of [`compile`].
pub fn compile_source(name: &str, source: &str, architecture: &str) -> Result<Compiled> {
    nvrtc::compile(name, source, HEADERS, &options(architecture), None)
}

/// Compiles a module into a directory, if it is not there; where it is, and what the compiler said.
///
/// # Errors
/// As of [`compile`], and if the file cannot be written.
pub fn compile_into(directory: &Path, module: &str, architecture: &str) -> Result<(PathBuf, Compiled)> {
    let compiled = compile(module, architecture)?;
    let path = store(directory, module, architecture, &compiled)?;
    Ok((path, compiled))
}

/// Puts a module's cubin into a directory; where it is.
fn store(directory: &Path, module: &str, architecture: &str, compiled: &Compiled) -> Result<PathBuf> {
    let path = directory.join(file_name(module, architecture, compiled.version.0)?);
    let failed =
        |e: std::io::Error| Error::Driver { what: format!("write {}", path.display()), why: e.to_string() };
    std::fs::create_dir_all(directory).map_err(failed)?;
    // Under a name of this process first: others may compile the same.
    let temporary = directory.join(format!(".{}.{module}", std::process::id()));
    let mut file = std::fs::File::create(&temporary).map_err(failed)?;
    file.write_all(&compiled.cubin).and_then(|()| file.sync_all()).map_err(failed)?;
    std::fs::rename(&temporary, &path).map_err(failed)?;
    Ok(path)
}

/// A copy of an image that begins at a multiple of 16: the driver reads its headers where they lie.
pub(super) fn aligned(image: &[u8]) -> Vec<u128> {
    let mut copy = vec![0u128; image.len().div_ceil(size_of::<u128>())];
    bytemuck::cast_slice_mut(&mut copy)[..image.len()].copy_from_slice(image);
    copy
}

/// Places that a device takes its kernels from.
#[derive(Clone, Debug)]
pub struct Cubins {
    embedded: bool,
    /// Whether the directory goes before what is embedded.
    named: bool,
    directory: Option<PathBuf>,
}

impl Cubins {
    /// Those of a directory that the environment names, of the program, of the cache (see the module's
    /// head).
    pub fn standard() -> Self {
        let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(directory) = variable("GRADTX_CUDA_CACHE") {
            return Self { embedded: true, named: true, directory: Some(directory) };
        }
        let caches = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")));
        let directory = caches.map(|caches| caches.join("gradtx").join("cubins"));
        Self { embedded: true, named: false, directory }
    }

    /// One directory only; what is not there is compiled into it.
    pub fn directory(path: &Path) -> Self {
        Self { embedded: false, named: true, directory: Some(path.to_path_buf()) }
    }

    /// The cubin of a module, by a compiler of this major version of CUDA (the driver's) or an older one;
    /// of several the newest.
    ///
    /// # Errors
    /// If it is nowhere and cannot be compiled.
    pub(super) fn image(&self, module: &str, architecture: &str, driver: i32) -> Result<Cow<'static, [u8]>> {
        let versions = (OLDEST_CUDA..=driver).rev();
        let names = versions.map(|cuda| file_name(module, architecture, cuda)).collect::<Result<Vec<_>>>()?;
        let in_directory = || {
            let directory = self.directory.as_ref()?;
            names.iter().find_map(|name| std::fs::read(directory.join(name)).ok())
        };
        if let Some(cubin) = self.named.then(in_directory).flatten() {
            return Ok(Cow::Owned(cubin));
        }
        let embedded = |name: &String| EMBEDDED.iter().find(|(file, _)| file == name);
        if let Some((_, cubin)) = names.iter().filter(|_| self.embedded).find_map(embedded) {
            return Ok(Cow::Borrowed(cubin));
        }
        if let Some(cubin) = in_directory() {
            return Ok(Cow::Owned(cubin));
        }
        let (file, source, options) = (format!("{module}.cu"), source(module)?, options(architecture));
        let compiled = nvrtc::compile(&file, source, HEADERS, &options, Some(driver))?;
        if let Some(directory) = &self.directory {
            store(directory, module, architecture, &compiled)?;
        }
        Ok(Cow::Owned(compiled.cubin))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cubin_names_differ_by_module_architecture_content() {
        let name = |module, architecture| file_name(module, architecture, 12).unwrap();
        assert!(name("rmsnorm", "sm_80").starts_with("rmsnorm.sm_80.cuda12."));
        let hash_of = |name: &str| name.rsplit('.').nth(1).map(str::to_string);
        assert_ne!(hash_of(&name("rmsnorm", "sm_80")), hash_of(&name("adamw", "sm_80")));
        assert_ne!(hash_of(&name("rmsnorm", "sm_80")), hash_of(&name("rmsnorm", "sm_90a")));
        assert!(file_name("nothing", "sm_80", 12).is_err());
        assert_ne!(hash(["ab", "c"].into_iter()), hash(["a", "bc"].into_iter()));
    }

    /// As for the emulator, whose kernels have the names of those for a device.
    #[test]
    fn a_directory_that_is_named_goes_first() {
        let directory = std::env::temp_dir().join(format!("gradtx-cubins-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(file_name("dropout", "sm_80", 12).unwrap()), "named").unwrap();
        let cubins = Cubins { embedded: true, named: true, directory: Some(directory.clone()) };
        assert_eq!(*cubins.image("dropout", "sm_80", 12).unwrap(), *b"named");
        std::fs::remove_dir_all(directory).unwrap();
    }

    /// A cache that a newer compiler has filled too, on a machine with an older driver.
    #[test]
    fn no_driver_is_given_what_a_newer_compiler_made() {
        let directory = std::env::temp_dir().join(format!("gradtx-cubins-{}-versions", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        for cuda in [12, 13] {
            let name = file_name("dropout", "sm_80", cuda).unwrap();
            std::fs::write(directory.join(name), format!("by {cuda}")).unwrap();
        }
        let cubins = Cubins::directory(&directory);
        let found = |driver| cubins.image("dropout", "sm_80", driver).unwrap().into_owned();
        assert_eq!([12, 13, 14].map(found), [b"by 12", b"by 13", b"by 13"]);
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn images_are_copied_to_where_headers_can_be_read() {
        let bytes: Vec<u8> = (0..100).collect();
        for start in [0, 1, 8] {
            let copy = aligned(&bytes[start..]);
            assert!(copy.as_ptr().cast::<u8>().align_offset(16) == 0);
            assert_eq!(bytemuck::cast_slice::<u128, u8>(&copy)[..100 - start], bytes[start..]);
        }
    }

    #[test]
    fn devices_run_the_code_of_their_generation() {
        let names = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 1)].map(architecture);
        assert_eq!(names, ["sm_80", "sm_80", "sm_90a", "sm_100", "sm_121"]);
    }
}
