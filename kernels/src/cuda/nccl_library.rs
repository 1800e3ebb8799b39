//! The part of NCCL's interface that is used here, from a library that is found at run time.
//!
//! `GRADTX_NCCL` names the library where the dynamic loader would not find it; `off` means that
//! it is not to be used. NVLink SHARP, with which additions have another order in every call, is turned off
//! unless `NCCL_NVLS_ENABLE` is set ([`nccl_environment`]).

use super::library::{candidates, first_usable};
use crate::{Error, Result};
use cudarc::driver::sys;
use libloading::Library;
use std::ffi::{CStr, OsString, c_char, c_int, c_void};
use std::ptr;
use std::sync::{Once, OnceLock};
use std::time::Duration;

/// Names that the dynamic loader is asked for.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// Whether NCCL lets switches add up values (NVLink SHARP).
const NVLS: &str = "NCCL_NVLS_ENABLE";
/// Seconds that a rank waits for the others.
pub(super) const TIMEOUT: &str = "GRADTX_NCCL_TIMEOUT";
/// Unless it is set.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);
/// What helps when a group fails.
pub(super) const ADVICE: &str = "NCCL_DEBUG=WARN makes NCCL print more; GRADTX_NCCL=off does without it";

/// Bytes of the id of a group.
pub(super) const ID_BYTES: usize = 128;
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId(pub(super) [c_char; ID_BYTES]);

type Status = c_int;
pub(super) type RawComm = *mut c_void;
type RawStream = sys::CUstream;

// Numbers of NCCL's interface.
pub(super) const SUCCESS: Status = 0;
pub(super) const IN_PROGRESS: Status = 7;
pub(super) const UINT8: c_int = 1;
pub(super) const FLOAT32: c_int = 7;
pub(super) const SUM: c_int = 0;

/// The library's functions that are used here. Counts are elements of one share.
pub(super) struct Api {
    version: unsafe extern "C" fn(*mut c_int) -> Status,
    pub(super) unique_id: unsafe extern "C" fn(*mut UniqueId) -> Status,
    pub(super) init_rank: unsafe extern "C" fn(*mut RawComm, c_int, UniqueId, c_int) -> Status,
    pub(super) destroy: unsafe extern "C" fn(RawComm) -> Status,
    pub(super) abort: unsafe extern "C" fn(RawComm) -> Status,
    pub(super) async_error: unsafe extern "C" fn(RawComm, *mut Status) -> Status,
    error: unsafe extern "C" fn(Status) -> *const c_char,
    last_error: unsafe extern "C" fn(RawComm) -> *const c_char,
    pub(super) group_start: unsafe extern "C" fn() -> Status,
    pub(super) group_end: unsafe extern "C" fn() -> Status,
    pub(super) reduce:
        unsafe extern "C" fn(u64, u64, usize, c_int, c_int, c_int, RawComm, RawStream) -> Status,
    pub(super) reduce_scatter:
        unsafe extern "C" fn(u64, u64, usize, c_int, c_int, RawComm, RawStream) -> Status,
    pub(super) broadcast: unsafe extern "C" fn(u64, u64, usize, c_int, c_int, RawComm, RawStream) -> Status,
    pub(super) all_gather: unsafe extern "C" fn(u64, u64, usize, c_int, RawComm, RawStream) -> Status,
    /// Holds the functions above.
    _library: Library,
}

/// The version of the NCCL that would be used, or one sentence saying why none is.
pub fn nccl_version() -> std::result::Result<String, String> {
    nccl()?.version()
}

/// Sets what NCCL reads from the environment before it is loaded, unless the user has set it. On machines
/// with NVSwitch NCCL lets the switches add up values, in an order that differs from call to call
/// (NCCL's issues 1497 and 2360); without that, the same sums have the same bits.
///
/// A program calls this before it starts threads, which may read the environment.
pub fn nccl_environment() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if std::env::var_os(NVLS).is_none() {
            // SAFETY: Rust's own readers are locked out. The program has no other threads yet; called later,
            // by way of `nccl`, this may only meet libraries' threads that read the environment just then.
            unsafe { std::env::set_var(NVLS, "0") };
        }
    });
}

/// The time limit of waits for other ranks.
pub(super) fn timeout() -> std::result::Result<Duration, String> {
    std::env::var(TIMEOUT).map_or(Ok(DEFAULT_TIMEOUT), |text| seconds(&text))
}

fn seconds(text: &str) -> std::result::Result<Duration, String> {
    match text.trim().parse::<u32>() {
        Ok(seconds) if seconds > 0 => Ok(Duration::from_secs(seconds.into())),
        _ => Err(format!("{TIMEOUT}={text}: expected a number of seconds")),
    }
}

/// The library, which stays: threads of its own outlive the calls that start them.
pub(super) fn nccl() -> std::result::Result<&'static Api, String> {
    static NCCL: OnceLock<std::result::Result<Api, String>> = OnceLock::new();
    nccl_environment();
    NCCL.get_or_init(|| find(std::env::var_os("GRADTX_NCCL"))).as_ref().map_err(String::clone)
}

/// The library that `named` stands for: a file, none, or the first usable one of those that are found.
fn find(named: Option<OsString>) -> std::result::Result<Api, String> {
    if named.as_ref().is_some_and(|name| name == "off") {
        return Err("NCCL is turned off (GRADTX_NCCL=off)".into());
    }
    let files = named.map_or_else(|| candidates(&NAMES), |name| vec![name]);
    first_usable(&files, Api::bind)
        .map_err(|why| format!("no NCCL here: {why}. GRADTX_NCCL=/path/to/libnccl.so.2 names the library"))
}

impl Api {
    fn bind(library: Library) -> std::result::Result<Self, String> {
        fn get<F: Copy>(library: &Library, name: &CStr) -> std::result::Result<F, String> {
            // SAFETY: the types above are those of the library's documented interface.
            let symbol = unsafe { library.get::<F>(name.to_bytes_with_nul()) };
            symbol.map(|f| *f).map_err(|_| format!("this NCCL is too old, or none: it has no {name:?}"))
        }
        Ok(Self {
            version: get(&library, c"ncclGetVersion")?,
            unique_id: get(&library, c"ncclGetUniqueId")?,
            init_rank: get(&library, c"ncclCommInitRank")?,
            destroy: get(&library, c"ncclCommDestroy")?,
            abort: get(&library, c"ncclCommAbort")?,
            async_error: get(&library, c"ncclCommGetAsyncError")?,
            error: get(&library, c"ncclGetErrorString")?,
            last_error: get(&library, c"ncclGetLastError")?,
            group_start: get(&library, c"ncclGroupStart")?,
            group_end: get(&library, c"ncclGroupEnd")?,
            reduce: get(&library, c"ncclReduce")?,
            reduce_scatter: get(&library, c"ncclReduceScatter")?,
            broadcast: get(&library, c"ncclBroadcast")?,
            all_gather: get(&library, c"ncclAllGather")?,
            _library: library,
        })
    }

    pub(super) fn version(&self) -> std::result::Result<String, String> {
        let mut code = 0;
        // SAFETY: one number is written.
        let status = unsafe { (self.version)(&mut code) };
        match status {
            SUCCESS => Ok(version_text(code)),
            _ => Err(format!("NCCL does not give its version: {}", self.sentence(status, ptr::null_mut()))),
        }
    }

    /// What the library says about a failure of a call, or of a group.
    pub(super) fn sentence(&self, status: Status, comm: RawComm) -> String {
        // SAFETY: returns a string that is never freed, for any number.
        let error = unsafe { CStr::from_ptr((self.error)(status)) }.to_string_lossy();
        // SAFETY: takes no group, or one that is alive; the string holds until the next call.
        let detail = unsafe { CStr::from_ptr((self.last_error)(comm)) }.to_string_lossy();
        match detail.trim() {
            "" => error.into_owned(),
            detail => format!("{error} ({detail})"),
        }
    }

    /// Fails with the library's own words.
    pub(super) fn check(&self, what: &str, status: Status, comm: RawComm) -> Result<()> {
        match status {
            SUCCESS => Ok(()),
            _ => {
                let why = format!("{}. {ADVICE}", self.sentence(status, comm));
                Err(Error::Driver { what: what.into(), why })
            }
        }
    }
}

/// As people write it. Version 2.9 has changed how versions become numbers.
fn version_text(code: c_int) -> String {
    let (major, minor) =
        if code < 10_000 { (code / 1000, code / 100 % 10) } else { (code / 10_000, code / 100 % 100) };
    format!("{major}.{minor}.{}", code % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_in_both_ways() {
        assert_eq!([2804, 2304, 22602, 21805].map(version_text), ["2.8.4", "2.3.4", "2.26.2", "2.18.5"]);
    }

    #[test]
    fn a_time_limit_is_a_number_of_seconds() {
        assert_eq!(seconds(" 90 "), Ok(Duration::from_secs(90)));
        for text in ["0", "-1", "soon", "1.5", ""] {
            let why = seconds(text).expect_err("it is no time");
            assert!(why.contains(TIMEOUT) && why.contains(text), "{why}");
        }
    }

    #[test]
    fn unusable_libraries_are_one_sentence() {
        let why = |name: &str| find(Some(name.into())).err().expect("this is no NCCL");
        assert!(why("off").contains("turned off"), "{}", why("off"));
        let absent = why("/nowhere/libnccl.so.2");
        assert!(absent.contains("/nowhere/libnccl.so.2") && absent.contains("GRADTX_NCCL="), "{absent}");
        let other = why("libc.so.6");
        assert!(other.contains("ncclGetVersion"), "{other}");
    }
}
