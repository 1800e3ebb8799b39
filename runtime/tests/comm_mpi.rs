//! Ranks under MPI keep the contract of `Comm`, and end together when one cannot continue.
//!
//! Started by `cargo test --features mpi`, this program starts itself again under
//! `mpirun`; there, each process plays its part of a scene. With GRADTX_TEST_LARGE set, more
//! is moved than MPI's 32-bit counts can report, which takes 10 GiB of memory.

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
    if std::env::var_os("GRADTX_TEST_LARGE").is_some() {
        let end = mpirun(2, "large");
        assert!(end.code == Some(0) && end.out.matches("of 2 is done").count() == 2, "{end:?}");
        println!("more than 2^31 bytes: ok");
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
        "large" => large(&comm),
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

/// Bytes above 2³¹, in what is broadcast, gathered, summed and sent between two ranks.
fn large(comm: &Mpi) {
    let n = (1 << 28) + 321;
    let value = |i: usize, rank: usize| (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ rank as u64;
    let own = || (0..n).map(|i| value(i, comm.rank())).collect::<Vec<u64>>();
    let right = |found: &[u64], want: &dyn Fn(usize) -> u64| {
        found.len() == n && found.iter().enumerate().all(|(i, x)| *x == want(i))
    };
    let mut values = own();
    comm.broadcast(1, &mut values).unwrap();
    assert!(right(&values, &|i| value(i, 1)), "broadcast");
    values = own();
    comm.all_reduce_sum(&mut values).unwrap();
    assert!(right(&values, &|i| value(i, 0).wrapping_add(value(i, 1))), "all-reduce");
    values = own();
    let (mut all, half) = (vec![0; n], [n - 10, 10]);
    let part = if comm.rank() == 0 { &values[..n - 10] } else { &values[n - 10..] };
    comm.all_gather_parts(part, &half, &mut all).unwrap();
    assert!(right(&all, &|i| value(i, usize::from(i >= n - 10))), "all-gather");
    drop(all);
    if comm.rank() == 1 {
        comm.send(0, 9, bytemuck::cast_slice(&values)).unwrap();
    } else {
        drop(values);
        let bytes = comm.receive(Some(1), 9).unwrap().bytes;
        let words = bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap()));
        assert!(right(&words.collect::<Vec<_>>(), &|i| value(i, 1)), "message");
    }
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
    let died = std::fs::metadata(dir.path().join("died")).and_then(|m| m.modified()).ok();
    let since_death = || died.map(|t| SystemTime::now().duration_since(t).unwrap_or_default());
    let id = |rank: usize| std::fs::read_to_string(dir.path().join(format!("rank{rank}"))).ok();
    // mpirun may return a little before the last rank is gone.
    let mut alive: Vec<PathBuf> = (0..size).filter_map(id).map(|id| Path::new("/proc").join(id)).collect();
    loop {
        alive.retain(|path| runs(path));
        if alive.is_empty() || since_death().is_none_or(|time| time > SOON) {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let took_to_die = since_death();
    println!("{scene} on {size}: {:?}", begin.elapsed());
    End {
        code: output.status.code(),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
        took_to_die,
        alive,
    }
}

/// Whether this entry of /proc is a process that runs. One that has ended and that nobody has
/// waited for is no more than an entry.
fn runs(path: &Path) -> bool {
    let stat = std::fs::read_to_string(path.join("stat"));
    stat.is_ok_and(|stat| ![") Z ", ") X "].iter().any(|ended| stat.contains(ended)))
}
