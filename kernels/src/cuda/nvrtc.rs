//! NVIDIA's run-time compiler, found at run time: from CUDA source to a cubin.
//!
//! The library is loaded by name, so neither a toolkit nor its headers are needed to build
//! gradtx. `GRADTX_NVRTC` names the file where it would not be found; a library that is loaded by
//! another name would be another one, so this does not go through the bindings' own search.

use super::library::{candidates, first_usable, loader_says};
use crate::{Error, Result};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr;

/// Names that the dynamic loader is asked for: current toolkits, then development links.
const NAMES: [&str; 3] = ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"];

type Program = *mut c_void;
type Status = c_int;

/// The compiler's functions that are used here.
struct Api {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    log: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    error: unsafe extern "C" fn(Status) -> *const c_char,
    /// Holds the functions above.
    _library: Library,
}

/// What came out of the compiler.
#[derive(Debug)]
pub struct Compiled {
    /// The device code.
    pub cubin: Vec<u8>,
    /// What the compiler and the assembler said: registers and memory of every kernel.
    pub log: String,
    /// The compiler's version, major and minor.
    pub version: (i32, i32),
}

impl Api {
    /// The first compiler that is of this major version of CUDA or an older one, where one is given.
    fn load(newest: Option<i32>) -> Result<Self> {
        let named = std::env::var_os("GRADTX_NVRTC").map(|path| vec![path]);
        let files = named.unwrap_or_else(|| candidates(&NAMES));
        let accept = |library| {
            let api = Self::bind(library)?;
            let (major, minor) = api.number().map_err(|e| e.to_string())?;
            match newest.filter(|newest| major > *newest) {
                None => Ok(api),
                Some(newest) => {
                    Err(format!("compiles for CUDA {major}.{minor}, and the driver is for {newest}"))
                }
            }
        };
        first_usable(&files, accept).map_err(|why| {
            let why = format!("{why}. GRADTX_NVRTC=/path/to/libnvrtc.so.12 names the library");
            Error::Unavailable { what: "the CUDA compiler (NVRTC)", why }
        })
    }

    fn bind(library: Library) -> std::result::Result<Self, String> {
        fn get<F: Copy>(library: &Library, name: &CStr) -> std::result::Result<F, String> {
            // SAFETY: the types above are those of the compiler's documented interface.
            let symbol = unsafe { library.get::<F>(name.to_bytes_with_nul()) };
            symbol.map(|f| *f).map_err(|e| loader_says(&e))
        }
        Ok(Self {
            version: get(&library, c"nvrtcVersion")?,
            create: get(&library, c"nvrtcCreateProgram")?,
            compile: get(&library, c"nvrtcCompileProgram")?,
            cubin_size: get(&library, c"nvrtcGetCUBINSize")?,
            cubin: get(&library, c"nvrtcGetCUBIN")?,
            log_size: get(&library, c"nvrtcGetProgramLogSize")?,
            log: get(&library, c"nvrtcGetProgramLog")?,
            destroy: get(&library, c"nvrtcDestroyProgram")?,
            error: get(&library, c"nvrtcGetErrorString")?,
            _library: library,
        })
    }

    /// Version, major and minor.
    fn number(&self) -> Result<(i32, i32)> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two numbers are written.
        self.check("tell its version", unsafe { (self.version)(&mut major, &mut minor) })?;
        Ok((major, minor))
    }

    /// Fails with the compiler's own words.
    fn check(&self, what: &str, status: Status) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: returns a string that is never freed, for any number.
        let why = unsafe { CStr::from_ptr((self.error)(status)) };
        Err(Error::Driver { what: what.into(), why: why.to_string_lossy().into_owned() })
    }
}

/// A program of the compiler; given back when dropped.
struct Source<'a> {
    api: &'a Api,
    program: Program,
}

impl Drop for Source<'_> {
    fn drop(&mut self) {
        // SAFETY: created by this library and destroyed once. Nothing can be done about a failure.
        let _ = unsafe { (self.api.destroy)(&mut self.program) };
    }
}

impl Source<'_> {
    /// A text or binary of the program: asks for its size, then for its bytes.
    fn bytes(
        &self,
        what: &str,
        size: unsafe extern "C" fn(Program, *mut usize) -> Status,
        get: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    ) -> Result<Vec<u8>> {
        let mut len = 0;
        // SAFETY: the program is alive; one number is written.
        self.api.check(what, unsafe { size(self.program, &mut len) })?;
        let mut bytes = vec![0u8; len];
        // SAFETY: as many bytes are written as the compiler has asked for.
        self.api.check(what, unsafe { get(self.program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|e| Error::Driver { what: "read CUDA source".into(), why: e.to_string() })
}

/// Compiles `source` (called `name` in messages) with these headers, by name and text. The compiler is the
/// first that there is, or that is of no newer major version of CUDA than `newest`.
///
/// # Errors
/// [`Error::Unavailable`] without the compiler; [`Error::Driver`] with its log if it refuses the source.
pub fn compile(
    name: &str,
    source: &str,
    headers: &[(&str, &str)],
    options: &[String],
    newest: Option<i32>,
) -> Result<Compiled> {
    let api = Api::load(newest)?;
    let version = api.number()?;
    let (source, title) = (c_string(source)?, c_string(name)?);
    let texts = headers.iter().map(|h| c_string(h.1)).collect::<Result<Vec<_>>>()?;
    let titles = headers.iter().map(|h| c_string(h.0)).collect::<Result<Vec<_>>>()?;
    let options = options.iter().map(|o| c_string(o)).collect::<Result<Vec<_>>>()?;
    let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
    let (texts, titles, options) = (pointers(&texts), pointers(&titles), pointers(&options));

    let mut program = ptr::null_mut();
    let count = texts.len() as c_int;
    // SAFETY: all strings end with a zero byte and live until the end of this function.
    let status = unsafe {
        (api.create)(&mut program, source.as_ptr(), title.as_ptr(), count, texts.as_ptr(), titles.as_ptr())
    };
    api.check(&format!("create a program from {name}"), status)?;
    let source = Source { api: &api, program };
    // SAFETY: as above.
    let status = unsafe { (api.compile)(program, options.len() as c_int, options.as_ptr()) };
    let log = source.bytes("tell what the compiler said", api.log_size, api.log)?;
    let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_string();
    api.check(&format!("compile {name}"), status).map_err(|e| match e {
        Error::Driver { what, why } => Error::Driver { what, why: format!("{why}\n{log}") },
        other => other,
    })?;
    let cubin = source.bytes(&format!("assemble {name}"), api.cubin_size, api.cubin)?;
    Ok(Compiled { cubin, log, version })
}
