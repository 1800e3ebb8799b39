//! SLURM's own commands: sbatch, squeue, scancel.
//!
//! In: scripts and numbers of jobs. Out: the numbers of new jobs; of known ones, whether they are
//! in the queue, running or waiting, and what for. squeue is given a few seconds: a controller
//! that does not answer must not hold up whoever only wants to see a run's state.

use anyhow::{Context as _, Result};
use gradtx_run::failure::{failed, unusable};
use serde::Serialize;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// SLURM's command that submits.
const SBATCH: &str = "sbatch";
/// SLURM's command that lists jobs.
const SQUEUE: &str = "squeue";
/// How long squeue may take.
const TIME_LIMIT: Duration = Duration::from_secs(10);
/// Number of the array or job, state, reason, start, nodes: one line for each job of an array.
const FORMAT: &str = "%F|%T|%r|%S|%N";

/// A job in the queue, or one of an array.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Queued {
    /// SLURM's number; of an array that of the whole array.
    pub id: String,
    /// State, e.g. PENDING.
    pub state: String,
    /// Why it waits, e.g. Resources.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When it started, or is expected to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<String>,
    /// The nodes that it runs on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<String>,
}

/// Submits a script; returns the job's id.
///
/// # Errors
/// What sbatch says, if it refuses.
pub fn sbatch(script: &Path, dependency: Option<&str>) -> Result<String> {
    let output = Command::new(SBATCH).args(sbatch_arguments(script, dependency)).output();
    let output = output.with_context(|| format!("{SBATCH}: cannot run"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(
            format!("{SBATCH} refused {}: {}", script.display(), said.trim()),
            "account, partition, time and GPUs are options of `gradtx submit` and keys of a profile; others go in \
             --sbatch",
        ));
    }
    // "17", or "17;cluster" where there are several.
    let said = String::from_utf8_lossy(&output.stdout);
    let id = said.trim().split(';').next().unwrap_or_default();
    if id.is_empty() || !id.bytes().all(|b| b.is_ascii_digit()) {
        return Err(unusable(format!("{SBATCH}: expected a job id, found `{}`", said.trim().escape_debug())));
    }
    Ok(id.into())
}

/// The words after `sbatch`. A job whose dependency can no longer be met is cancelled.
pub(crate) fn sbatch_arguments(script: &Path, dependency: Option<&str>) -> Vec<String> {
    let mut arguments = vec!["--parsable".to_string()];
    if let Some(option) = dependency {
        arguments.extend([option.to_string(), "--kill-on-invalid-dep=yes".into()]);
    }
    arguments.push(script.to_string_lossy().into_owned());
    arguments
}

/// Cancels jobs.
///
/// # Errors
/// If scancel cannot be run, or fails.
pub fn scancel(ids: &[String]) -> Result<()> {
    let output = Command::new("scancel").args(ids).output().context("scancel: cannot run")?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "scancel {}: {}", ids.join(" "), said.trim());
    Ok(())
}

/// Whether a command of SLURM is on the PATH.
fn is_there(command: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(command).is_file())
}

/// Fails where there is no `sbatch`.
///
/// # Errors
/// If it is not on the PATH.
pub(crate) fn find_sbatch() -> Result<()> {
    if is_there(SBATCH) {
        return Ok(());
    }
    Err(failed(
        format!("{SBATCH}: not on the PATH; there is no SLURM on this machine"),
        "submit from a login node of the cluster, or see the scripts with --dry-run",
    ))
}

/// Which of these jobs are in the queue: those that wait or run, every job of an array by itself.
///
/// # Errors
/// If squeue is not there, fails, or does not answer in time.
pub fn squeue(ids: &[String]) -> Result<Vec<Queued>> {
    if ids.is_empty() {
        return Ok(vec![]);
    }
    // All jobs of the user: for a single number that is no longer known, squeue would fail.
    let arguments = ["--noheader", "--me", "--array", &format!("--format={FORMAT}")].map(String::from);
    let text = answer(SQUEUE, &arguments)?;
    Ok(text.lines().filter_map(queued).filter(|job| ids.contains(&job.id)).collect())
}

/// A line of squeue.
fn queued(line: &str) -> Option<Queued> {
    let fields: Vec<&str> = line.trim().split('|').collect();
    let [id, state, reason, start, nodes] = fields[..] else { return None };
    let set = |text: &str| (!["", "None", "N/A", "(null)"].contains(&text)).then(|| text.to_string());
    let (reason, start, nodes) = (set(reason), set(start), set(nodes));
    Some(Queued { id: id.into(), state: state.into(), reason, start, nodes })
}

/// What a command prints, if it ends well and in time.
fn answer(command: &str, arguments: &[String]) -> Result<String> {
    anyhow::ensure!(is_there(command), "{command}: not on the PATH");
    let mut child = Command::new(command)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{command}: cannot run"))?;
    let reader = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = vec![];
            // What a process that is killed had said so far does no harm.
            let _ = pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let out = reader(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let err = reader(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let began = Instant::now();
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if began.elapsed() < TIME_LIMIT => std::thread::sleep(Duration::from_millis(5)),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                anyhow::bail!("{command}: no answer within {} s", TIME_LIMIT.as_secs());
            }
        }
    };
    let joined = |thread: std::thread::JoinHandle<String>| thread.join().unwrap_or_default();
    let (out, err) = (joined(out), joined(err));
    anyhow::ensure!(status.success(), "{command}: {}", err.trim().lines().next().unwrap_or("failed"));
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_follows_another() {
        let script = Path::new("/run/slurm/train.sbatch");
        assert_eq!(sbatch_arguments(script, None), ["--parsable", "/run/slurm/train.sbatch"]);
        assert_eq!(
            sbatch_arguments(script, Some("--dependency=afterok:17"))[1..3],
            ["--dependency=afterok:17", "--kill-on-invalid-dep=yes"]
        );
    }

    #[test]
    fn lines_of_squeue_are_read() {
        let waits = queued("17|PENDING|Resources|2026-11-27T18:00:00|").unwrap();
        assert_eq!((waits.state.as_str(), waits.reason.as_deref()), ("PENDING", Some("Resources")));
        assert_eq!((waits.start.as_deref(), waits.nodes), (Some("2026-11-27T18:00:00"), None));
        let runs = queued("18|RUNNING|None|N/A|node[1-2]").unwrap();
        assert_eq!((runs.reason, runs.start, runs.nodes.as_deref()), (None, None, Some("node[1-2]")));
        assert_eq!(queued("slurm_load_jobs error"), None);
    }

    #[test]
    fn a_command_that_fails_is_quoted() {
        let error = answer("false", &[]).unwrap_err().to_string();
        assert_eq!(error, "false: failed");
        assert!(answer("no-such-command", &[]).unwrap_err().to_string().contains("not on the PATH"));
    }
}
