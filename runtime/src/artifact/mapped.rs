//! [`Content`]: the bytes of a file, in own memory or mapped, and what happens when a mapped
//! file shrinks.
//!
//! Reading a page of a mapped file that is no longer there raises SIGBUS, which ends the
//! process without a word. So what is small is read into own memory, and while anything is
//! mapped, a handler of that signal names the file and ends the process with exit code 1.

use super::open_file;
use crate::{Error, Result};
use memmap2::Mmap;
use std::cell::UnsafeCell;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, PoisonError};

/// Files of at most so many bytes are read into own memory.
const OWNED_BYTES: u64 = 64 << 20;

/// The bytes of a regular file that is not empty.
#[derive(Debug)]
pub(super) enum Content {
    /// Read: nothing that happens to the file changes them.
    Owned(Vec<u8>),
    /// Mapped, under the handler's guard.
    Mapped(Guarded),
}

impl Content {
    /// Reads a small file, maps a large one.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = open_file(path)?;
        let len = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
        if len > OWNED_BYTES {
            return Self::map_file(path, &file);
        }
        let mut bytes = Vec::with_capacity(len as usize);
        (&file).take(len + 1).read_to_end(&mut bytes).map_err(|e| Error::io("read", path, e))?;
        if bytes.len() as u64 != len {
            let why =
                format!("its size changed from {len} bytes while it was read; another program writes it");
            return Err(Error::file(path, why));
        }
        Ok(Self::Owned(bytes))
    }

    /// Maps a file of any size: for files that are open in large numbers.
    pub(super) fn map(path: &Path) -> Result<Self> {
        Self::map_file(path, &open_file(path)?)
    }

    fn map_file(path: &Path, file: &std::fs::File) -> Result<Self> {
        // SAFETY: the map is read-only. Bytes that another program changes are wrong values, never
        // memory errors, since only plain numbers are read from them; pages that disappear end
        // the process through the handler.
        let map = unsafe { Mmap::map(file) }.map_err(|e| Error::io("map", path, e))?;
        Ok(Self::Mapped(Guarded::new(map, path)))
    }
}

impl std::ops::Deref for Content {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Owned(bytes) => bytes,
            Self::Mapped(guarded) => &guarded.map,
        }
    }
}

/// A map whose range the handler knows.
#[derive(Debug)]
pub(super) struct Guarded {
    /// Unmapped by [`Drop`] of the field, after the range was released.
    map: Mmap,
    range: &'static Range,
}

impl Guarded {
    fn new(map: Mmap, path: &Path) -> Self {
        static INSTALLED: Once = Once::new();
        INSTALLED.call_once(install);
        let range = Range::reserve(map.as_ptr() as usize, map.len(), path);
        Self { map, range }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.range.end.store(0, Ordering::Release);
    }
}

/// Bytes of a path that a message shows: its end.
const SHOWN: usize = 240;

/// A mapped range, in a list that only grows: what is released is used again.
struct Range {
    start: AtomicUsize,
    /// 0 while the entry is free.
    end: AtomicUsize,
    /// The end of the file's path, and its length. Written only while the entry is free.
    path: UnsafeCell<([u8; SHOWN], usize)>,
    next: *const Range,
}

// SAFETY: `path` is written under WRITING while `end` is 0, and read by the handler only where a
// fault lies inside the range, which is mapped then and so not free. `next` never changes.
unsafe impl Sync for Range {}
// SAFETY: as above; nothing in it belongs to a thread.
unsafe impl Send for Range {}

impl std::fmt::Debug for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [start, end] = [&self.start, &self.end].map(|at| at.load(Ordering::Relaxed));
        write!(f, "{start:#x}..{end:#x}")
    }
}

static RANGES: AtomicPtr<Range> = AtomicPtr::new(null_mut());
static WRITING: Mutex<()> = Mutex::new(());

impl Range {
    fn reserve(start: usize, len: usize, path: &Path) -> &'static Self {
        let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        let free = Self::all().find(|range| range.end.load(Ordering::Acquire) == 0);
        let range = free.unwrap_or_else(|| {
            let next = RANGES.load(Ordering::Acquire);
            let new = Box::leak(Box::new(Self {
                start: AtomicUsize::new(0),
                end: AtomicUsize::new(0),
                path: UnsafeCell::new(([0; SHOWN], 0)),
                next,
            }));
            RANGES.store(new, Ordering::Release);
            new
        });
        let bytes = path.as_os_str().as_bytes();
        let shown = &bytes[bytes.len().saturating_sub(SHOWN)..];
        // SAFETY: the entry is free and WRITING is held, so nobody reads or writes `path` now.
        let (to, len_of_path) = unsafe { &mut *range.path.get() };
        to[..shown.len()].copy_from_slice(shown);
        // Control characters would reach the terminal.
        to.iter_mut().filter(|byte| byte.is_ascii_control()).for_each(|byte| *byte = b'?');
        *len_of_path = shown.len();
        range.start.store(start, Ordering::Release);
        range.end.store(start + len, Ordering::Release);
        range
    }

    fn all() -> impl Iterator<Item = &'static Self> {
        let mut at = RANGES.load(Ordering::Acquire).cast_const();
        std::iter::from_fn(move || {
            // SAFETY: the list holds entries that are never freed, and null at its end.
            let range = unsafe { at.as_ref() }?;
            at = range.next;
            Some(range)
        })
    }
}

/// What handled the signal before: Rust's own handler of stack overflows, or MPI's.
static BEFORE: Before = Before(UnsafeCell::new(None));

struct Before(UnsafeCell<Option<libc::sigaction>>);

// SAFETY: written once by `install`, before the handler that reads it can run.
unsafe impl Sync for Before {}

fn install() {
    // SAFETY: `sigaction` gets pointers to initialised structures. An error leaves the signal as
    // it was, which is what there would be without this handler.
    unsafe {
        let mut before: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut before) != 0 {
            return;
        }
        *BEFORE.0.get() = Some(before);
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(_, _, _) = on_bus_error;
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &action, null_mut());
    }
}

/// Only what is safe in a handler of signals: reading atomics, `write`, `_exit`, `sigaction`.
extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system gives a valid `info` to a handler with SA_SIGINFO.
    let at = unsafe { (*info).si_addr() } as usize;
    let is_inside = |range: &&Range| {
        (range.start.load(Ordering::Acquire)..range.end.load(Ordering::Acquire)).contains(&at)
    };
    if let Some(range) = Range::all().find(is_inside) {
        // SAFETY: a fault inside the range: it is mapped, so its path is not being written.
        let (path, len) = unsafe { &*range.path.get() };
        say(b"error: ");
        say(&path[..*len]);
        say(b": can no longer be read: it was truncated while in use, or its file system failed\n");
        // SAFETY: ends the process without running anything else. MPI starters end the other ranks.
        unsafe { libc::_exit(1) }
    }
    // SAFETY: `BEFORE` was written before this handler was installed. A handler of another kind than
    // a function is put back, and the access that failed then fails again under it.
    unsafe {
        match &*BEFORE.0.get() {
            Some(before) if ![libc::SIG_DFL, libc::SIG_IGN].contains(&before.sa_sigaction) => {
                if before.sa_flags & libc::SA_SIGINFO != 0 {
                    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                        std::mem::transmute(before.sa_sigaction);
                    handler(signal, info, context);
                } else {
                    let handler: extern "C" fn(libc::c_int) = std::mem::transmute(before.sa_sigaction);
                    handler(signal);
                }
            }
            _ => {
                libc::signal(libc::SIGBUS, libc::SIG_DFL);
            }
        }
    }
}

fn say(bytes: &[u8]) {
    // SAFETY: the bytes are initialised; a standard error that is closed cannot be helped.
    unsafe { libc::write(libc::STDERR_FILENO, bytes.as_ptr().cast(), bytes.len()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_files_are_owned_and_ranges_are_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, [7; 9000]).unwrap();
        let content = Content::open(&path).unwrap();
        assert!(matches!(content, Content::Owned(_)));
        std::fs::File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        assert_eq!(&content[..], [7; 9000], "what was read stays");
        std::fs::write(&path, [8; 9000]).unwrap();
        let map = Content::map(&path).unwrap();
        let Content::Mapped(guarded) = &map else { panic!("a map was asked for") };
        let start = map.as_ptr() as usize;
        assert_eq!(guarded.range.start.load(Ordering::Relaxed), start);
        assert_eq!(guarded.range.end.load(Ordering::Relaxed), start + 9000);
        let before = Range::all().count();
        drop(map);
        let again = Content::map(&path).unwrap();
        assert!(Range::all().count() <= before + 1, "entries are used again");
        assert_eq!(again[8999], 8);
    }
    /// The handler ends the process, so the access is in a child: this test again.
    #[test]
    fn shrunk_files_are_named_and_end_with_code_1() {
        const CHILD: &str = "GRADTX_TEST_OF_A_SHRINKING_FILE";
        if let Some(path) = std::env::var_os(CHILD) {
            let path = Path::new(&path);
            let content = Content::map(path).unwrap();
            std::fs::File::options().write(true).open(path).unwrap().set_len(10).unwrap();
            // Beyond the only page that is left.
            let value = std::hint::black_box(content[9_000_000]);
            panic!("{value} was read from a page that is not there");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shard.safetensors");
        std::fs::write(&path, vec![1; 10_000_000]).unwrap();
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "artifact::mapped::tests::shrunk_files_are_named_and_end_with_code_1"])
            .arg("--nocapture")
            .env(CHILD, &path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("shard.safetensors: can no longer be read"), "{said}");
    }
}
