//! Which batch jobs were submitted for a run: `slurm/jobs.json` in its directory.
//!
//! In: what `submit` hands over. Out: a list that `status`, `logs` and `cancel` read, and by
//! which a second submission of the same jobs is noticed. It only grows; what has become of a job
//! is SLURM's to say ([`super::queue`]).

use super::options::JobKind;
use super::script::Batch;
use anyhow::Result;
use gradtx_run::progress::unix_now;
use gradtx_runtime::artifact::{MAX_CONFIG_BYTES, read_regular_text, write_json};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The list's file in a run directory.
pub(crate) const JOBS_FILE: &str = "slurm/jobs.json";

/// A job that was submitted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SubmittedJob {
    /// SLURM's number; of an array that of the whole array.
    pub id: String,
    /// What it does.
    pub kind: JobKind,
    /// Name in the queue.
    pub name: String,
    /// Jobs of the array, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub array: Option<usize>,
    /// The script.
    pub script: PathBuf,
    /// When it was submitted, in seconds since 1970.
    pub submitted: f64,
}

impl SubmittedJob {
    /// A job that SLURM has just given this number.
    pub fn new(id: String, batch: &Batch) -> Self {
        let Batch { kind, array, .. } = *batch;
        Self { id, kind, name: batch.name(), array, script: batch.place(), submitted: unix_now() }
    }

    /// `job 17 (curate)`.
    pub fn title(&self) -> String {
        let array = self.array.map_or(String::new(), |jobs| format!(", array of {jobs}"));
        format!("job {} ({}{array})", self.id, self.kind.name())
    }
}

/// The jobs of a run, in the order in which they were submitted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Jobs {
    /// All of them.
    pub jobs: Vec<SubmittedJob>,
}

impl Jobs {
    /// The jobs of a run; none if none were submitted.
    ///
    /// # Errors
    /// If the list is there and cannot be read.
    pub fn read(run: &Path) -> Result<Self> {
        let path = run.join(JOBS_FILE);
        if !path.is_file() {
            return Ok(Self::default());
        }
        let text = read_regular_text(&path, MAX_CONFIG_BYTES)?;
        serde_json::from_str(&text).map_err(|e| {
            let hint = "move the file away; `squeue --me` lists the jobs that are in the queue";
            gradtx_run::failure::failed(format!("{}: expected a list of jobs: {e}", path.display()), hint)
        })
    }

    /// Adds a job to the list of its run.
    pub(super) fn add(run: &Path, job: SubmittedJob) -> Result<()> {
        let mut all = Self::read(run)?;
        all.jobs.push(job);
        all.write(run)
    }

    /// Takes jobs off the list.
    pub(super) fn remove(run: &Path, ids: &[String]) -> Result<()> {
        let mut all = Self::read(run)?;
        all.jobs.retain(|job| !ids.contains(&job.id));
        all.write(run)
    }

    fn write(&self, run: &Path) -> Result<()> {
        Ok(write_json(&run.join(JOBS_FILE), self)?)
    }
}
