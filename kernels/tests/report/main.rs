//! The committed `kernels/REPORT.md`: made from the sources that there are, no hot kernel in local memory, and tensor cores where
//! they are meant.

use gradtx_kernels::cuda::cubin::{ARCHITECTURES, MODULES, file_name};
use std::collections::BTreeMap;

fn report() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/REPORT.md");
    std::fs::read_to_string(path).expect("the report is there")
}

/// Cubins of today's sources that the report does not name.
fn not_in(report: &str) -> Vec<String> {
    let version =
        report.split_once("NVRTC ").and_then(|(_, rest)| rest.split_once('.')).expect("a version").0;
    let major: i32 = version.parse().expect("a number");
    let name = |file: &str, architecture: &str| {
        file_name(file.trim_end_matches(".cu"), architecture, major).expect("there is such a module")
    };
    let all = MODULES.iter().flat_map(|(file, _)| ARCHITECTURES.map(|architecture| name(file, architecture)));
    all.filter(|name| !report.contains(&format!("* `{name}`"))).collect()
}

#[test]
fn report_is_of_these_sources() {
    let report = report();
    let missing = not_in(&report);
    assert!(missing.is_empty(), "run `make kernels-report`: not of these sources: {missing:?}");
    let (file, _) = MODULES[0];
    let name = file_name(file.trim_end_matches(".cu"), ARCHITECTURES[0], 12).expect("there is such a module");
    assert_eq!(not_in(&report.replace(&name, "an older one")), [name]);
}

/// What is wrong with the instructions of the hot kernels, by kernel and architecture.
fn faults(report: &str) -> Vec<String> {
    let section = report.split_once("## Occupancy and instructions").expect("the section is there").1;
    let section = section.split_once("\n## ").map_or(section, |(section, _)| section);
    let mut rows = section.lines().filter(|line| line.starts_with('|')).map(cells);
    let header = rows.next().expect("a header");
    rows.skip(1).flat_map(|row| of_kernel(&header.iter().copied().zip(row).collect())).collect()
}

fn cells(line: &str) -> Vec<&str> {
    line.trim_matches('|').split('|').map(str::trim).collect()
}

fn of_kernel(row: &BTreeMap<&str, &str>) -> Vec<String> {
    let (module, kernel, architecture) = (row["module"], row["kernel"], row["architecture"]);
    let count = |class: &str| row[class].parse::<u32>().ok();
    let mut faults = vec![];
    let mut expect = |class: &str, is_right: fn(u32) -> bool| {
        if !count(class).is_some_and(is_right) {
            faults.push(format!("{kernel} {architecture}: {class}: {}", row[class]));
        }
    };
    expect("local", |n| n == 0);
    match module {
        "flash_hopper" => expect("HGMMA", |n| n > 0),
        "flash" | "gemm" | "decode" | "t5_tiles" => expect("HMMA", |n| n > 0),
        // What is bound by memory moves 16 bytes at a time.
        "activation" | "adamw" | "rmsnorm" => expect("LDG 16", |n| n > 0),
        _ => {}
    }
    if module == "flash" || module == "gemm" {
        expect("LDSM", |n| n > 0);
    }
    faults
}

#[test]
fn hot_kernels_have_the_instructions_meant() {
    let report = report();
    let found = faults(&report);
    assert!(found.is_empty(), "{found:#?}");
    // A kernel in local memory, one without tensor cores, and one that was not disassembled.
    let row = |kernel: &str| {
        report.lines().rfind(|line| line.contains(&format!("| {kernel} | sm_80 |"))).expect(kernel)
    };
    let changed = |kernel: &str, column: usize, to: &str| {
        let mut cells = cells(row(kernel));
        cells[column] = to;
        faults(&report.replace(row(kernel), &format!("| {} |", cells.join(" | "))))
    };
    let columns = cells(row("flash_forward_128")).len();
    assert_eq!(changed("adamw_bf16", columns - 1, "2"), ["adamw_bf16 sm_80: local: 2"]);
    assert_eq!(changed("flash_forward_128", 7, "0"), ["flash_forward_128 sm_80: HMMA: 0"]);
    assert_eq!(changed("silu_forward_bf16", columns - 1, "not disassembled").len(), 1);
}
