//! The SLURM cluster of these tests: two nodes on this machine, real daemons (see `box/`).
//!
//! One cluster for all tests, started by the first. Its keeper lives as long as a pipe that
//! this process holds, so it is stopped and removed however this process ends.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{LazyLock, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

/// A job that has not come where it should be after this long never will.
const PATIENCE: Duration = Duration::from_secs(120);

/// After a requeue, what is left of a job's first start has gone for certain. The end of the
/// old batch shell, told to a job that runs again already, would count as its own.
const SETTLED: Duration = Duration::from_secs(3);

/// The running cluster.
pub struct Cluster {
    dir: PathBuf,
}

static CLUSTER: LazyLock<RwLock<Cluster>> = LazyLock::new(|| RwLock::new(Cluster::start()));

/// The cluster, for a test that shares it with others.
pub fn cluster() -> RwLockReadGuard<'static, Cluster> {
    CLUSTER.read().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The cluster, for a test that breaks parts of it.
pub fn cluster_alone() -> RwLockWriteGuard<'static, Cluster> {
    CLUSTER.write().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn place_of(script: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster/box").join(script)
}

/// Three ports that nobody listens on, the last two in a row.
fn ports() -> [u16; 3] {
    loop {
        let bound = [0, 0].map(|port| TcpListener::bind(("127.0.0.1", port)).unwrap());
        let [a, b] = bound.each_ref().map(|listener| listener.local_addr().unwrap().port());
        if b < u16::MAX && TcpListener::bind(("127.0.0.1", b + 1)).is_ok() {
            return [a, b, b + 1];
        }
    }
}

impl Cluster {
    fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("gradtx-slurm-").tempdir().unwrap().keep();
        let [controller, node, _] = ports();
        let mut keeper = Command::new(place_of("cluster.sh"))
            .arg(&dir)
            .args([controller, node].map(|port| port.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(keeper.stdout.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        if line.trim() != "up" {
            said.read_to_string(&mut line).unwrap();
            panic!("no SLURM cluster (`.ci/setup cluster` installs what it needs): {line}");
        }
        // The pipe stays open, and the keeper waiting, until this process ends.
        std::mem::forget(keeper);
        Self { dir }
    }

    /// A command with the cluster's environment.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("bash");
        command.args(["-c", ". \"$0/env.sh\"; exec \"$@\""]).arg(&self.dir).arg(program);
        // Cluster settings of whoever runs these tests are not theirs.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("S") && name.contains("BATCH_"))
        {
            command.env_remove(name);
        }
        command
    }

    /// What a command says; it must succeed.
    pub fn done(&self, command: &mut Command) -> String {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", both(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// `scontrol` with these words.
    pub fn scontrol(&self, words: &[&str]) {
        self.done(self.command("scontrol").args(words));
    }

    /// A field of a job, e.g. `JobState`; of an array the first job's.
    pub fn field(&self, job: &str, name: &str) -> String {
        let text = self.done(self.command("scontrol").args(["show", "job", "--oneliner", job]));
        let start = format!("{name}=");
        let found = text.split_whitespace().find_map(|word| word.strip_prefix(&start));
        found.unwrap_or_else(|| panic!("job {job}: no {name} in {text}")).to_string()
    }

    /// States of a job, or of all jobs of an array.
    fn states(&self, job: &str) -> Vec<(String, String)> {
        let text = self.done(self.command("scontrol").args(["show", "job", "--oneliner", job]));
        let field = |line: &str, name: &str| {
            line.split_whitespace()
                .find_map(|word| Some(word.strip_prefix(name)?.to_string()))
                .unwrap_or_default()
        };
        text.lines().map(|line| (field(line, "JobState="), field(line, "Reason="))).collect()
    }

    /// Waits until a job has ended, and all jobs of it if it is an array; gives in what state.
    /// A requeued job would wait for two minutes before it starts; here it does not.
    pub fn ended(&self, job: &str) -> String {
        let started = Instant::now();
        let mut pending = Instant::now();
        loop {
            let states = self.states(job);
            let has_ended =
                |state: &str| !["PENDING", "RUNNING", "COMPLETING", "CONFIGURING"].contains(&state);
            if states.iter().all(|(state, _)| has_ended(state)) {
                let mut names: Vec<String> = states.into_iter().map(|(state, _)| state).collect();
                names.sort();
                names.dedup();
                return names.join(" ");
            }
            if !states.iter().any(|(state, reason)| state == "PENDING" && reason == "BeginTime") {
                pending = Instant::now();
            } else if pending.elapsed() > SETTLED {
                // It may have started in the meantime.
                let update = ["update", &format!("JobId={job}"), "StartTime=now"];
                let _ = self.command("scontrol").args(update).output();
            }
            assert!(started.elapsed() < PATIENCE, "job {job}: still {states:?}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Starts a requeued job that would wait for two minutes.
    pub fn start_now(&self, job: &str) {
        self.until("requeued", || self.field(job, "Reason") == "BeginTime");
        std::thread::sleep(SETTLED);
        self.scontrol(&["update", &format!("JobId={job}"), "StartTime=now"]);
    }

    /// Waits until `what` is so.
    pub fn until(&self, what: &str, is_so: impl FnMut() -> bool) {
        self.until_or(what, is_so, String::new);
    }

    /// The same; `why` adds to the message if it never is.
    pub fn until_or(&self, what: &str, mut is_so: impl FnMut() -> bool, why: impl Fn() -> String) {
        let started = Instant::now();
        while !is_so() {
            assert!(
                started.elapsed() < PATIENCE,
                "{what}: not after {PATIENCE:?}: {}\n{}",
                why(),
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Starts a node again (`up`), or kills everything on it (`crash`).
    pub fn node(&self, what: &str, node: &str) {
        let output = Command::new(place_of("node.sh")).arg(&self.dir).args([what, node]).output().unwrap();
        assert!(output.status.success(), "node.sh {what} {node}: {}", both(&output));
    }

    /// The end of the controller's log, for messages.
    fn log(&self) -> String {
        let text = std::fs::read_to_string(self.dir.join("log/slurmctld.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

/// What a program said, on both streams.
pub fn both(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
