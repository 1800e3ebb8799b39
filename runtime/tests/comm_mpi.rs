//! Ranks under MPI keep the contract of `Comm`, and end together when one cannot go on.
//!
//! Started by `cargo test --features mpi`, this program starts itself again under
//! `mpirun`; there, each process plays its part of a scene.

// Tests fail by panicking.
#![allow(clippy::unwrap_used)]

mod contract;

use gradtx_runtime::comm::{Collectives, Comm, Mpi};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant, SystemTime};

/// Which scene to play, in a process under `mpirun`.
const SCENE: &str = "GRADTX_TEST_SCENE";
/// The key of random numbers.
const KEY: &str = "GRADTX_TEST_KEY";
/// Directory in which processes leave their ids.
const DIR: &str = "GRADTX_TEST_DIR";

/// All ranks must have ended so long after one has.
const SOON: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    if let Ok(scene) = std::env::var(SCENE) {
        return play(&scene);
    }
    for size in 1..=4 {
        let end = mpirun(size, "contract");
        let done = end.out.matches(&format!("of {size} is done")).count();
        assert!(end.code == Some(0) && done == size, "{size} ranks: {end:?}");
        println!("{size} rank(s) keep the contract: ok");
    }
    dying();
    wrong_use();
    ExitCode::SUCCESS
}

/// A rank dies, in several ways; the others wait for it.
fn dying() {
    for (scene, message) in [
        ("panic", "rank 2 of 3 on "),
        ("panic in a thread", "rank 2 of 3 on "),
        ("abort", "cannot go on"),
        ("kill", ""),
    ] {
        let end = mpirun(3, scene);
        let code = match scene {
            "abort" => 7,
            "kill" => 137,
            _ => 101,
        };
        assert!(end.code == Some(code), "{scene}: {end:?}");
        assert!(end.err.contains(message), "{scene}: {end:?}");
        assert!(end.took_to_die.unwrap() < SOON, "{scene}: {end:?}");
        assert!(end.alive.is_empty(), "{scene}: {end:?}");
        println!("{scene}: all ranks ended after {:?}: ok", end.took_to_die.unwrap());
    }
}

/// What callers do wrong.
fn wrong_use() {
    let end = mpirun(2, "different lengths");
    assert!(end.out.contains("rank 1 sent 8 bytes where 12 were expected"), "{end:?}");
    let end = mpirun(2, "message for nobody");
    assert!(end.code == Some(1) && end.err.contains("is not taken by anyone"), "{end:?}");

    // A world of one for each of four processes, as with another launcher's MPI.
    let mut command = Command::new(std::env::current_exe().unwrap());
    let slurm = [("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "2"), ("SLURM_STEP_NUM_TASKS", "4")];
    command.env(SCENE, "start").envs(slurm).envs(as_root());
    // Open MPI itself would look for SLURM's daemon.
    command.env("OMPI_MCA_ess", "singleton");
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    for part in ["srun started 4 processes, but MPI sees 1", "Open MPI", "--mpi=pmix"] {
        assert!(text.contains(part), "{output:?}");
    }
    println!("wrong use is told: ok");
}

/// What each process under `mpirun` does.
fn play(scene: &str) -> ExitCode {
    let mut comm = match Mpi::init() {
        Ok(comm) => comm,
        Err(error) => {
            println!("{error}");
            return ExitCode::FAILURE;
        }
    };
    let (rank, size) = (comm.rank(), comm.size());
    if let Some(dir) = std::env::var_os(DIR) {
        std::fs::write(Path::new(&dir).join(format!("rank{rank}")), std::process::id().to_string()).unwrap();
        comm.barrier().unwrap();
    }
    let last = rank + 1 == size;
    match scene {
        "contract" => {
            let key = std::env::var(KEY).unwrap().parse().unwrap();
            contract::exercise(&comm, key);
            // As if messages could hold but little.
            comm.set_limits(104, 40);
            contract::exercise(&comm, key + 1);
        }
        "different lengths" => match rank {
            0 => println!("{}", comm.gather_all(&[1; 4], &[4, 12], &mut [0; 16]).unwrap_err()),
            _ => comm.gather_all(&[1; 8], &[4, 8], &mut [0; 12]).unwrap(),
        },
        "message for nobody" if rank == 0 => comm.send(1, 0, &vec![1; 64 << 20]).unwrap(),
        "message for nobody" | "start" => {}
        scene if last => die(scene, &comm),
        _ => {
            // All that a rank may wait in.
            match rank {
                0 => comm.all_reduce_sum(&mut vec![1.0f32; 1 << 20]).unwrap(),
                _ => drop(comm.receive(Some(size - 1), 1).unwrap()),
            }
            unreachable!("the last rank is dead");
        }
    }
    println!("rank {rank} of {size} is done");
    ExitCode::SUCCESS
}

fn die(scene: &str, comm: &Mpi) {
    // The others should be waiting by now.
    std::thread::sleep(Duration::from_millis(200));
    std::fs::write(Path::new(&std::env::var_os(DIR).unwrap()).join("died"), "").unwrap();
    match scene {
        "panic" => panic!("on purpose"),
        "panic in a thread" => {
            std::thread::spawn(|| panic!("on purpose"));
            comm.barrier().unwrap();
        }
        "abort" => {
            eprintln!("cannot go on");
            comm.abort(7);
        }
        "kill" => {
            let id = std::process::id().to_string();
            Command::new("kill").args(["-9", &id]).status().unwrap();
        }
        other => panic!("there is no scene {other}"),
    }
}

/// How a job ended.
#[derive(Debug)]
struct End {
    code: Option<i32>,
    out: String,
    err: String,
    /// From the moment at which the first rank died.
    took_to_die: Option<Duration>,
    /// Ranks that still run.
    alive: Vec<PathBuf>,
}

fn as_root() -> [(&'static str, &'static str); 2] {
    // A container's only user.
    [("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]
}

fn mpirun(size: usize, scene: &str) -> End {
    let dir = tempfile::tempdir().unwrap();
    let begin = Instant::now();
    let output = Command::new("mpirun")
        .args(["-n", &size.to_string()])
        .arg(std::env::current_exe().unwrap())
        .envs(as_root())
        // Fewer cores than ranks.
        .envs([("OMPI_MCA_rmaps_base_oversubscribe", "1"), ("OMPI_MCA_mpi_yield_when_idle", "1")])
        .env("OMPI_MCA_hwloc_base_binding_policy", "none")
        .env(SCENE, scene)
        .env(KEY, contract::fresh_key().to_string())
        .env(DIR, dir.path())
        .output()
        .expect("mpirun is installed where this test is asked for");
    let died = std::fs::metadata(dir.path().join("died")).and_then(|m| m.modified());
    let took_to_die = died.ok().map(|t| SystemTime::now().duration_since(t).unwrap_or_default());
    let ids =
        (0..size).filter_map(|rank| std::fs::read_to_string(dir.path().join(format!("rank{rank}"))).ok());
    // Ended processes that nobody has waited for yet are no more than an entry.
    let runs = |path: &PathBuf| {
        let stat = std::fs::read_to_string(path.join("stat"));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    };
    let alive: Vec<PathBuf> = ids.map(|id| Path::new("/proc").join(id)).filter(runs).collect();
    println!("{scene} on {size}: {:?}", begin.elapsed());
    End {
        code: output.status.code(),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
        took_to_die,
        alive,
    }
}
