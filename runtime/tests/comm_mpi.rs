//! Ranks under MPI keep the contract of `Comm`.
//!
//! Started by `cargo test --features mpi`, this program starts itself again under
//! `mpirun`, with 2 and 3 ranks; there, it exercises.

// Tests fail by panicking.
#![allow(clippy::unwrap_used)]

mod contract;

use gradtx_runtime::comm::{Comm, Mpi};
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    if std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some() || std::env::var_os("PMI_SIZE").is_some() {
        let comm = Mpi::init().unwrap();
        contract::exercise(&comm);
        println!("rank {} of {} is done", comm.rank(), comm.size());
        return ExitCode::SUCCESS;
    }
    let program = std::env::current_exe().unwrap();
    for size in ["2", "3"] {
        let output = Command::new("mpirun")
            .args(["-n", size])
            .arg(&program)
            // A container's root user, and fewer cores than ranks.
            .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
            .envs([("OMPI_MCA_rmaps_base_oversubscribe", "1"), ("OMPI_MCA_mpi_yield_when_idle", "1")])
            .env("OMPI_MCA_hwloc_base_binding_policy", "none")
            .output()
            .expect("mpirun is installed where this test is asked for");
        let text = String::from_utf8_lossy(&output.stdout);
        let done = text.matches(&format!("of {size} is done")).count();
        if !output.status.success() || done.to_string() != size {
            eprintln!("mpirun -n {size} failed: {text}{}", String::from_utf8_lossy(&output.stderr));
            return ExitCode::FAILURE;
        }
        println!("{size} ranks: ok");
    }
    ExitCode::SUCCESS
}
