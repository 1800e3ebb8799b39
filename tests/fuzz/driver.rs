//! The parent: gives inputs to children in batches, notices how each ended, and keeps what failed.

use crate::child::{Inputs, JOB, Job, MARK, recipe};
use crate::home;
use crate::mutate::Recipe;
use crate::random::number_of;
use crate::targets::{TARGETS, Target, inputs_of};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// Time that an input may take.
pub const LIMIT: Duration = Duration::from_secs(10);
/// Inputs of one child.
const BATCH: usize = 200;
/// Children at a time.
const CHILDREN: usize = 2;
/// The name of the test that is the child.
const CHILD: &str = "child";

/// How an input ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It was read.
    Read,
    /// It was refused with an error.
    Refused,
    /// The reader panicked.
    Panic(String),
    /// The process died.
    Died(String),
    /// It took longer than the limit.
    Hang,
}

impl Verdict {
    /// Whether that may not happen.
    pub fn is_failure(&self) -> bool {
        !matches!(self, Self::Read | Self::Refused)
    }
}

/// An input that failed.
#[derive(Debug)]
pub struct Failure {
    /// Name of the target.
    pub target: &'static str,
    /// How it ended.
    pub verdict: Verdict,
    /// The smallest input that was found.
    pub file: PathBuf,
}

/// The inputs of a job and how each ended; those after one that ended the child are left out.
pub fn run_job(home: &Path, target: &str, inputs: Inputs, limit: Duration) -> Vec<(usize, Verdict)> {
    let job = Job { target: target.into(), home: home.into(), inputs };
    let errors = tempfile::NamedTempFile::new().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", CHILD, "--nocapture", "--test-threads", "1"])
        .env(JOB, serde_json::to_string(&job).unwrap())
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors.reopen().unwrap())
        .spawn()
        .unwrap();
    let verdicts = follow(&mut child, limit, errors.path());
    // What hangs is still there.
    let _ = child.kill();
    child.wait().unwrap();
    verdicts
}

/// Lines for the parent, from a thread that waits for them.
fn lines_of(child: &mut Child) -> Receiver<String> {
    let (sender, receiver) = channel();
    let output = BufReader::new(child.stdout.take().unwrap());
    std::thread::spawn(move || {
        for line in output.split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            // The first line follows what the test harness prints without an end of the line.
            let Some((_, line)) = line.split_once(MARK) else { continue };
            if sender.send(line.trim().to_string()).is_err() {
                break;
            }
        }
    });
    receiver
}

fn follow(child: &mut Child, limit: Duration, errors: &Path) -> Vec<(usize, Verdict)> {
    let lines = lines_of(child);
    let (mut verdicts, mut current) = (vec![], None);
    loop {
        match (lines.recv_timeout(limit), current) {
            (Ok(line), _) => {
                let (word, index) = line.split_once(' ').unwrap();
                let index: usize = index.parse().unwrap();
                current = (word == "begin").then_some(index);
                match word {
                    "ok" => verdicts.push((index, Verdict::Read)),
                    "error" => verdicts.push((index, Verdict::Refused)),
                    "panic" => verdicts.push((index, Verdict::Panic(panic_in(errors)))),
                    _ => {}
                }
            }
            (Err(RecvTimeoutError::Timeout), Some(index)) => {
                verdicts.push((index, Verdict::Hang));
                return verdicts;
            }
            // It has not started yet: the machine is busy.
            (Err(RecvTimeoutError::Timeout), None) => {}
            (Err(RecvTimeoutError::Disconnected), current) => {
                let status = child.wait().unwrap();
                let how = status.signal().map_or(format!("{status}"), |signal| format!("signal {signal}"));
                match current {
                    Some(index) => {
                        verdicts.push((index, Verdict::Died(format!("{how}: {}", last_line(errors)))))
                    }
                    None => assert!(status.success(), "a child ended with {how}: {}", last_line(errors)),
                }
                return verdicts;
            }
        }
    }
}

/// Where the last panic was, and what it said.
fn panic_in(errors: &Path) -> String {
    let text = String::from_utf8_lossy(&std::fs::read(errors).unwrap()).into_owned();
    let Some((_, panic)) = text.rsplit_once("panicked at ") else { return String::new() };
    panic.lines().take(2).collect::<Vec<_>>().join(" ")
}

/// The last words of a process.
fn last_line(errors: &Path) -> String {
    let text = String::from_utf8_lossy(&std::fs::read(errors).unwrap()).into_owned();
    let says = |line: &&str| !line.trim().is_empty() && !line.starts_with("note:");
    text.lines().rfind(says).unwrap_or_default().to_string()
}

/// Where failing inputs are kept.
pub fn failures_dir() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("fuzz/failures")
}

/// Runs `total` mutated inputs over all targets; those that fail, made small and kept.
pub fn run(home: &Path, seed: u64, total: usize) -> (usize, Vec<Failure>) {
    let mut batches = VecDeque::new();
    for target in TARGETS {
        let count = inputs_of(target, total);
        batches.extend((0..count).step_by(BATCH).map(|from| (target, from, count.min(from + BATCH))));
    }
    let (batches, found, done) = (Mutex::new(batches), Mutex::new(vec![]), Mutex::new(0));
    std::thread::scope(|scope| {
        for _ in 0..CHILDREN {
            scope.spawn(|| {
                while let Some((target, from, to)) = { batches.lock().unwrap().pop_front() } {
                    let mut next = from;
                    while next < to {
                        let verdicts =
                            run_job(home, target.name, Inputs::Mutated { seed, from: next, to }, LIMIT);
                        let Some(&(last, _)) = verdicts.last() else { panic!("{}: no verdict", target.name) };
                        *done.lock().unwrap() += verdicts.len();
                        next = last + 1;
                        for (index, verdict) in verdicts.into_iter().filter(|(_, v)| v.is_failure()) {
                            found.lock().unwrap().push((target, index, verdict));
                        }
                    }
                }
            });
        }
    });
    let mut failures: Vec<Failure> = vec![];
    for (target, index, verdict) in found.into_inner().unwrap() {
        if failures.iter().any(|f| f.target == target.name && same_kind(&f.verdict, &verdict)) {
            continue;
        }
        failures.extend(smallest(home, target, recipe(target, seed, index), &verdict));
    }
    (done.into_inner().unwrap(), failures)
}

/// Whether two inputs probably fail for one reason.
fn same_kind(a: &Verdict, b: &Verdict) -> bool {
    match (a, b) {
        // By the place in the code; what a panic says may quote the input.
        (Verdict::Panic(a), Verdict::Panic(b)) => a.split(' ').next() == b.split(' ').next(),
        (a, b) => std::mem::discriminant(a) == std::mem::discriminant(b),
    }
}

/// Leaves out mutations while the input still fails, alone and in a new process, and keeps it.
/// What is not repeated alone is kept too, except for what was only slow beside others.
fn smallest(home: &Path, target: &'static Target, recipe: Recipe, verdict: &Verdict) -> Option<Failure> {
    let seeds = home::seeds(home, target);
    let file = tempfile::NamedTempFile::new().unwrap();
    let fails = |recipe: &Recipe| {
        std::fs::write(file.path(), recipe.make(target.form, &seeds)).unwrap();
        let verdicts = run_job(home, target.name, Inputs::File(file.path().into()), LIMIT);
        verdicts.into_iter().map(|(_, verdict)| verdict).find(Verdict::is_failure)
    };
    let (mut best, mut verdict) = (recipe.clone(), verdict.clone());
    match fails(&recipe) {
        Some(again) => {
            verdict = again;
            for i in (0..recipe.mutations.len()).rev() {
                let mut fewer = best.clone();
                fewer.mutations.remove(i);
                if fails(&fewer).is_some() {
                    best = fewer;
                }
            }
        }
        None if verdict == Verdict::Hang => return None,
        None => {}
    }
    let bytes = best.make(target.form, &seeds);
    let dir = failures_dir();
    std::fs::create_dir_all(&dir).unwrap();
    let number = number_of(&bytes.iter().map(|&b| char::from(b)).collect::<String>());
    let kept = dir.join(format!("{}-{:08x}", target.name, number as u32));
    std::fs::write(&kept, bytes).unwrap();
    Some(Failure { target: target.name, verdict, file: kept })
}
