//! Where the jobs of a run stand: what was submitted, together with what squeue says.
//!
//! In: the directory of a run or of a sweep. Out: a [`JobStatus`] for each of its jobs that is still in
//! the queue.

use super::jobs::{Jobs, SubmittedJob};
use super::options::JobKind;
use super::queue::{self, Queued};
use anyhow::Result;
use gradtx_run::config::RUN_FILE;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A job of a run that is in the queue.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct JobStatus {
    /// The run.
    pub run: PathBuf,
    /// SLURM's number; of an array that of the whole array.
    pub id: String,
    /// What it does.
    pub kind: JobKind,
    /// Itself, or the jobs of the array that are in the queue.
    pub queued: Vec<Queued>,
    #[serde(skip)]
    title: String,
}

impl JobStatus {
    /// Whether it only waits.
    pub fn waits(&self) -> bool {
        self.queued.iter().all(|job| job.state == "PENDING")
    }

    /// `job 17 (curate): PENDING (Resources)`, and of an array how many are in which state.
    pub fn line(&self) -> String {
        let mut states: BTreeMap<String, usize> = BTreeMap::new();
        for job in &self.queued {
            let of_waiting = job.reason.as_ref().filter(|_| job.state == "PENDING");
            let nodes = job.nodes.as_ref().map(|nodes| format!(" on {nodes}"));
            let more = of_waiting.map(|reason| format!(" ({reason})")).or(nodes).unwrap_or_default();
            *states.entry(format!("{}{more}", job.state)).or_default() += 1;
        }
        let one = |(state, count): (&String, &usize)| match self.queued.len() {
            1 => state.clone(),
            _ => format!("{count} {state}"),
        };
        let states: Vec<String> = states.iter().map(one).collect();
        let start =
            self.queued.iter().filter(|job| job.state == "PENDING").find_map(|job| job.start.as_ref());
        let start = start.map_or(String::new(), |at| format!(", expected to start {at}"));
        format!("{}: {}{start}", self.title, states.join(", "))
    }
}

/// Runs this deep below a directory are found.
pub const MAX_DEPTH: usize = 8;

/// What was submitted for a run, or for a sweep and every run of it, with the directory of each job.
///
/// # Errors
/// If a list of jobs cannot be read.
pub(crate) fn submitted_below(dir: &Path) -> Result<Vec<(PathBuf, SubmittedJob)>> {
    let mut found = vec![];
    collect(dir, 0, &mut found)?;
    Ok(found)
}

fn collect(dir: &Path, depth: usize, found: &mut Vec<(PathBuf, SubmittedJob)>) -> Result<()> {
    found.extend(Jobs::read(dir)?.jobs.into_iter().map(|job| (dir.to_owned(), job)));
    if dir.join(RUN_FILE).is_file() || depth == MAX_DEPTH {
        return Ok(());
    }
    let visible = |name: std::ffi::OsString| !name.to_string_lossy().starts_with('.');
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && visible(entry.file_name()) {
            collect(&entry.path(), depth + 1, found)?;
        }
    }
    Ok(())
}

/// Those of the submitted jobs that are in the queue, by asking squeue once; it is not asked where
/// nothing was submitted.
///
/// # Errors
/// If squeue does not answer.
pub(crate) fn in_queue(submitted: Vec<(PathBuf, SubmittedJob)>) -> Result<Vec<JobStatus>> {
    let ids: Vec<String> = submitted.iter().map(|(_, job)| job.id.clone()).collect();
    let queued = queue::squeue(&ids)?;
    let status = |(run, job): (PathBuf, SubmittedJob)| {
        let queued: Vec<Queued> = queued.iter().filter(|queued| queued.id == job.id).cloned().collect();
        let title = job.title();
        (!queued.is_empty()).then_some(JobStatus { run, id: job.id, kind: job.kind, queued, title })
    };
    Ok(submitted.into_iter().filter_map(status).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queued(state: &str, reason: Option<&str>, nodes: Option<&str>) -> Queued {
        let [reason, nodes] = [reason, nodes].map(|text| text.map(String::from));
        Queued { id: "17".into(), state: state.into(), reason, start: None, nodes }
    }

    fn status(queued: Vec<Queued>) -> JobStatus {
        let title = "job 17 (curate)".into();
        JobStatus { run: "run".into(), id: "17".into(), kind: JobKind::Curate, queued, title }
    }

    #[test]
    fn a_job_and_an_array_are_one_line() {
        let waits = status(vec![queued("PENDING", Some("Resources"), None)]);
        assert_eq!(waits.line(), "job 17 (curate): PENDING (Resources)");
        assert!(waits.waits());
        let mut later = queued("PENDING", Some("Priority"), None);
        later.start = Some("2026-11-27T18:00:00".into());
        let array = status(vec![
            queued("RUNNING", None, Some("n1")),
            later.clone(),
            later,
            queued("RUNNING", Some("None"), Some("n1")),
        ]);
        assert_eq!(
            array.line(),
            "job 17 (curate): 2 PENDING (Priority), 2 RUNNING on n1, expected to start 2026-11-27T18:00:00"
        );
        assert!(!array.waits());
    }
}
