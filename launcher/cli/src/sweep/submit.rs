//! A sweep as batch jobs of SLURM.
//!
//! In: the directories of a sweep, and what its jobs ask for. Out: in the queue, for each distinct
//! curation that is not finished a job; for each run that is not finished the jobs of `gradtx submit
//! --stage pipeline`, which wait for the curation that they share; and one that compares all runs when
//! they have ended, however they did. Scripts and lists of jobs are in the directories of the runs.

use super::Job;
use super::execute::finished;
use super::steps;
use crate::slurm::{self, Batch, Dependency, JobRef, Script};
use crate::submit::{self, Stage};
use anyhow::Result;
use gradtx_plan::sweep::Sweep;
use gradtx_run::config::{RunArgs, SweptRun};
use gradtx_run::context::Context;
use gradtx_run::paths::SHADOW_DIR;
use gradtx_run::text::{counted, quoted};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Submits what is missing.
///
/// # Errors
/// If something that a job needs is not there, if jobs of the sweep are in the queue already, or SLURM
/// refuses; jobs that were submitted before the refusal are cancelled.
pub fn run(context: &Context, job: &Job, sweep: &Sweep) -> Result<()> {
    let batches = Planned { context, job, sweep, batches: vec![] }.all()?;
    if batches.is_empty() {
        context.ui.result("sweep: every run is finished; nothing is submitted");
        return Ok(());
    }
    if job.dry_run {
        submit::print(context, &batches);
        return Ok(());
    }
    let ids = slurm::submit_all(&batches, |batch, submitted| {
        context.ui.result(format!("job {}: {}, {}", submitted.id, batch.name(), batch.place().display()));
    })?;
    let shown = quoted(&job.out.to_string_lossy());
    context.ui.line(format!("watch: gradtx status {shown}; squeue --jobs={}", ids.join(",")));
    context.ui.line(format!("end all of it: gradtx cancel {shown}"));
    Ok(())
}

/// The jobs of a sweep, as they are collected.
struct Planned<'a> {
    context: &'a Context,
    job: &'a Job,
    sweep: &'a Sweep,
    batches: Vec<Batch>,
}

impl Planned<'_> {
    fn all(mut self) -> Result<Vec<Batch>> {
        let sweep = self.sweep;
        let mut curations: HashMap<&Path, usize> = HashMap::new();
        for curation in &sweep.curations {
            if finished(&curation.dir.join(SHADOW_DIR), &curation.dir).is_none() {
                let batches = self.prepare(&curation.dir, Stage::Curate, vec![])?;
                curations.insert(&curation.dir, self.append(batches, None));
            }
        }
        let mut ends = vec![];
        for run in &sweep.runs {
            if self.is_finished(run) {
                continue;
            }
            let batches = self.prepare(&sweep.dir(run), Stage::Pipeline, self.job.client.clone())?;
            let after = curations.get(run.config.reuse.tuples.as_path()).copied();
            ends.push(self.append(batches, after));
        }
        let runs = counted(ends.len(), "run");
        self.context.ui.line(format!("sweep: {runs} and {} to do", counted(curations.len(), "curation")));
        if let Some(last) = ends.last() {
            let compare = self.comparison(&self.batches[*last], &ends);
            self.batches.push(compare);
        }
        Ok(self.batches)
    }

    /// The jobs of a part of a run, checked.
    fn prepare(&self, run: &Path, stage: Stage, client: Vec<PathBuf>) -> Result<Vec<Batch>> {
        let mut cluster = self.job.cluster.clone();
        if stage != Stage::Curate {
            cluster.array = None;
            cluster.set_methods(&self.job.method);
        }
        let run = RunArgs::stored(run);
        let Job { dry_run, again, .. } = *self.job;
        submit::prepare(self.context, &submit::Job { run, stage, client, cluster, dry_run, again })
    }

    /// Adds jobs, the first of which waits for the one at `after`; returns the place of the last.
    fn append(&mut self, mut batches: Vec<Batch>, after: Option<usize>) -> usize {
        let offset = self.batches.len();
        for batch in &mut batches {
            for dependency in &mut batch.after {
                if let JobRef::Batch(place) = &mut dependency.on {
                    *place += offset;
                }
            }
        }
        if let Some(first) = batches.first_mut() {
            first.after.extend(after.map(Dependency::ok));
        }
        self.batches.extend(batches);
        self.batches.len() - 1
    }

    /// The job that compares all runs, with what the report of one of them asks for.
    fn comparison(&self, report: &Batch, ends: &[usize]) -> Batch {
        let mut batch = Batch {
            run: self.sweep.out.clone(),
            script: Script::Compare,
            after: ends.iter().copied().map(Dependency::any).collect(),
            ..report.clone()
        };
        if batch.prelude.container.is_some() {
            batch.prelude.needed.push(self.sweep.out.clone());
        }
        batch
    }

    /// Whether everything of a run is there, but for what is always done.
    fn is_finished(&self, run: &SweptRun) -> bool {
        let dir = self.sweep.dir(run);
        let steps = steps::of_run(&dir, &self.job.client, &self.job.method);
        steps
            .iter()
            .filter_map(|step| step.dir.as_ref())
            .all(|made| finished(&dir.join(made), &dir).is_some())
    }
}
