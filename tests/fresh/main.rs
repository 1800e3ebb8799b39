//! `.ci/setup` on pretended machines: what it finds is what the build would use, what is missing
//! is named with its packages before anything is compiled, and the build continues where it can.
//! Real root directories: `make fresh`.

#![allow(clippy::unwrap_used)]

mod libclang;
mod machine;
mod mpi;
mod systems;

use machine::Machine;

const NEEDED: &str = "setup: error: nothing can be built without";

#[test]
fn a_complete_machine_builds_everything() {
    let setup = Machine::complete().setup().expect(0, &["ready: Rust 1.95.0, g++, Pretended MPI v1.0"]);
    assert_eq!(setup.makefile.lines().count(), 2, "{}", setup.makefile);
    setup.features("mpi cuda").without("missing");
}

#[test]
fn compilers_are_needed() {
    let machine = Machine::new();
    machine.remove("g++");
    machine.setup().expect(1, &["missing: a C++17 compiler: `g++` is not on the PATH", NEEDED]);

    let machine = Machine::new();
    machine.program("cc", "#!/bin/sh\necho 'cc: fatal error: cannot execute cc1' >&2\nexit 1\n");
    machine
        .setup()
        .expect(1, &["missing: a C compiler: `cc` does not build a program", "cannot execute cc1", NEEDED]);

    // It compiles, but what it makes does not run.
    let machine = Machine::new();
    machine.program("g++", "#!/bin/sh\nwhile [ $# -gt 1 ]; do [ \"$1\" = -o ] && cp /dev/null \"$2\" && echo 'exit 3' > \"$2\" && chmod 755 \"$2\"; shift; done\n");
    machine.setup().expect(1, &["a program that `g++` built does not run", NEEDED]);
}

#[test]
fn other_cxx_compilers_are_named_to_the_build() {
    let machine = Machine::new();
    let compiler = std::fs::read_to_string(machine.path("bin/g++")).unwrap();
    machine.program("g++", "#!/bin/sh\necho 'error: no such option -std=c++17' >&2\nexit 1\n");
    machine.program("clang++", &compiler);
    let setup = machine.setup().expect(0, &["ready: Rust 1.95.0, clang++"]);
    assert!(setup.makefile.contains("export CXX := clang++\n"), "{}", setup.makefile);

    let mut machine = Machine::complete();
    machine.set("CXX", "/nowhere/c++");
    machine.setup().expect(1, &["`/nowhere/c++` is not on the PATH"]);
}

#[test]
fn a_real_cxx_compiler_builds_the_trial() {
    let machine = Machine::new();
    let path = std::env::var("PATH").unwrap();
    machine.program("g++", &format!("#!/bin/sh\nPATH='{path}' exec g++ \"$@\"\n"));
    machine.setup().expect(0, &["ready: Rust 1.95.0, g++"]);
}

#[test]
fn rust_must_be_new_enough() {
    for (rustc, cargo, what) in [
        ("1.63.0", "1.95.0", "`rustc`"),
        ("1.95.0", "1.89.0-nightly", "`cargo`"),
        ("1.9.0", "1.9.0", "is 1.9.0, and 1.90 is needed"),
    ] {
        let machine = Machine::new();
        machine.rust(rustc, cargo);
        machine.setup().expect(1, &["error: Rust 1.90 or newer is needed", what, "rustup update stable"]);
    }
    let machine = Machine::new();
    machine.rust("1.90.0", "1.100.1");
    machine.setup().expect(0, &["ready: Rust 1.100.1"]);

    let machine = Machine::new();
    machine.remove("rustc");
    machine.setup().expect(1, &["`rustc` is not on the PATH"]);
    std::fs::create_dir_all(machine.path("home/.cargo/bin")).unwrap();
    machine::write_program(&machine.path("home/.cargo/bin/rustc"), "#!/bin/sh\n");
    machine.setup().expect(1, &["`rustc` is not on the PATH, but in", ".cargo/env"]);

    // rustup without a toolchain.
    let machine = Machine::new();
    machine.program(
        "rustc",
        "#!/bin/sh\necho 'error: rustup could not choose a version of rustc to run' >&2\nexit 1\n",
    );
    machine.setup().expect(1, &["could not choose a version", "rustup default stable"]);
}

#[test]
fn nvrtc_is_optional() {
    let machine = Machine::complete();
    machine.setup().expect(0, &["NVRTC cannot be installed, `python3` is not on the PATH"]);
    machine.program("python3", "#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n");
    machine.setup().expect(0, &["NVRTC cannot be installed, python3 has no pip"]);
    machine.program(
        "python3",
        "#!/bin/sh\n[ \"$3\" != --version ] || exit 0\necho 'ERROR: No matching distribution found' >&2\nexit 1\n",
    );
    let said = ["pip could not install NVRTC (ERROR: No matching distribution found)", "ready"];
    machine.setup().expect(0, &said).features("mpi cuda");

    // A pip that works is asked, and what it installed is not installed again.
    machine.program(
        "python3",
        "#!/bin/sh\n[ \"$3\" != --version ] || exit 0\nwhile [ \"$1\" != --target ]; do shift; done\n\
         mkdir -p \"$2/nvidia/cuda_nvrtc/lib\" && touch \"$2/nvidia/cuda_nvrtc/lib/libnvrtc.so.12\"\n",
    );
    machine.setup().expect(0, &["installing NVRTC"]).without("could not");
    machine.setup().expect(0, &["ready"]).without("NVRTC");
}

#[test]
fn nvrtc_that_is_named_must_be_there() {
    let mut machine = Machine::complete();
    machine.set("GRADTX_NVRTC", "/nowhere/libnvrtc.so");
    machine.setup().expect(1, &["GRADTX_NVRTC names /nowhere/libnvrtc.so, which is no file"]);
}

#[test]
fn make_builds_what_was_found() {
    let show = "#!/bin/sh\n[ \"$1\" != --version ] || { echo 'cargo 1.95.0'; exit 0; }\necho \"$@ LIBCLANG_PATH=$LIBCLANG_PATH\"\n";
    let machine = Machine::new();
    machine.program("cargo", show);
    machine.make(&["build"]).expect(0, &["leaves out the feature `mpi`", "--features cuda -p"]);
    machine.make(&["chaos"]).expect(2, &["this needs MPI and libclang"]).without("--test chaos");
    machine.make(&["cubins"]).expect(2, &["cubins needs NVRTC"]).without("--example");
    machine.make(&["check"]).expect(0, &["no shellcheck here", "clippy", "--features cuda nvrtc"]);
    let asked = ["FEATURES=mpi cuda", "build"];
    machine
        .make(&asked)
        .expect(2, &["error: the feature `mpi` is asked for, but MPI is missing"])
        .without("--features");

    let mut machine = Machine::complete();
    machine.program("cargo", show);
    machine.set("CONDA_PREFIX", "/nowhere");
    machine.make(&["build"]).expect(0, &["--features mpi cuda -p"]);
    machine.make(&["FEATURES=cuda", "build"]).expect(0, &["--features cuda -p"]);
    machine.make(&["FEATURES=", "build"]).expect(0, &["--features  -p"]);
}
