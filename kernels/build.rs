//! Puts the cubins of a directory into the program: those in `GRADTX_CUBINS`, if it is set
//! (`make cubins` fills one). Without it, kernels come from a cache or are compiled when
//! they are first needed.

use std::fmt::Write;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=GRADTX_CUBINS");
    let directory = std::env::var_os("GRADTX_CUBINS").filter(|d| !d.is_empty()).map(PathBuf::from);
    let cubins = directory.map(|d| cubins_in(&d)).unwrap_or_default();
    let mut table = String::from("/// Cubins in this program, by file name.\n");
    writeln!(table, "const EMBEDDED: &[(&str, &[u8])] = &[").expect("writing to a string");
    for path in cubins {
        let name = path.file_name().unwrap_or_default();
        writeln!(table, "    ({name:?}, include_bytes!({path:?})),").expect("writing to a string");
    }
    table.push_str("];\n");
    let out = std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    std::fs::write(Path::new(&out).join("embedded_cubins.rs"), table).expect("OUT_DIR can be written to");
}

/// Its files `*.cubin`, in order.
fn cubins_in(directory: &Path) -> Vec<PathBuf> {
    println!("cargo::rerun-if-changed={}", directory.display());
    let entries =
        std::fs::read_dir(directory).unwrap_or_else(|e| panic!("GRADTX_CUBINS={}: {e}", directory.display()));
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "cubin"))
        .map(|path| path.canonicalize().unwrap_or(path))
        .collect();
    paths.sort();
    paths
}
