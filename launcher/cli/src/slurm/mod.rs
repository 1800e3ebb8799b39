//! Batch jobs as SLURM takes them.
//!
//! In: [`Batch`]es, what to run and on what, with the [`Dependency`]s between them. Out: a script
//! for each that stands alone, jobs in SLURM's queue, and in the run directory a list of them, by
//! which `status`, `logs` and `cancel` find them again. `submit_all` does all of it.
//!
//! * options: what a job asks for, and where each value is from.
//! * profile: values that a site wrote down once.
//! * script: a batch script's text.
//! * queue: sbatch, squeue and scancel.
//! * jobs: which jobs were submitted for a run.
//! * job_status: which of them are in the queue.
//! * words: what may stand in a batch script.

pub mod job_status;
pub mod jobs;
pub mod options;
pub mod profile;
pub mod queue;
pub mod script;
pub mod words;

pub use jobs::{Jobs, SubmittedJob};
pub use options::{JobKind, JobOptions, Origin, Resolved};
pub use profile::{Container, ContainerRuntime, Profile};
pub use script::{Batch, Prelude, Script};

use anyhow::{Context as _, Result};
use gradtx_runtime::artifact::write_atomic;
use std::path::Path;

/// When a job may start: after others of the same submission, or of an earlier one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dependency {
    /// Which job.
    pub on: JobRef,
    /// Whether it must have succeeded, and not only ended.
    pub succeeded: bool,
}

/// A job that another one waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobRef {
    /// By its place in this submission.
    Batch(usize),
    /// By SLURM's number.
    Id(String),
}

impl Dependency {
    /// After the job at this place of the submission has succeeded.
    pub fn ok(index: usize) -> Self {
        Self { on: JobRef::Batch(index), succeeded: true }
    }

    /// After the job at this place of the submission has ended, however it did.
    pub fn any(index: usize) -> Self {
        Self { on: JobRef::Batch(index), succeeded: false }
    }
}

/// The dependencies as sbatch takes them; `name` gives the ids of jobs of the submission.
pub(crate) fn dependency_option(after: &[Dependency], name: impl Fn(usize) -> String) -> Option<String> {
    let one = |dependency: &Dependency| {
        let how = if dependency.succeeded { "afterok" } else { "afterany" };
        let id = match &dependency.on {
            JobRef::Batch(index) => name(*index),
            JobRef::Id(id) => id.clone(),
        };
        format!("{how}:{id}")
    };
    let all: Vec<String> = after.iter().map(one).collect();
    (!all.is_empty()).then(|| format!("--dependency={}", all.join(",")))
}

/// Writes the scripts and submits them in order; `submitted` is called after each. The ids are
/// also kept in the runs' directories. If one is refused, those before it are cancelled: a chain
/// without its end is of no use.
///
/// # Errors
/// If a script cannot be written, or sbatch refuses one.
pub(crate) fn submit_all(
    batches: &[Batch],
    mut submitted: impl FnMut(&Batch, &SubmittedJob),
) -> Result<Vec<String>> {
    queue::find_sbatch()?;
    for batch in batches {
        for dir in ["slurm", "logs"].map(|name| batch.run.join(name)) {
            std::fs::create_dir_all(&dir).with_context(|| format!("{}: cannot make", dir.display()))?;
        }
        let text = batch.render();
        write_atomic(&batch.place(), |out| std::io::Write::write_all(out, text.as_bytes()))?;
    }
    let mut ids: Vec<String> = vec![];
    for batch in batches {
        match submit_one(batch, &ids) {
            Ok(job) => {
                submitted(batch, &job);
                ids.push(job.id);
            }
            Err(error) if ids.is_empty() => return Err(error),
            Err(error) => return Err(take_back(batches, &ids, error)),
        }
    }
    Ok(ids)
}

fn submit_one(batch: &Batch, ids: &[String]) -> Result<SubmittedJob> {
    let dependency = dependency_option(&batch.after, |index| ids[index].clone());
    let id = queue::sbatch(&batch.place(), dependency.as_deref())?;
    let job = SubmittedJob::new(id, batch);
    let kept = Jobs::add(&batch.run, job.clone());
    kept.with_context(|| format!("job {} is submitted, but cannot be kept", job.id)).map(|()| job)
}

/// Cancels the jobs of a chain that could not be submitted to its end.
fn take_back(batches: &[Batch], ids: &[String], error: anyhow::Error) -> anyhow::Error {
    if let Err(e) = queue::scancel(ids) {
        return error.context(format!("{e:#}; still in the queue: {}", ids.join(" ")));
    }
    let runs: std::collections::BTreeSet<&Path> = batches.iter().map(|batch| batch.run.as_path()).collect();
    match runs.into_iter().try_for_each(|run| Jobs::remove(run, ids)) {
        Ok(()) => error,
        Err(e) => error.context(format!("{e:#}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_follows_others_that_succeeded_or_only_ended() {
        let id = |index: usize| (17 + index).to_string();
        assert_eq!(dependency_option(&[], id), None);
        let after = [Dependency::ok(1), Dependency::any(2)];
        assert_eq!(dependency_option(&after, id).unwrap(), "--dependency=afterok:18,afterany:19");
        let other = Dependency { on: JobRef::Id("5".into()), succeeded: true };
        assert_eq!(dependency_option(&[other], id).unwrap(), "--dependency=afterok:5");
    }
}
