//! Where the jobs of a run stand: what was submitted, together with what squeue says.
//!
//! In: a run directory. Out: a [`JobStatus`] for each of its jobs that is still in the queue.

use super::jobs::{Jobs, SubmittedJob};
use super::options::JobKind;
use super::queue::{self, Queued};
use anyhow::Result;
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

/// The jobs of some runs that are in the queue, by asking squeue once; it is not asked where
/// nothing was submitted.
///
/// # Errors
/// If a list of jobs cannot be read, or squeue does not answer.
pub fn of_runs(runs: &[PathBuf]) -> Result<Vec<JobStatus>> {
    let mut submitted: Vec<(&Path, SubmittedJob)> = vec![];
    for run in runs {
        submitted.extend(Jobs::read(run)?.jobs.into_iter().map(|job| (run.as_path(), job)));
    }
    let ids: Vec<String> = submitted.iter().map(|(_, job)| job.id.clone()).collect();
    let queued = queue::squeue(&ids)?;
    let status = |(run, job): (&Path, SubmittedJob)| {
        let queued: Vec<Queued> = queued.iter().filter(|queued| queued.id == job.id).cloned().collect();
        let title = job.title();
        (!queued.is_empty()).then(|| JobStatus { run: run.into(), id: job.id, kind: job.kind, queued, title })
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
