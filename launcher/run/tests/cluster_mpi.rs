//! Ranks of a cluster learn who they are, speak with one voice, and end together.
//!
//! Started by `cargo test --features mpi`, this program starts itself again under
//! `mpirun`; there, each process plays its part of a scene.

// Tests fail by panicking.
#![allow(clippy::unwrap_used)]

use gradtx_run::cluster::{self, World};
use gradtx_run::failure::{ErrorReport, unusable};
use gradtx_run::ui::Ui;
use std::io::Write;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// Which scene to play, in a process under `mpirun`.
const SCENE: &str = "GRADTX_TEST_SCENE";

/// A job that fails must end within this time, all of mpirun's start included.
const SOON: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    if let Ok(scene) = std::env::var(SCENE) {
        if scene == "left" {
            drop(World::start().unwrap());
        }
        return ExitCode::from(cluster::run(report, |world| play(&scene, world)));
    }
    for size in 1..=4 {
        one_speaks(size);
    }
    failures();
    alone();
    ExitCode::SUCCESS
}

/// Says what went wrong; the exit code.
fn report(error: &anyhow::Error) -> u8 {
    let told = ErrorReport::from(error);
    told.print(false);
    told.code
}

/// What each process under `mpirun` does.
fn play(scene: &str, world: &World) -> anyhow::Result<()> {
    let comm = world.comm();
    let (rank, size) = (comm.rank(), comm.size());
    let last = rank + 1 == size;
    match scene {
        "well" => {
            world.agree("configuration", "the same")?;
            Ui::new("test", true, false).result(format!("{size} ranks, {} threads each", world.threads()));
        }
        "other configuration" => world.agree("configuration", if rank == 1 { "b2" } else { "a1" })?,
        "one fails" if last => return Err(unusable("nothing to train on")),
        "one fails late" if last => {
            // The others have ended their work and wait for the end of all.
            std::thread::sleep(Duration::from_millis(500));
            return Err(unusable("nothing to train on"));
        }
        "one fails late" => {}
        "all fail" => return Err(unusable("the disk is full")),
        "all but rank 0 fail" if rank > 0 => return Err(unusable("the disk is full")),
        "panic" if last => panic!("on purpose"),
        _ => {
            comm.barrier()?;
            anyhow::bail!("this cannot be reached: somebody does not come");
        }
    }
    Ok(())
}

/// Rank 0 alone is on the terminal, all are in the log.
fn one_speaks(size: usize) {
    let end = mpirun(size, "well");
    assert!(end.code == Some(0), "{end:?}");
    let lines: Vec<&str> = end.out.lines().collect();
    assert!(lines.len() == 1 && lines[0].starts_with(&format!("{size} ranks, ")), "{end:?}");
    let logged: Vec<&str> = end.err.lines().filter(|line| line.contains("all ")).collect();
    let named = |rank: usize| {
        let prefix = format!("rank {rank} on ");
        logged.iter().filter(|line| line.starts_with(&prefix)).count()
    };
    if size == 1 {
        assert!(logged.len() == 1 && logged[0].contains("DEBUG"), "{end:?}");
    } else {
        // The program and the configuration are the same.
        assert!((0..size).all(|rank| named(rank) == 2) && logged.len() == 2 * size, "{end:?}");
    }
    println!("{size} rank(s) speak with one voice: ok");
}

/// Every failure: one error, its exit code, all ranks gone.
fn failures() {
    for (scene, size, code, message) in [
        ("one fails", 3, 2, "error: rank 2 of 3 on "),
        ("one fails late", 3, 2, "error: rank 2 of 3 on "),
        ("all fail", 4, 2, "error: rank 0 of 4 on "),
        ("all but rank 0 fail", 4, 2, "error: rank 1 of 4 on "),
        ("other configuration", 3, 1, "configuration: not the same on all ranks: rank 1 (on "),
        ("panic", 3, 101, "error: rank 2 of 3 on "),
    ] {
        let end = mpirun(size, scene);
        assert!(end.code == Some(code), "{scene}: {end:?}");
        assert!(end.err.contains(message), "{scene}: {end:?}");
        assert_eq!(end.err.matches("error: ").count(), 1, "{scene}: {end:?}");
        assert!(end.took < SOON, "{scene}: {end:?}");
        println!("{scene}: one error after {:?}: ok", end.took);
    }
    // The same program, but for a byte behind its end.
    let program = std::env::current_exe().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let other = dir.path().join("other");
    std::fs::copy(&program, &other).unwrap();
    std::fs::OpenOptions::new().append(true).open(&other).unwrap().write_all(b"x").unwrap();
    let end = mpirun_these(&[(2, &program), (1, &other)], "well");
    let message = "program: not the same on all ranks: rank 2 (on ";
    assert!(end.code == Some(1) && end.err.contains(message) && end.out.is_empty(), "{end:?}");
    println!("different programs: ok");
    let end = mpirun(2, "left");
    assert!(end.code == Some(1) && end.err.contains("left its work unfinished"), "{end:?}");
}

/// Not under mpirun: no MPI, even if the program has it; and four processes of which
/// MPI is told nothing: one of them says so.
fn alone() {
    let program = std::env::current_exe().unwrap();
    let output = Command::new(&program).env(SCENE, "well").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    for rank in 0..2 {
        let output = Command::new(&program)
            .envs([(SCENE, "well"), ("SLURM_STEP_ID", "0"), ("SLURM_STEP_NUM_TASKS", "4")])
            .env("SLURM_PROCID", rank.to_string())
            .output()
            .unwrap();
        let err = String::from_utf8_lossy(&output.stderr);
        let told =
            err.contains("srun started 4 processes, but told MPI of none") && err.contains("--mpi=pmix");
        assert!(output.status.code() == Some(1) && told == (rank == 0), "{output:?}");
    }
    println!("alone: ok");
}

/// A container's only user.
const AS_ROOT: [(&str, &str); 2] = [("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")];

/// How a job ended.
#[derive(Debug)]
struct End {
    code: Option<i32>,
    out: String,
    err: String,
    took: Duration,
}

fn mpirun(size: usize, scene: &str) -> End {
    mpirun_these(&[(size, &std::env::current_exe().unwrap())], scene)
}

/// So many processes of these programs, in one world.
fn mpirun_these(programs: &[(usize, &Path)], scene: &str) -> End {
    let begin = Instant::now();
    let mut command = Command::new("mpirun");
    for (i, (size, program)) in programs.iter().enumerate() {
        command.args((i > 0).then_some(":")).args(["-n", &size.to_string()]).arg(program);
    }
    let output = command
        .envs(AS_ROOT)
        // Fewer cores than ranks.
        .envs([("OMPI_MCA_rmaps_base_oversubscribe", "1"), ("OMPI_MCA_mpi_yield_when_idle", "1")])
        .env("OMPI_MCA_hwloc_base_binding_policy", "none")
        .envs([(SCENE, scene), ("GRADTX_LOG", "debug")])
        .output()
        .expect("mpirun is installed where this test is asked for");
    End {
        code: output.status.code(),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
        took: begin.elapsed(),
    }
}
