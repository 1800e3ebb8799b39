//! Compiles every module of kernels for every architecture that is built ahead of time, into
//! a directory; prints what each kernel uses of the device, as a table, and of those that the time
//! goes to how many a multiprocessor holds and what instructions they have. Spills are errors.
//!
//! `cubins <directory> [<report.md>]`. A program built with `GRADTX_CUBINS=<directory>` has
//! the cubins in it. Needs NVRTC, but no GPU and no driver.

mod instructions;
mod occupancy;

use gradtx_kernels::cuda::cubin::{ARCHITECTURES, MODULES, compile_into};
use instructions::{CLASSES, Counts, LOCAL};
use occupancy::{HOT, Launch, occupancy};
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
    /// Instructions by class; none without a disassembler.
    instructions: Option<Counts>,
}

/// What is known of a module's kernels: of each on every architecture.
type Rows = BTreeMap<(String, String), [Usage; ARCHITECTURES.len()]>;

/// Names of cubins, which have the hash of what they are compiled from, by module.
type Names = BTreeMap<String, [String; ARCHITECTURES.len()]>;

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
        Err(e) => fail(e.as_ref()),
    }
}

fn fail(e: &dyn std::error::Error) -> ExitCode {
    eprintln!("cubins: {e}");
    ExitCode::FAILURE
}

/// Compiles everything; the tables.
fn report(directory: &Path) -> Result<String, Box<dyn std::error::Error>> {
    let disassembler = instructions::disassembler();
    if disassembler.is_none() {
        eprintln!("nvdisasm is not here: instructions are not counted (GRADTX_NVDISASM names it)");
    }
    let (mut rows, mut names) = (Rows::new(), Names::new());
    let mut version = (0, 0);
    for (file, _) in MODULES {
        let module = file.trim_end_matches(".cu");
        for (column, architecture) in ARCHITECTURES.iter().enumerate() {
            let (path, compiled) = compile_into(directory, module, architecture)?;
            eprintln!("{}: {} bytes", path.display(), compiled.cubin.len());
            version = compiled.version;
            let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            names.entry(module.to_string()).or_default()[column] = name;
            let is_hot = HOT.iter().any(|launch| launch.module == module);
            let counted = match disassembler.as_ref().filter(|_| is_hot) {
                Some(program) => instructions::of_cubin(program, &path)?,
                None => BTreeMap::new(),
            };
            for (kernel, usage) in usages(&compiled.log) {
                let instructions = counted.get(&kernel).copied();
                let usage = Usage { instructions, ..usage };
                rows.entry((module.to_string(), kernel)).or_default()[column] = usage;
            }
        }
    }
    check_local(&rows)?;
    Ok(table(&rows, version) + &hot_table(&rows) + &sources_table(&names))
}

fn table(rows: &Rows, version: (i32, i32)) -> String {
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

/// Of the kernels that the time of a step goes to: how many a multiprocessor holds, and their instructions.
fn hot_table(rows: &Rows) -> String {
    let classes = CLASSES.join(" | ");
    let mut text = format!(
        "\n## Occupancy and instructions\n\n\
         Of the kernels that the time of a step goes to, at the shapes of `bench kernels` (Qwen2.5-7B,\n\
         Flan-T5-Large): threads of a block, bytes of shared memory that a launch adds, blocks that a\n\
         multiprocessor holds (A100: sm_80, H100: sm_90a) and the share of its warps that they are; instructions\n\
         in the code by class (not how often they run): tensor cores (HMMA, HGMMA), f32 multiply-add, special\n\
         functions, shared memory, global memory by bytes of a thread, local memory (an error).\n\n\
         | module | kernel | architecture | threads | launch shared | blocks | occupancy | {classes} |\n\
         |---|---|---|{}\n",
        "--:|".repeat(4 + CLASSES.len())
    );
    for launch in HOT {
        let key = (launch.module.to_string(), launch.kernel.to_string());
        let usages = rows.get(&key).copied().unwrap_or_default();
        let known =
            |(architecture, usage): &(&&str, Usage)| launch.runs_on(architecture) && usage.registers > 0;
        for (architecture, usage) in ARCHITECTURES.iter().zip(usages).filter(known) {
            text.push_str(&hot_row(launch, architecture, &usage));
        }
    }
    text
}

fn hot_row(launch: &Launch, architecture: &str, usage: &Usage) -> String {
    let Launch { module, kernel, threads, shared, .. } = launch;
    let (blocks, share) = occupancy(launch, usage.registers, usage.shared, architecture);
    let counts = match &usage.instructions {
        Some(counts) => counts.map(|n| n.to_string()).join(" | "),
        None => ["not disassembled"; CLASSES.len()].join(" | "),
    };
    format!(
        "| {module} | {kernel} | {architecture} | {threads} | {shared} | {blocks} | {share} % | {counts} |\n"
    )
}

/// Fails where a kernel keeps values in local memory: arrays that are indexed by what the compiler does not know.
fn check_local(rows: &Rows) -> Result<(), String> {
    let uses = |usage: &Usage| usage.instructions.is_some_and(|counts| counts[LOCAL] > 0);
    match rows.iter().find(|(_, usages)| usages.iter().any(uses)) {
        Some(((module, kernel), _)) => Err(format!("{module}.cu: {kernel} uses local memory")),
        None => Ok(()),
    }
}

/// What the report was made from.
fn sources_table(names: &Names) -> String {
    let mut text = String::from(
        "\n## Sources\n\nThe cubins that this was read from; their names have the hash of the sources and options.\n\n",
    );
    for name in names.values().flatten() {
        text.push_str("* `");
        text.push_str(name);
        text.push_str("`\n");
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
