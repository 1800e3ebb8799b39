//! NVIDIA's libraries, found at run time: where they are looked for, and in which order.
//!
//! 1. A file that the library's own variable names (`GRADTX_CUBLASLT`, `GRADTX_NCCL`,
//!    `GRADTX_NVRTC`): then no other is tried.
//! 2. What the dynamic loader finds by name.
//! 3. The directories of `GRADTX_CUDA_LIBRARIES`, separated by colons. Python's packages keep the
//!    libraries where the loader does not look (`nvidia/cublas/lib`, `nvidia/cu13/lib`).
//!
//! A machine may have several versions, and its driver may take only some of them, so candidates
//! are tried until one works.

use libloading::Library;
use std::ffi::OsString;

/// Directories beside those of the dynamic loader, separated by colons.
const DIRECTORIES: &str = "GRADTX_CUDA_LIBRARIES";

/// Where a library may be: these names for the dynamic loader, then files of further directories.
pub(super) fn candidates(names: &[&str]) -> Vec<OsString> {
    in_directories(names, &std::env::var_os(DIRECTORIES).unwrap_or_default())
}

fn in_directories(names: &[&str], directories: &OsString) -> Vec<OsString> {
    let mut all: Vec<OsString> = names.iter().map(OsString::from).collect();
    for directory in std::env::split_paths(directories).filter(|path| !path.as_os_str().is_empty()) {
        let files = names.iter().map(|name| directory.join(name));
        all.extend(files.filter(|file| file.is_file()).map(OsString::from));
    }
    all
}

/// What `accept` makes of the first candidate that it does not refuse.
///
/// # Errors
/// Why every library that could be loaded was refused; if none could, what the loader said last.
pub(super) fn first_usable<T>(
    candidates: &[OsString],
    mut accept: impl FnMut(Library) -> Result<T, String>,
) -> Result<T, String> {
    let (mut refused, mut absent) = (vec![], String::from("no name to look for"));
    for name in candidates {
        // SAFETY: loading one of NVIDIA's libraries runs nothing but its own initialisation.
        match unsafe { Library::new(name) } {
            Ok(library) => match accept(library) {
                Ok(usable) => return Ok(usable),
                Err(why) => refused.push(format!("{}: {why}", name.to_string_lossy())),
            },
            Err(e) => absent = loader_says(&e),
        }
    }
    Err(if refused.is_empty() { absent } else { refused.join("; ") })
}

/// What the dynamic loader itself says.
pub(super) fn loader_says(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or(error.to_string(), |source| source.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A library that every machine has, under another file name.
    fn file_in(directory: &std::path::Path, name: &str) -> OsString {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mut paths = maps.lines().filter_map(|line| line.split_whitespace().last());
        let library = paths.find(|path| path.contains("/libgcc_s.so")).expect("Rust's programs load it");
        let file = directory.join(name);
        std::fs::copy(library, &file).unwrap();
        file.into()
    }

    fn scratch(name: &str) -> std::path::PathBuf {
        let directory = std::env::temp_dir().join(format!("gradtx-library-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        directory
    }

    #[test]
    fn further_directories_come_after_the_loader_s_names() {
        let directory = scratch("order");
        let file = file_in(&directory, "libnone.so.13");
        let list = std::env::join_paths(["/nowhere".into(), directory.clone()]).unwrap();
        let found = in_directories(&["libnone.so.12", "libnone.so.13"], &list);
        assert_eq!(found, ["libnone.so.12".into(), "libnone.so.13".into(), file]);
        assert_eq!(in_directories(&["libnone.so.12"], &OsString::new()), ["libnone.so.12"]);
        std::fs::remove_dir_all(directory).unwrap();
    }

    /// The first is not there, the second is refused, the third is taken.
    #[test]
    fn candidates_are_tried_until_one_works() {
        let directory = scratch("tried");
        let names = ["libabsent.so".into(), file_in(&directory, "a.so"), file_in(&directory, "b.so")];
        let mut asked = 0;
        let found = first_usable(&names, |_| {
            asked += 1;
            if asked == 2 { Ok("b") } else { Err("too new for this driver".into()) }
        });
        assert_eq!(found, Ok("b"));
        let refused = first_usable(&names, |_| Err::<(), _>("too new".into())).unwrap_err();
        assert!(refused.contains("a.so: too new") && refused.contains("b.so: too new"), "{refused}");
        let absent = first_usable(&names[..1], |_| Ok(())).unwrap_err();
        assert!(absent.contains("libabsent.so"), "{absent}");
        std::fs::remove_dir_all(directory).unwrap();
    }
}
