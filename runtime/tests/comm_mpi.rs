//! Ranks under MPI keep the contract of `Comm`.
//!
//! Started by `cargo test --features mpi`, this program starts itself again under
//! `mpirun`, with 2 and 3 ranks; there, it exercises.

// Tests fail by panicking.
#![allow(clippy::unwrap_used)]

mod contract;

use gradtx_runtime::comm::{Comm, Mpi};
use std::process::{Command, ExitCode, Output};

/// Set for a run in which the last rank panics while the others wait for it.
const PANIC: &str = "GRADTX_TEST_PANIC";

fn main() -> ExitCode {
    if std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some() || std::env::var_os("PMI_SIZE").is_some() {
        return rank();
    }
    for size in [2, 3] {
        let output = mpirun(size, false);
        let text = String::from_utf8_lossy(&output.stdout);
        let done = text.matches(&format!("of {size} is done")).count();
        if !output.status.success() || done != size {
            eprintln!("mpirun -n {size} failed: {text}{}", String::from_utf8_lossy(&output.stderr));
            return ExitCode::FAILURE;
        }
        println!("{size} ranks: ok");
    }
    // The whole job must end; a rank that only unwound would leave the others waiting.
    let output = mpirun(3, true);
    if output.status.success() || !String::from_utf8_lossy(&output.stderr).contains("on purpose") {
        eprintln!("a panic did not end the job with an error");
        return ExitCode::FAILURE;
    }
    println!("panic in one of 3 ranks: ok");
    ExitCode::SUCCESS
}

/// What each process under `mpirun` does.
fn rank() -> ExitCode {
    let comm = Mpi::init().unwrap();
    if std::env::var_os(PANIC).is_some() {
        if comm.rank() + 1 == comm.size() {
            panic!("on purpose");
        }
        comm.barrier().unwrap();
    }
    contract::exercise(&comm);
    println!("rank {} of {} is done", comm.rank(), comm.size());
    ExitCode::SUCCESS
}

fn mpirun(size: usize, panic: bool) -> Output {
    let mut command = Command::new("mpirun");
    command
        .args(["-n", &size.to_string()])
        .arg(std::env::current_exe().unwrap())
        // A container's root user, and fewer cores than ranks.
        .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
        .envs([("OMPI_MCA_rmaps_base_oversubscribe", "1"), ("OMPI_MCA_mpi_yield_when_idle", "1")])
        .env("OMPI_MCA_hwloc_base_binding_policy", "none");
    if panic {
        command.env(PANIC, "1");
    }
    command.output().expect("mpirun is installed where this test is asked for")
}
