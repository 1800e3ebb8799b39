//! Compiles every module of kernels for every architecture that is built ahead of time, into
//! a directory; prints what each kernel uses of the device, as a table. Spills are errors.
//!
//! `cubins <directory> [<report.md>]`. A program built with `GRADTX_CUBINS=<directory>` has
//! the cubins in it. Needs NVRTC, but no GPU and no driver.

use gradtx_kernels::cuda::cubin::{ARCHITECTURES, MODULES, compile_into};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

/// What the assembler says of one kernel on one architecture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Usage {
    registers: u32,
    /// Bytes of declared shared memory.
    shared: u32,
    /// Bytes of stack.
    stack: u32,
    /// Bytes stored and loaded because registers ran out.
    spilled: u32,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (Some(directory), true) = (arguments.first(), arguments.len() <= 2) else {
        eprintln!("usage: cubins <directory> [<report.md>]");
        return ExitCode::from(2);
    };
    match report(Path::new(directory)) {
        Ok(text) => match arguments.get(1).map(|path| std::fs::write(path, &text)) {
            Some(Err(e)) => fail(&e),
            Some(Ok(())) | None => {
                print!("{text}");
                ExitCode::SUCCESS
            }
        },
        Err(e) => fail(&e),
    }
}

fn fail(e: &dyn std::error::Error) -> ExitCode {
    eprintln!("cubins: {e}");
    ExitCode::FAILURE
}

/// Compiles everything; the table.
fn report(directory: &Path) -> gradtx_kernels::Result<String> {
    let mut rows: BTreeMap<(String, String), [Usage; ARCHITECTURES.len()]> = BTreeMap::new();
    let mut version = (0, 0);
    for (file, _) in MODULES {
        let module = file.trim_end_matches(".cu");
        for (column, architecture) in ARCHITECTURES.iter().enumerate() {
            let (path, compiled) = compile_into(directory, module, architecture)?;
            eprintln!("{}: {} bytes", path.display(), compiled.cubin.len());
            version = compiled.version;
            for (kernel, usage) in usages(&compiled.log) {
                rows.entry((module.to_string(), kernel)).or_default()[column] = usage;
            }
        }
    }
    Ok(table(&rows, version))
}

fn table(rows: &BTreeMap<(String, String), [Usage; ARCHITECTURES.len()]>, version: (i32, i32)) -> String {
    let mut text = String::from("# What the kernels use of the device\n\n");
    let add = "writing to a string";
    let (major, minor) = version;
    writeln!(
        text,
        "Written by `make kernels-report`, with NVRTC {major}.{minor}. For each architecture: registers"
    )
    .expect(add);
    writeln!(
        text,
        "per thread, bytes of declared shared memory per block (what a launch adds is not in it),"
    )
    .expect(add);
    writeln!(text, "bytes of stack, bytes spilled (an error).\n").expect(add);
    let architectures = ARCHITECTURES.map(|a| format!("{a} reg | shared | stack | spill")).join(" | ");
    writeln!(text, "| module | kernel | {architectures} |").expect(add);
    writeln!(text, "|---|---|{}", "--:|".repeat(4 * ARCHITECTURES.len())).expect(add);
    for ((module, kernel), usages) in rows {
        write!(text, "| {module} | {kernel} |").expect(add);
        for u in usages {
            write!(text, " {} | {} | {} | {} |", u.registers, u.shared, u.stack, u.spilled).expect(add);
        }
        text.push('\n');
    }
    text
}

/// Reads the assembler's report: per kernel one line that names it, one of stack and spills,
/// and one of registers and memory.
fn usages(log: &str) -> Vec<(String, Usage)> {
    let mut found: Vec<(String, Usage)> = Vec::new();
    for line in log.lines() {
        if let Some(name) = line.split("Function properties for ").nth(1) {
            found.push((name.trim().to_string(), Usage::default()));
        }
        let Some((_, usage)) = found.last_mut() else { continue };
        if line.contains("bytes stack frame") {
            usage.stack = number_before(line, " bytes stack frame");
            let (stores, loads) =
                (number_before(line, " bytes spill stores"), number_before(line, " bytes spill loads"));
            usage.spilled = stores + loads;
        }
        if line.contains("Used ") {
            usage.registers = number_before(line, " registers");
            usage.shared = number_before(line, " bytes smem");
        }
    }
    found
}

/// The number that stands before these words, 0 if they are not there.
fn number_before(line: &str, words: &str) -> u32 {
    let before = line.split(words).next().filter(|before| before.len() < line.len());
    let digits = before.and_then(|b| b.rsplit(|c: char| !c.is_ascii_digit()).next());
    digits.and_then(|d| d.parse().ok()).unwrap_or(0)
}
