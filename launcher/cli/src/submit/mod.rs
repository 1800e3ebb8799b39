//! `submit`: stages as batch jobs of SLURM.
//!
//! In: a run, its configuration, and what to ask the cluster for. Out: the batch scripts
//! in `RUN/slurm`, each as it was submitted, the jobs in the queue, and their list in
//! `RUN/slurm/jobs.json`. What the jobs would fail of is examined before.
//!
//! * args: the options as typed.
//! * check: what is examined.
//! * advice: what `gradtx plan` recommends.
//! * chain: the jobs and what they wait for.

mod advice;
mod args;
mod chain;
mod check;

pub use args::{ClusterArgs, Job, Stage};
pub use chain::{Asked, Chain};

use crate::slurm::{self, Batch, JobKind, Jobs, SubmittedJob, dependency_option, queue, words};
use anyhow::{Context as _, Result};
use gradtx_run::config::RunSettings;
use gradtx_run::context::Context;
use gradtx_run::failure::{busy, failed};
use gradtx_run::text::quoted;
use std::path::Path;

/// Submits what was asked for, after a look at everything that it needs.
///
/// # Errors
/// If something is missing or cannot be used, if the same jobs are in the queue already, or SLURM
/// refuses.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    let batches = prepare(context, job)?;
    if job.dry_run {
        print(context, &batches);
        return Ok(());
    }
    let ids = slurm::submit_all(&batches, |batch, submitted| {
        let (title, place) = (&submitted.id, batch.place());
        context.ui.result(format!("job {title}: {}, {}", batch.name(), place.display()));
    })?;
    let shown = quoted(&job.run.run.to_string_lossy());
    context.ui.line(format!("watch: gradtx status {shown}; squeue --jobs={}", ids.join(",")));
    context.ui.line(format!("logs: gradtx logs {shown}; end all of it: gradtx cancel {shown}"));
    Ok(())
}

/// The jobs of a submission, after a look at everything that they need; the settings that they read
/// are stored in the run, unless it is a dry run.
///
/// # Errors
/// If something is missing or cannot be used, or the same jobs are in the queue already.
pub fn prepare(context: &Context, job: &Job) -> Result<Vec<Batch>> {
    let (clients, config) = check::check(job)?;
    let run = std::path::absolute(&job.run.run)?;
    words::check_path("--run", &run)?;
    let program = std::env::current_exe().context("cannot find the path of this program")?;
    words::check_path("the program", &program)?;
    let site = job.cluster.site()?;
    let chain = Chain {
        run,
        program,
        stage: job.stage,
        array: job.cluster.array.map(|array| array.jobs),
        clients,
        needed: chain::directories(&config),
        reused: chain::reused(&config),
    };
    let mut asked = Asked::resolve(&chain, &job.cluster, &site, &config)?;
    let advice = advice::find(context, job, &site, &config, &asked)?;
    advice.apply(&mut asked);
    let batches = chain.batches(&asked, &site)?;
    if job.dry_run {
        advice.lines.iter().for_each(|line| context.ui.result(format!("# {line}")));
        return Ok(batches);
    }
    queue::find_sbatch()?;
    if !job.again {
        refuse_twice(&chain.run, &batches)?;
    }
    advice.lines.iter().for_each(|line| context.ui.line(line.clone()));
    // The jobs read them there.
    RunSettings::open(&advice.settings(&job.run))?.store(&context.ui)?;
    Ok(batches)
}

/// Prints what would be submitted.
pub fn print(context: &Context, batches: &[Batch]) {
    let say = |line: String| context.ui.result(line);
    for batch in batches {
        let script = batch.place();
        let dependency =
            dependency_option(&batch.after, |index| format!("<id of gradtx-{}>", batches[index].kind.name()));
        let words = queue::sbatch_arguments(&script, dependency.as_deref());
        let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
        say(format!("# {}", script.display()));
        say(batch.render().trim_end().into());
        batch.options.lines().into_iter().for_each(|line| say(format!("# {line}")));
        say(format!("# command: sbatch {}", words.join(" ")));
    }
}

/// Refuses jobs that are in the queue already.
fn refuse_twice(run: &Path, batches: &[Batch]) -> Result<()> {
    let kinds: Vec<JobKind> = batches.iter().map(|batch| batch.kind).collect();
    let jobs = Jobs::read(run)?.jobs;
    let same: Vec<&SubmittedJob> = jobs.iter().filter(|job| kinds.contains(&job.kind)).collect();
    let ids: Vec<String> = same.iter().map(|job| job.id.clone()).collect();
    let shown = quoted(&run.to_string_lossy());
    let queued = queue::squeue(&ids).map_err(|error| {
        let what = format!("{}: jobs of this run were submitted before: {}", run.display(), ids.join(" "));
        let hint = "see whether they are in the queue; if not, submit with --again";
        failed(format!("{what}; {error:#}"), hint)
    })?;
    let Some((job, found)) =
        same.iter().find_map(|job| Some((job, queued.iter().find(|queued| queued.id == job.id)?)))
    else {
        return Ok(());
    };
    let what = format!("{}: {} is in the queue already: {}", run.display(), job.title(), found.state);
    let hint =
        format!("gradtx status {shown} shows it, gradtx cancel {shown} ends it; --again submits another");
    Err(busy(what, hint))
}
