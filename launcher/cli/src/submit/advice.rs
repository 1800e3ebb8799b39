//! What `gradtx plan` recommends for a submission.
//!
//! In: the run's settings, what its jobs ask for, and the kind of the GPUs, where somebody said
//! it. Out: [`Advice`]: nodes for curation and training, and the number of shadow jobs that share
//! a stream. What was set for the job itself, or in the run's settings, stays as it is.

use super::args::Job;
use super::chain::Asked;
use crate::slurm::Profile;
use crate::slurm::options::{JobKind, Resolved};
use anyhow::{Context as _, Result};
use clap::ValueEnum;
use gradtx_plan::cost::{Gpu, Prediction};
use gradtx_plan::plan;
use gradtx_run::config::{Config, PrivacyArgs, RUN_FILE, RunArgs};
use gradtx_run::context::Context;
use gradtx_run::failure::unusable;
use gradtx_runtime::artifact::{MAX_CONFIG_BYTES, read_regular_text};

/// The setting that a recommendation may fill in.
const JOBS_PER_BATCH: [&str; 2] = ["curate", "jobs_per_batch"];

/// What to change, and what to say about it.
#[derive(Clone, Debug, Default)]
pub struct Advice {
    /// Nodes of curation.
    curate: Option<u32>,
    /// Nodes of training, and GPUs of each.
    train: Option<(u32, u32)>,
    /// Shadow jobs that share a stream.
    concurrent: Option<usize>,
    /// What was found, for people.
    pub lines: Vec<String>,
}

/// Plans the jobs that have ranks.
///
/// # Errors
/// If the kind of GPU is unknown, or the plan cannot be made.
pub fn find(context: &Context, job: &Job, site: &Profile, config: &Config, asked: &Asked) -> Result<Advice> {
    let (curate, train) = (asked.of(JobKind::Curate), asked.of(JobKind::Train));
    let ranks: Vec<&Resolved> =
        [curate.filter(|_| job.cluster.array.is_none()), train].into_iter().flatten().collect();
    let Some(most) = ranks.iter().copied().max_by_key(|asked| asked.options.nodes) else {
        return Ok(Advice::default());
    };
    let Some(gpu) = gpu(job, site, most)? else {
        return Ok(Advice {
            lines: vec![
                "nodes are as asked for; with --gpu KIND, or `gpu` in a profile, gradtx plan chooses them"
                    .into(),
            ],
            ..Advice::default()
        });
    };
    if most.gpus().per_node == 0 {
        return Ok(Advice::default());
    }
    let planned = planned(context, config, most, gpu)?;
    let best = &planned.recommended;
    let free = |asked: Option<&Resolved>| asked.is_some_and(|asked| !asked.origin("nodes").is_of_the_job());
    let has_ranks = curate.is_some() && job.cluster.array.is_none();
    let mut advice = Advice { lines: vec![plan::recommendation(&planned)], ..Advice::default() };
    advice.lines.extend(planned.warnings.iter().filter(|line| line.contains("needs")).cloned());
    if has_ranks && free(curate) {
        advice.curate = Some(best.curate_nodes as u32);
    }
    if free(train) {
        advice.train = Some((best.train_nodes as u32, best.train_gpus_per_node as u32));
    }
    if has_ranks && best.curate_concurrent != config.curate.jobs_per_batch && !is_set(&job.run)? {
        advice.concurrent = Some(best.curate_concurrent);
        let [section, key] = JOBS_PER_BATCH;
        advice.lines.push(format!(
            "{section}.{key} = {} is stored in the run; set it in the run file to keep another",
            best.curate_concurrent
        ));
    }
    Ok(advice)
}

/// The kind of the GPUs: as said, or as their type for SLURM has it.
fn gpu(job: &Job, site: &Profile, asked: &Resolved) -> Result<Option<Gpu>> {
    if job.cluster.gpu.is_some() {
        return Ok(job.cluster.gpu);
    }
    if let Some(name) = &site.gpu {
        let kinds: Vec<&str> = Gpu::value_variants().iter().map(|gpu| gpu.name()).collect();
        let found = Gpu::value_variants().iter().find(|gpu| gpu.name() == name);
        return found.copied().map(Some).ok_or_else(|| {
            unusable(format!("{}: gpu: expected one of {}, found `{name}`", site.file, kinds.join(", ")))
        });
    }
    Ok(asked.gpus().gres_type.as_deref().and_then(Gpu::from_name))
}

/// What the run takes on the nodes that are asked for.
fn planned(context: &Context, config: &Config, asked: &Resolved, gpu: Gpu) -> Result<Prediction> {
    let job = plan::Job {
        config: None,
        run: None,
        sweep: None,
        preset: None,
        set: vec![],
        nodes: asked.options.nodes.unwrap_or(1),
        gpus_per_node: asked.gpus().per_node,
        gpu,
        calibrate: vec![],
        tokens_per_example: None,
        labels_per_example: None,
        clients: 1,
        test_examples: 1000,
        privacy: PrivacyArgs::default(),
        examples: None,
    };
    plan::prediction(context, &job, config).context("cannot plan the jobs, which --gpu asks for")
}

/// Whether somebody has set how many shadow jobs share a stream.
fn is_set(args: &RunArgs) -> Result<bool> {
    let [section, key] = JOBS_PER_BATCH;
    let stored = args.run.join(RUN_FILE);
    if stored.is_file() {
        return Ok(true);
    }
    let name = format!("{section}.{key}");
    let typed =
        args.set.iter().any(|entry| entry.split('=').next().is_some_and(|typed| typed.trim() == name));
    let Some(file) = args.config.as_ref().filter(|_| !typed) else { return Ok(typed) };
    let table: toml::Table = read_regular_text(file, MAX_CONFIG_BYTES)?.parse()?;
    Ok(table.get(section).and_then(|section| section.get(key)).is_some())
}

impl Advice {
    /// Changes what the jobs ask for.
    pub fn apply(&self, asked: &mut Asked) {
        let curate = self.curate.zip(asked.of_mut(JobKind::Curate));
        if let Some((nodes, asked)) = curate {
            let gpus = asked.gpus().per_node;
            asked.recommended(nodes, gpus);
        }
        if let Some(((nodes, gpus), asked)) = self.train.zip(asked.of_mut(JobKind::Train)) {
            asked.recommended(nodes, gpus);
        }
    }

    /// The run's arguments with the settings that were filled in.
    pub fn settings(&self, args: &RunArgs) -> RunArgs {
        let mut args = args.clone();
        args.set.extend(self.concurrent.map(|jobs| format!("{}={jobs}", JOBS_PER_BATCH.join("."))));
        args
    }
}
