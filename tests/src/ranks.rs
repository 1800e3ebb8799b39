//! Several processes of the program under test: ranks under `mpirun`, and what became of them.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// `mpirun` as a container's only user, on fewer cores than ranks.
const ENVIRONMENT: [(&str, &str); 5] = [
    ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
    ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
    ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
    ("OMPI_MCA_mpi_yield_when_idle", "1"),
    ("OMPI_MCA_hwloc_base_binding_policy", "none"),
];

/// How a command ended.
#[derive(Debug)]
pub struct End {
    /// Exit code; none after a signal.
    pub code: Option<i32>,
    /// What it said.
    pub out: String,
    /// What it complained about.
    pub err: String,
    /// How long it took.
    pub took: Duration,
}

impl End {
    /// Of what a process left since it began.
    pub fn of(output: Output, began: Instant) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
            took: began.elapsed(),
        }
    }

    /// Fails the test unless all went well.
    ///
    /// # Panics
    /// When it did not.
    pub fn well(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }
}

/// A command line of `mpirun` in a directory: so many processes of each of these command lines, in
/// one world.
pub fn mpirun(dir: &Path, parts: &[(usize, &[&str])]) -> Command {
    let mut command = Command::new("mpirun");
    for (i, (size, words)) in parts.iter().enumerate() {
        command.args((i > 0).then_some(":")).args(["-n", &size.to_string()]).args(*words);
    }
    command.current_dir(dir).envs(ENVIRONMENT).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs a command to its end.
///
/// # Panics
/// When it cannot be started.
pub fn end_of(mut command: Command) -> End {
    let began = Instant::now();
    End::of(command.output().expect("what the tests start is installed"), began)
}

/// The processes of a program, with `mpirun` itself left out, whose parent this child is.
pub fn children(parent: &Child) -> Vec<u32> {
    let list = format!("/proc/{0}/task/{0}/children", parent.id());
    let text = std::fs::read_to_string(list).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// Sends a signal, by its name as `kill` knows it. A process that has gone is no error.
pub fn signal(pid: u32, name: &str) {
    let _ = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).stderr(Stdio::null()).status();
}
