//! `cancel`: ends the batch jobs of a run, or of a sweep.
//!
//! In: the directory of a run or of a sweep, perhaps which of its jobs. Out: those that are in the queue are
//! cancelled, the last ones of a chain first, so that none starts because the one before it has ended. What
//! they have written stays, and the stages resume from it.

use crate::slurm::options::JobKind;
use crate::slurm::{job_status, queue};
use anyhow::Result;
use gradtx_run::config::run_dir;
use gradtx_run::context::Context;
use gradtx_run::failure::failed;
use gradtx_run::text::quoted;
use serde_json::json;
use std::path::PathBuf;

/// What to cancel.
#[derive(Debug, clap::Args)]
pub struct Job {
    /// Directory of a run, or of a sweep: all of its runs.
    pub run: PathBuf,
    /// Which of its jobs (default: all).
    #[arg(value_enum, value_name = "JOB")]
    pub jobs: Vec<JobKind>,
}

/// Cancels the jobs that are in the queue.
///
/// # Errors
/// If nothing was submitted for the run, or SLURM does not answer.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    if !job.run.is_dir() {
        return Err(run_dir::no_run(&job.run));
    }
    let submitted = job_status::submitted_below(&job.run)?;
    if submitted.is_empty() {
        let what = format!("{}: no jobs were submitted for a run here by `gradtx submit`", job.run.display());
        return Err(failed(what, "`squeue --me` lists all of your jobs, `scancel JOB` ends one"));
    }
    let chosen = |kind: &JobKind| job.jobs.is_empty() || job.jobs.contains(kind);
    let mut queued = job_status::in_queue(submitted)?;
    queued.retain(|status| chosen(&status.kind));
    // SLURM's numbers grow, and a job waits for earlier ones only.
    queued.sort_by_key(|status| std::cmp::Reverse(status.id.parse::<u64>().unwrap_or(u64::MAX)));
    let ids: Vec<String> = queued.iter().map(|status| status.id.clone()).collect();
    if !ids.is_empty() {
        queue::scancel(&ids)?;
    }
    if context.ui.is_json() {
        context.ui.result_object("cancel", json!({ "jobs": ids }));
        return Ok(());
    }
    queued.iter().for_each(|status| context.ui.result(format!("cancelled {}", status.line())));
    if queued.is_empty() {
        let shown = quoted(&job.run.to_string_lossy());
        context.ui.result(format!("no such job is in the queue; gradtx status {shown} shows how far it is"));
    }
    Ok(())
}
