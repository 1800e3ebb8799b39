//! Instructions of kernels by class, from NVIDIA's disassembler where it is found.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Classes, in the order of the report's columns.
pub const CLASSES: [&str; 13] = [
    "HMMA",
    "HGMMA",
    "FFMA",
    "MUFU",
    "LDS",
    "LDSM",
    "LDG 16",
    "LDG 8",
    "LDG ≤ 4",
    "STG 16",
    "STG 8",
    "STG ≤ 4",
    "local",
];

/// The place of loads and stores of local memory among them.
pub const LOCAL: usize = CLASSES.len() - 1;

/// How many of each class.
pub type Counts = [u32; CLASSES.len()];

/// The disassembler: `GRADTX_NVDISASM`, or on the path, in the CUDA toolkit, or in a package of Python.
pub fn disassembler() -> Option<PathBuf> {
    let named = std::env::var_os("GRADTX_NVDISASM").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let toolkit = std::env::var_os("CUDA_HOME").map_or("/usr/local/cuda".into(), PathBuf::from).join("bin");
    let directories = std::env::split_paths(&path).chain([toolkit]).chain(of_python());
    named
        .into_iter()
        .chain(directories.map(|directory| directory.join("nvdisasm")))
        .find(|file| file.is_file())
}

/// Directories of programs of NVIDIA's packages.
fn of_python() -> Vec<PathBuf> {
    let script = "import glob, sysconfig; print(*glob.glob(sysconfig.get_path('purelib') + '/nvidia/*/bin'), sep='\\n')";
    let output = Command::new("python3").args(["-c", script]).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().map(PathBuf::from).collect()
}

/// Instructions of every kernel of a cubin.
///
/// # Errors
/// What the disassembler says.
pub fn of_cubin(disassembler: &Path, cubin: &Path) -> Result<BTreeMap<String, Counts>, String> {
    let failed = |why: String| format!("{} {}: {why}", disassembler.display(), cubin.display());
    let output =
        Command::new(disassembler).arg("-c").arg(cubin).output().map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_string()));
    }
    Ok(counts(&String::from_utf8_lossy(&output.stdout)))
}

/// Counts a listing: a line `.text.KERNEL:` before the instructions of each kernel, `/*ADDRESS*/ [@PREDICATE] OPCODE …`.
fn counts(listing: &str) -> BTreeMap<String, Counts> {
    let mut found: BTreeMap<String, Counts> = BTreeMap::new();
    let mut kernel = None;
    for line in listing.lines() {
        if let Some(name) = line.strip_prefix(".text.").and_then(|rest| rest.strip_suffix(':')) {
            kernel = Some(name.to_string());
        }
        let instruction = line.trim_start().strip_prefix("/*").and_then(|rest| rest.split_once("*/"));
        let (Some(kernel), Some((_, instruction))) = (&kernel, instruction) else { continue };
        let opcode = instruction.split_whitespace().find(|word| !word.starts_with('@'));
        let counts = found.entry(kernel.clone()).or_default();
        if let Some(class) = opcode.and_then(class) {
            counts[class] += 1;
        }
    }
    found
}

/// The place of an opcode's class, if it has one.
fn class(opcode: &str) -> Option<usize> {
    let mut parts = opcode.split('.');
    let name = parts.next()?;
    let width = parts.fold("≤ 4", |width, part| match part {
        "128" => "16",
        "64" => "8",
        _ => width,
    });
    let class = match name {
        "LDG" | "STG" => format!("{name} {width}"),
        "LDL" | "STL" => "local".to_string(),
        other => other.to_string(),
    };
    CLASSES.iter().position(|known| *known == class)
}
