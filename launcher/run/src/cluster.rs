//! One process among several: how it learns its rank, and how all end together.
//!
//! In: what mpirun or srun put into the environment, and the work of this process. Out: a
//! [`Comm`] to do it with, a log whose lines say which rank they come from, and one exit
//! code. [`run`] does all of it:
//!
//! ```text
//! cluster::run(report, |world| stages::train::run(&context, world, &run))
//! ```
//!
//! What is promised when something goes wrong: one rank prints one error, with its rank
//! and node, and all ranks end within seconds with that error's exit code, though the
//! others may be waiting for it. If several ranks fail at once, as they do when a shared
//! directory is full, the lowest of them speaks. A panic ends all ranks with code 101, a
//! kill with the starter's code (mpirun: 137).

use crate::failure::{self, ErrorReport, unusable_with};
use crate::ui;
use anyhow::{Context, Result};
use gradtx_runtime::artifact::checksum_file;
use gradtx_runtime::comm::{Collectives, Comm, Launch, Solo, agree};
use std::io::{self, Write};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};
use tracing_subscriber::EnvFilter;

/// Environment variable that sets what is logged to standard error, e.g. `debug`.
const LOG_VARIABLE: &str = "GRADTX_LOG";
/// Tag of the message "I am about to report an error", sent to all higher ranks.
const FAILING: u8 = u8::MAX;
/// How long a rank that failed listens whether a lower one did too.
const LISTEN: Duration = Duration::from_millis(500);
/// How long it then waits to be ended, before it speaks after all.
const PATIENCE: Duration = Duration::from_secs(5);

/// This process and the others that were started with it.
pub struct World {
    comm: Box<dyn Comm>,
    threads: usize,
    ended: bool,
}

/// Runs `work` in the world that this process was started in; returns the exit code. An
/// error is given to `report`, on one rank only, which prints it and gives its exit code.
///
/// All ranks must run the same program: that is compared first.
pub fn run(report: impl Fn(&anyhow::Error) -> u8, work: impl FnOnce(&World) -> Result<()>) -> u8 {
    match World::start() {
        Ok(world) => {
            let done = same_program(&world).and_then(|()| work(&world));
            world.end(done, report)
        }
        // Every process found that out for itself, and none knows the others.
        Err(error) if Launch::find().is_none_or(|launch| launch.rank == 0) => report(&error),
        Err(_) => failure::FAILED,
    }
}

/// Runs `work`, which one process does alone; returns the exit code. Started as one of several
/// it would only get into the others' way, so that is refused, unless it `is_shared`.
pub fn run_alone(
    command: &str,
    is_shared: bool,
    report: impl Fn(&anyhow::Error) -> u8,
    work: impl FnOnce(&World) -> Result<()>,
) -> u8 {
    log(String::new());
    let world = World::alone();
    match Launch::find() {
        Some(Launch { by, rank, size }) if size > 1 && !is_shared => {
            let what = format!("`gradtx {command}` works in one process, but {by} started {size}");
            let error = unusable_with(what, Some(format!("start it without {by}, or with one task")));
            if rank == 0 { report(&error) } else { failure::UNUSABLE }
        }
        _ => {
            let done = work(&world);
            world.end(done, report)
        }
    }
}

fn same_program(world: &World) -> Result<()> {
    if world.comm().size() == 1 {
        return Ok(());
    }
    let path = std::env::current_exe().context("cannot find the path of this program")?;
    let build = checksum_file(&path)?;
    world.agree("program", &format!("version {}, checksum {build}", env!("CARGO_PKG_VERSION")))
}

impl World {
    /// This process without any other.
    pub fn alone() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        Self { comm: Box::new(Solo::default()), threads, ended: false }
    }

    /// The ranks of this communicator, one of which is here: for ranks that are threads of one process.
    pub fn of(comm: Box<dyn Comm>) -> Self {
        Self { comm, threads: 1, ended: false }
    }

    /// Finds the other processes, if this one is one of several. From then on the log's
    /// lines begin with rank and node, and ranks but 0 are silent on standard output.
    ///
    /// Must be ended with [`World::end`]; dropped before, it ends all ranks.
    pub fn start() -> Result<Self> {
        let comm = connect(Launch::find())?;
        let mut prefix = String::new();
        if comm.size() > 1 {
            prefix = format!("rank {} on {}: ", comm.rank(), comm.place().node);
        }
        log(prefix);
        if comm.rank() != 0 {
            ui::silence();
        }
        let threads = threads(&*comm)?;
        Ok(Self { comm, threads, ended: false })
    }

    /// What this rank gives the others with.
    pub fn comm(&self) -> &dyn Comm {
        &*self.comm
    }

    /// Threads for this rank: the cores that it may use, shared with the ranks of its node
    /// that may use the same ones.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Fails on all ranks unless all have the same `value` (for a configuration: its hash)
    /// of what `name` names.
    pub fn agree(&self, name: &str, value: &str) -> Result<()> {
        Ok(agree(self.comm(), name, value)?)
    }

    /// Ends this rank, or after an error all ranks; returns the exit code. All ranks stop as
    /// asked, or none: that they have agreed on before, and so nobody needs to be ended.
    pub fn end(mut self, done: Result<()>, report: impl Fn(&anyhow::Error) -> u8) -> u8 {
        self.ended = true;
        let Err(mut error) = done else { return failure::DONE };
        let comm = self.comm();
        let error_report = ErrorReport::from(&error);
        if comm.size() == 1 {
            return report(&error);
        }
        if error_report.was_asked_for() {
            let code = if comm.rank() == 0 { report(&error) } else { error_report.code };
            // Some starters end all processes once one has ended like this: rank 0 speaks first.
            // If that fails, nobody is left to be waited for.
            let _ = comm.barrier();
            return code;
        }
        error = error.context(format!("rank {} of {} on {}", comm.rank(), comm.size(), comm.place().node));
        self.wait_for_lower_ranks();
        let code = report(&error);
        self.comm().abort(code)
    }

    /// Returns when this rank is to report its error; while a lower rank reports one, it
    /// does not, and ends with the others.
    fn wait_for_lower_ranks(&self) {
        let comm = self.comm();
        for higher in comm.rank() + 1..comm.size() {
            // If that fails, the others hear of it by being ended.
            let _ = comm.send(higher, FAILING, &[]);
        }
        let begin = Instant::now();
        let mut wait = if comm.rank() == 0 { Duration::ZERO } else { LISTEN };
        while begin.elapsed() < wait {
            if matches!(comm.try_receive(None, FAILING), Ok(Some(_))) {
                wait = PATIENCE;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !self.ended && self.comm.size() > 1 {
            let (rank, node) = (self.comm.rank(), &self.comm.place().node);
            eprintln!("error: rank {rank} on {node} left its work unfinished");
            self.comm.abort(failure::FAILED);
        }
    }
}

/// The ranks of which this process is one; only itself if it was started alone.
fn connect(launch: Option<Launch>) -> Result<Box<dyn Comm>> {
    let Some(launch) = launch.filter(|launch| launch.size > 1) else {
        return Ok(Box::new(Solo::default()));
    };
    #[cfg(feature = "mpi")]
    {
        let begins = |start: &str| {
            std::env::vars_os().any(|(name, _)| name.to_str().is_some_and(|name| name.starts_with(start)))
        };
        launch.check_wires(begins)?;
        let Launch { by, size, .. } = launch;
        let comm = gradtx_runtime::comm::Mpi::init();
        Ok(Box::new(comm.with_context(|| format!("cannot join the {size} processes of {by}"))?))
    }
    #[cfg(not(feature = "mpi"))]
    {
        let Launch { by, size, .. } = launch;
        let what = format!("{by} started {size} processes, but this program was built without MPI");
        let hint = format!("build it with `--features mpi` ({}), or start one process", by.advice());
        Err(failure::failed(what, hint))
    }
}

/// Cores that this rank may use, divided by the ranks of its node with the same cores.
fn threads(comm: &dyn Comm) -> Result<usize> {
    let allowed = std::thread::available_parallelism().map_or(1, |n| n.get());
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let cores = status.lines().find(|line| line.starts_with("Cpus_allowed_list")).unwrap_or_default();
    let own = format!("{}\n{cores}", comm.place().node).into_bytes();
    let sharing = comm.all_gather_bytes(&own)?.iter().filter(|other| **other == own).count();
    Ok((allowed / sharing.max(1)).max(1))
}

/// How often `--verbose` was given.
static VERBOSITY: AtomicU8 = AtomicU8::new(0);

/// Sets what is logged where the environment does not say: 0 warnings, 1 messages, 2 and more debug
/// messages too. To be called before the world starts.
pub fn set_verbosity(verbosity: u8) {
    VERBOSITY.store(verbosity, Ordering::Relaxed);
}

/// Logs to standard error what the environment asks for, or else what `--verbose` asks for; every line
/// begins with `prefix`.
pub fn log(prefix: String) {
    let level = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| {
        EnvFilter::new(match VERBOSITY.load(Ordering::Relaxed) {
            0 => "warn",
            1 => "info",
            _ => "debug",
        })
    });
    let writer = move || Prefixed { prefix: prefix.clone(), out: io::stderr() };
    // A second call in one process keeps the first one's log.
    let _ = tracing_subscriber::fmt().with_env_filter(level).with_writer(writer).try_init();
}

/// Puts something before every line. Whole lines are written to it at once.
struct Prefixed<W> {
    prefix: String,
    out: W,
}

impl<W: Write> Write for Prefixed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut lines = Vec::with_capacity(bytes.len() + self.prefix.len());
        for line in bytes.split_inclusive(|&b| b == b'\n') {
            lines.extend(self.prefix.as_bytes());
            lines.extend(line);
        }
        // At once: lines of several processes go to the same place.
        self.out.write_all(&lines)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_runtime::comm::Starter;

    #[test]
    fn a_process_that_was_started_alone_is_a_world() {
        for launch in [None, Some(Launch { by: Starter::Srun, rank: 0, size: 1 })] {
            let comm = connect(launch).unwrap();
            assert_eq!((comm.rank(), comm.size()), (0, 1));
        }
        let code = |done: Result<()>| run(|_| 7, |_| done);
        assert_eq!(code(Ok(())), failure::DONE);
        assert_eq!(code(Err(anyhow::anyhow!("no"))), 7);
    }

    #[cfg(not(feature = "mpi"))]
    #[test]
    fn without_mpi_several_processes_are_refused() {
        let error = connect(Some(Launch { by: Starter::Srun, rank: 1, size: 4 })).err().unwrap().to_string();
        assert!(error.contains("srun started 4 processes") && error.contains("without MPI"), "{error}");
        // With any way in which srun starts MPI, and by whoever else.
        for by in [Starter::Hydra, Starter::Flux] {
            let error = connect(Some(Launch { by, rank: 0, size: 2 })).err().unwrap();
            let error_report = ErrorReport::from(&error);
            assert!(
                error_report.message.starts_with(&format!("{by} started 2 processes")),
                "{}",
                error_report.message
            );
            assert!(error_report.hint.unwrap().contains(by.advice()));
        }
    }

    #[test]
    fn a_node_s_cores_are_shared_by_its_ranks() {
        let allowed = std::thread::available_parallelism().unwrap().get();
        let found: Vec<usize> = std::thread::scope(|scope| {
            let ranks = gradtx_runtime::comm::local(2).into_iter();
            let ranks: Vec<_> = ranks.map(|rank| scope.spawn(move || threads(&rank).unwrap())).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        assert_eq!(found, [(allowed / 2).max(1); 2]);
        assert_eq!(threads(&Solo::default()).unwrap(), allowed);
    }

    #[test]
    fn every_line_gets_the_prefix() {
        let mut out = Prefixed { prefix: "rank 3 on n1: ".into(), out: vec![] };
        out.write_all(b"WARN one\n  two\n").unwrap();
        assert_eq!(out.out, b"rank 3 on n1: WARN one\nrank 3 on n1:   two\n");
    }
}
