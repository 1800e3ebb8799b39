//! Tables for the CUDA device:
//!
//! * the parameters of every kernel, from the sources in `cu/` ([`signatures`]);
//! * the cubins of a directory, put into the program: those in `GRADTX_CUBINS`, if it is set (`make cubins` fills one).
//!   Without it, kernels come from a cache or are compiled when they are first needed.

mod signatures;

use std::fmt::Write;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=cu");
    println!("cargo::rerun-if-env-changed=GRADTX_CUBINS");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    write_out("embedded_cubins.rs", &embedded_cubins());
    match signature_table() {
        Ok(table) => write_out("signatures.rs", &table),
        Err(why) => {
            println!("cargo::error={why}");
            std::process::exit(1);
        }
    }
}

fn write_out(name: &str, text: &str) {
    let out = std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    std::fs::write(Path::new(&out).join(name), text).expect("OUT_DIR can be written to");
}

fn embedded_cubins() -> String {
    let directory = std::env::var_os("GRADTX_CUBINS").filter(|d| !d.is_empty()).map(PathBuf::from);
    if let Some(directory) = &directory {
        println!("cargo::rerun-if-changed={}", directory.display());
    }
    let cubins = directory.map(|d| files_in(&d, "cubin")).unwrap_or_default();
    let mut table = String::from("/// Cubins in this program, by file name.\n");
    table.push_str("const EMBEDDED: &[(&str, &[u8])] = &[\n");
    for path in cubins {
        let name = path.file_name().unwrap_or_default();
        writeln!(table, "    ({name:?}, include_bytes!({path:?})),").expect("writing to a string");
    }
    table + "];\n"
}

fn signature_table() -> Result<String, String> {
    let mut table = String::from("/// The kernels of all modules, in the order of files and lines.\n");
    table.push_str("pub const SIGNATURES: &[Signature] = &[\n");
    for path in files_in(Path::new("cu"), "cu") {
        let module = path.file_stem().unwrap_or_default();
        for kernel in signatures::of_module(&path)? {
            let mut parameters = String::new();
            for parameter in &kernel.parameters {
                let kind = kind(parameter).ok_or_else(|| {
                    format!("kernel `{}`: no launch passes a `{}`", kernel.name, parameter.to)
                })?;
                write!(parameters, "Parameter {{ name: {:?}, kind: {kind} }}, ", parameter.name)
                    .expect("writing to a string");
            }
            let name = &kernel.name;
            writeln!(
                table,
                "    Signature {{ module: {module:?}, kernel: {name:?}, parameters: &[{parameters}] }},"
            )
            .expect("writing to a string");
        }
    }
    Ok(table + "];\n")
}

/// Its kind, as an expression of the crate.
fn kind(parameter: &signatures::Parameter) -> Option<String> {
    if !parameter.pointer {
        return match parameter.to.as_str() {
            "u32" => Some("Kind::U32".into()),
            "u64" => Some("Kind::U64".into()),
            "float" => Some("Kind::F32".into()),
            _ => None,
        };
    }
    let to = match parameter.to.as_str() {
        "float" => "F32",
        "bf16" => "Bf16",
        "u32" => "U32",
        "u64" => "U64",
        _ => return None,
    };
    let access = if parameter.constant { "Read" } else { "Write" };
    Some(format!("Kind::{access}(DType::{to})"))
}

/// The files of a directory with this extension, in order.
fn files_in(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .map(|path| path.canonicalize().unwrap_or(path))
        .collect();
    paths.sort();
    paths
}
