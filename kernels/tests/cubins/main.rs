//! Device code without a device: every kernel is compiled and assembled for every architecture
//! that programs are built for. PTX alone would not do: only the assembler checks inline
//! assembly, and knows what a kernel needs of registers and shared memory.

use gradtx_kernels::cuda::cubin::{ARCHITECTURES, MODULES, compile, compile_into, compile_source, file_name};

/// Names of the kernels in the assembler's report.
fn kernels_in(log: &str) -> Vec<String> {
    let names = log.lines().filter_map(|line| line.split("Function properties for ").nth(1));
    names.map(|name| name.trim().to_string()).collect()
}

/// Compiles without spills (they are errors), into device code; and the committed report has its kernels.
#[test]
fn every_module_compiles_for_every_architecture() {
    let report = concat!(env!("CARGO_MANIFEST_DIR"), "/REPORT.md");
    let report = std::fs::read_to_string(report).expect("the report is there");
    for architecture in ARCHITECTURES {
        for (file, _) in MODULES {
            let module = file.trim_end_matches(".cu");
            let compiled = compile(module, architecture).unwrap_or_else(|e| panic!("{file}: {e}"));
            // An ELF file for a CUDA device.
            assert_eq!(compiled.cubin[..4], *b"\x7fELF", "{file}");
            assert_eq!(compiled.cubin[18..20], [190, 0], "{file}");
            let kernels = kernels_in(&compiled.log);
            assert!(!kernels.is_empty(), "{file}: no kernel in\n{}", compiled.log);
            for kernel in kernels {
                let row = format!("| {module} | {kernel} |");
                assert!(report.contains(&row), "{kernel} is not in the report: run `make kernels-report`");
            }
        }
    }
}

/// A cubin lies in its directory under the name that a device looks for, and nothing else is left there.
#[test]
fn cubins_are_put_where_they_are_looked_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let (path, compiled) = compile_into(directory.path(), "dropout", "sm_80").expect("the module compiles");
    let name = file_name("dropout", "sm_80", compiled.version.0).expect("there is such a module");
    assert_eq!(path, directory.path().join(name));
    assert_eq!(std::fs::read(&path).expect("it is there"), compiled.cubin);
    assert_eq!(std::fs::read_dir(directory.path()).expect("it can be listed").count(), 1);
    assert!(compile_into(directory.path(), "nothing", "sm_80").is_err());
}

fn refusal(source: &str, architecture: &str) -> String {
    compile_source("wrong.cu", source, architecture).expect_err("this must not compile").to_string()
}

/// More values alive than 1024 threads have registers for.
#[test]
fn spills_are_refused() {
    const SPILLS: &str = r#"
#include "common.cuh"
KERNEL LAUNCH_BOUNDS(1024, 2) spilling(float* out, const float* in, int turns) {
    float values[96];
#pragma unroll
    for (int i = 0; i < 96; i++) values[i] = in[i * 1024 + threadIdx.x];
    for (int t = 0; t < turns; t++) {
#pragma unroll
        for (int i = 0; i < 96; i++) values[i] = values[i] * values[(i * 7 + 5) % 96] + 1.f;
    }
#pragma unroll
    for (int i = 0; i < 96; i++) out[i * 1024 + threadIdx.x] = values[i];
}
"#;
    for architecture in ARCHITECTURES {
        let why = refusal(SPILLS, architecture);
        assert!(why.contains("spill"), "{why}");
    }
}

/// The assembler, not the compiler, knows that an instruction is not one.
#[test]
fn wrong_assembly_is_refused() {
    const WRONG: &str = r#"
#include "common.cuh"
KERNEL wrong(float* out) { asm volatile("ldmatrix.sync.aligned.m8n8.x5.shared.b16 {%0}, [%1];" ::"f"(out[0]), "f"(out[1])); }
"#;
    assert!(refusal(WRONG, "sm_80").contains("ptxas"), "{}", refusal(WRONG, "sm_80"));
    assert!(!refusal("KERNEL nonsense(", "sm_80").is_empty());
}
