//! `sweep`: runs for every combination of settings, and everything that they need.
//!
//! In: a sweep file. Out: the directories of [`gradtx_plan::sweep`], and with `--run` their
//! results: every distinct curation once, then for each run training, and clients' scores.
//!
//! * steps: the commands of a run, and their directories.
//! * execute: runs what is missing of them, one after the other.
//! * submit: submits what is missing as batch jobs of SLURM.

mod execute;
mod steps;
mod submit;

use crate::submit::ClusterArgs;
use anyhow::Result;
use gradtx_plan::sweep::Sweep;
use gradtx_run::context::Context;
use gradtx_run::failure::unusable;
use gradtx_run::paths::UPDATE_FILE;
use gradtx_run::text::quoted;
use gradtx_train::baselines::Method;
use std::path::{Path, PathBuf};

/// Which sweep, to where, and what to do about it.
#[derive(Clone, Debug, clap::Args)]
pub struct Job {
    /// Sweep file (TOML) of `[[sweep]]` tables.
    pub file: PathBuf,
    /// Directory for the runs' directories.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// List the runs that there would be, and write nothing.
    #[arg(long, conflicts_with_all = ["status", "run", "submit"])]
    pub list: bool,
    /// Show how far each run is, and write nothing.
    #[arg(long, conflicts_with_all = ["run", "submit"])]
    pub status: bool,
    /// Do everything that is missing, on this machine: each shared curation once, then for
    /// every run training, clients' scores and a report, and in the end their comparison. A run that
    /// fails does not stop the others; the same command resumes.
    #[arg(long, conflicts_with = "submit")]
    pub run: bool,
    /// Submit everything that is missing to SLURM: each shared curation as a job, for every run the
    /// jobs of `gradtx submit --stage pipeline` after it, and in the end their comparison.
    #[arg(long)]
    pub submit: bool,
    /// With --run or --submit, a client's directory: with train.jsonl, on which both models are fine-tuned, or
    /// update.safetensors; and with test.jsonl, if there is something to score; repeatable.
    #[arg(long, value_name = "DIR")]
    pub client: Vec<PathBuf>,
    /// With --client, a translator of their updates; repeatable.
    #[arg(long, value_enum, value_name = "METHOD", requires = "client", default_values_t = [Method::GradTransformer])]
    pub method: Vec<Method>,
    /// With --run, what starts the ranks of curate and train, such as `mpirun -n 4`; a program and
    /// its arguments, separated by spaces.
    #[arg(long, value_name = "COMMAND", requires = "run")]
    pub launcher: Option<String>,
    /// With --submit, print the scripts, the commands, and where each value is from; submit nothing.
    #[arg(long, requires = "submit")]
    pub dry_run: bool,
    /// With --submit, submit although jobs of these runs are still in the queue.
    #[arg(long, requires = "submit")]
    pub again: bool,
    /// With --submit, what the jobs ask SLURM for.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// Writes the runs' directories, shows them, or does all of it.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    let sweep = Sweep::read(&job.file, &job.out)?;
    if job.list {
        sweep.list(context);
        return Ok(());
    }
    if job.status {
        sweep.status(context);
        return Ok(());
    }
    if !job.client.is_empty() && !job.run && !job.submit {
        return Err(unusable("--client: expected --run or --submit with it"));
    }
    if job.cluster != ClusterArgs::default() && !job.submit {
        return Err(unusable("options of the cluster: expected --submit with them"));
    }
    job.client.iter().try_for_each(|dir| check_client(dir))?;
    let written = sweep.write()?;
    let (out, file) = (job.out.display(), quoted(&job.file.to_string_lossy()));
    let size =
        format!("sweep: {} in {out}, {written} new, {}", sweep.count_of_runs(), sweep.count_of_curations());
    if job.run {
        context.ui.line(size);
        return execute::run(context, job, &sweep);
    }
    if job.submit {
        context.ui.line(size);
        return submit::run(context, job, &sweep);
    }
    let place = quoted(&job.out.to_string_lossy());
    context.ui.line(format!("{size}; to do all of it: gradtx sweep {file} --out {place} --run, or --submit"));
    Ok(())
}

/// Refuses a client's directory that has nothing to begin with.
fn check_client(dir: &Path) -> Result<()> {
    if [UPDATE_FILE, steps::TRAIN_FILE].iter().any(|name| dir.join(name).is_file()) {
        return Ok(());
    }
    let expected = format!("expected {UPDATE_FILE} or {} there", steps::TRAIN_FILE);
    Err(unusable(format!("--client {}: {expected}", dir.display())))
}
