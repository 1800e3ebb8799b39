//! MPI is what the crate `mpi` builds with: any implementation whose compiler compiles, and whose
//! libraries link into a program that starts.

use crate::machine::{Machine, Mpi};

const LEFT_OUT: &str = "leaves out the feature `mpi`: gradtx will work in one process";

fn with(mpi: Mpi) -> Machine {
    let machine = Machine::new();
    machine.put("good.so", "usr/lib/libclang.so.1");
    machine.mpi("mpicc", mpi);
    machine
}

#[test]
fn an_incomplete_mpi_is_left_out_with_the_reason() {
    for (mpi, reason) in [
        (Mpi::WithoutHeader, "mpi.h is not found with the flags of `mpicc`"),
        (Mpi::WithoutLibrary, "a program with the libraries of `mpicc` does not link"),
        (Mpi::Shared, "a program with the libraries of `mpicc` does not start"),
    ] {
        with(mpi).setup().expect(0, &["missing: MPI: ", reason, LEFT_OUT]).features("cuda");
    }
    with(Mpi::Whole).setup().expect(0, &[]).features("mpi cuda").without("missing");
}

#[test]
fn a_wrapper_without_its_compiler_is_no_mpi() {
    let machine = with(Mpi::Whole);
    let text = std::fs::read_to_string(machine.path("bin/mpicc")).unwrap();
    let broken = text.replace("exec cc", "echo 'mpicc: gcc: command not found' >&2; exit 127; exec cc");
    machine.program("mpicc", &broken);
    machine
        .setup()
        .expect(0, &["`mpicc` does not compile a program", "command not found", LEFT_OUT])
        .features("cuda");

    // Open MPI's wrapper without its development package.
    machine.program(
        "mpicc",
        "#!/bin/sh\necho 'Cannot open configuration file mpicc-wrapper-data.txt' >&2\nexit 243\n",
    );
    machine.setup().expect(0, &["mpi.h is not found with the flags of `mpicc`", LEFT_OUT]).features("cuda");
}

#[test]
fn the_wrapper_may_have_another_name() {
    let mut machine = Machine::new();
    machine.put("good.so", "usr/lib/libclang.so.1");
    machine.mpi("mpiicc", Mpi::Whole);
    machine.setup().expect(0, &["`mpicc` is not on the PATH", LEFT_OUT]).features("cuda");
    machine.set("MPICC", "mpiicc");
    machine.setup().expect(0, &["Pretended MPI"]).features("mpi cuda");
}

#[test]
fn pkg_config_may_know_it() {
    for (variable, package) in [(None, "mpich"), (None, "ompi"), (Some("MPI_PKG_CONFIG"), "own.pc")] {
        let mut machine = Machine::new();
        machine.put("good.so", "usr/lib/libclang.so.1");
        let flags = machine.mpi_flags(Mpi::Whole).replace("-Wl,-rpath -Wl,/nowhere", "");
        let script = format!(
            "#!/bin/sh\nfor name; do :; done\n[ \"$name\" = {package} ] || exit 1\n\
             [ \"$1\" = --exists ] || echo '{flags}'\n"
        );
        machine.program("pkg-config", &script);
        if let Some(variable) = variable {
            machine.set(variable, package);
        }
        machine.setup().expect(0, &["Pretended MPI"]).features("mpi cuda");
    }
    // Cray's: a directory that its module names; the compiler is the plain one.
    let mut machine = Machine::new();
    machine.put("good.so", "usr/lib/libclang.so.1");
    let flags = machine.mpi_flags(Mpi::Whole);
    let script = format!("#!/bin/sh\n[ \"$1\" = --exists ] || echo '{flags}'\n");
    machine.program("pkg-config", &script);
    machine.set("CRAY_MPICH_DIR", "/opt/cray/pe/mpich");
    machine.setup().expect(0, &["Pretended MPI"]).features("mpi cuda");
}

#[test]
fn features_that_are_asked_for_are_built_or_refused() {
    let mut machine = with(Mpi::WithoutLibrary);
    machine.set("FEATURES", "mpi cuda");
    let said = ["error: the feature `mpi` is asked for, but MPI is missing", "does not link"];
    let setup = machine.setup().expect(1, &said);
    assert_eq!(setup.makefile, "");

    let mut machine = Machine::new();
    machine.mpi("mpicc", Mpi::Whole);
    machine.set("FEATURES", "cuda,mpi");
    machine.setup().expect(1, &["the feature `mpi` is asked for, but libclang is missing"]);

    let mut machine = Machine::new();
    machine.set("FEATURES", "cuda");
    machine.setup().expect(0, &["ready"]).features("cuda").without("missing").without("leaves out");
}
