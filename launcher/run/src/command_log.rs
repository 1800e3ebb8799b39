//! The commands that worked on a run: a line each in `RUN/commands.jsonl`.
//!
//! In: a command that has ended. Out: when, where, on how many ranks, by which version, and how it
//! ended, for the report. The file is the provider's or the client's own: no stage reads it, and
//! it is no part of what is sent.

use crate::context::Context;
use crate::progress::host_name;
use crate::text::utc;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// The file in a run directory.
pub const COMMANDS_FILE: &str = "commands.jsonl";
/// Where SLURM says which job this is.
const SLURM_JOB: &str = "SLURM_JOB_ID";

/// A command that has ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoggedCommand {
    /// When it began, UTC.
    pub started: String,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// The words of its command line, the program's name first.
    pub command: Vec<String>,
    /// Host of rank 0.
    pub host: String,
    /// Processes that worked together.
    pub ranks: usize,
    /// Threads of each.
    pub threads: usize,
    /// Version of gradtx.
    pub version: String,
    /// Number of the SLURM job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slurm_job: Option<String>,
    /// How it ended.
    pub exit_code: u8,
}

impl LoggedCommand {
    /// A command of this process that took so long and ends with this exit code.
    pub fn ended(context: &Context, ranks: usize, took: Duration, exit_code: u8) -> Self {
        let words = std::env::args_os().enumerate().map(|(i, word)| match i {
            0 => "gradtx".into(),
            _ => word.to_string_lossy().into_owned(),
        });
        Self {
            started: utc(SystemTime::now().checked_sub(took).unwrap_or(SystemTime::UNIX_EPOCH)),
            seconds: (1e3 * took.as_secs_f64()).round() / 1e3,
            command: words.collect(),
            host: host_name(),
            ranks,
            threads: context.threads,
            version: env!("CARGO_PKG_VERSION").into(),
            slurm_job: std::env::var(SLURM_JOB).ok().filter(|id| !id.is_empty()),
            exit_code,
        }
    }

    /// Appends it to the file of a run. Nothing depends on the file, so a disk that is full or
    /// read-only is not an error here: it is one of the stage's where it matters.
    pub fn append(&self, run: &Path) {
        let line = format!("{}\n", json!(self));
        let file = OpenOptions::new().create(true).append(true).open(run.join(COMMANDS_FILE));
        // One write: the lines of processes that share a run do not mix.
        let _ = file.and_then(|mut file| file.write_all(line.as_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::World;
    use crate::ui::Ui;

    #[test]
    fn commands_are_appended_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let context = Context::new(Some(2), Ui::new("train", true, false), &World::alone());
        let first = LoggedCommand::ended(&context, 4, Duration::from_millis(1500), 75);
        let second = LoggedCommand { exit_code: 0, slurm_job: Some("17".into()), ..first.clone() };
        first.append(dir.path());
        second.append(dir.path());
        let text = std::fs::read_to_string(dir.path().join(COMMANDS_FILE)).unwrap();
        let lines: Vec<LoggedCommand> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines, [first.clone(), second]);
        assert_eq!((first.command[0].as_str(), first.ranks, first.threads), ("gradtx", 4, 2));
        assert_eq!((first.seconds, first.started.len()), (1.5, 19));
        // Nowhere to write to is nothing to fail of.
        first.append(Path::new("/nowhere/at/all"));
    }
}
