//! `submit`: stages as batch jobs of SLURM.
//!
//! In: a run, its configuration, and what to ask the cluster for. Out: the batch scripts
//! in `RUN/slurm`, each as it was submitted, and the jobs in the queue. Everything that
//! can be known to fail is looked at before: a job may wait for hours to find no data.

use crate::slurm::{self, Batch, Resources, Script, words};
use anyhow::{Context as _, Result};
use clap::ValueEnum;
use gradtx_models::decoder::DecoderConfig;
use gradtx_run::config::{Config, DeviceKind, RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::failure::{failed, unusable, unusable_with};
use gradtx_run::paths::UPDATE_FILE;
use gradtx_run::role::Role;
use gradtx_run::text::quoted;
use gradtx_runtime::artifact::write_atomic;
use gradtx_train::model_spec::model_dir;
use std::path::{Path, PathBuf};

/// GPUs of a node where nothing is said about them.
const GPUS_PER_NODE: u32 = 4;
/// Options of sbatch that ask for GPUs.
const GPU_OPTIONS: [&str; 3] = ["--gpus", "--gres=gpu", "--tres-per-task=gres"];

/// Whether the program that the jobs run can use GPUs: this one, unless the environment names another.
fn computes_on_gpus() -> bool {
    cfg!(feature = "cuda") || std::env::var_os("GRADTX").is_some_and(|program| !program.is_empty())
}

/// What to submit.
#[derive(Clone, Debug, clap::Args)]
pub struct Job {
    /// The run and its configuration.
    #[command(flatten)]
    pub run: RunArgs,
    /// Which part.
    #[arg(long, value_enum)]
    pub stage: Stage,
    /// Nodes of a job.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub nodes: u32,
    /// GPUs, and ranks, of a node; 0 for one rank on the CPU (default: 4, or 0 where the settings
    /// or this program compute on the CPU).
    #[arg(long, value_name = "G", value_parser = clap::value_parser!(u32).range(0..=1024))]
    pub gpus_per_node: Option<u32>,
    /// CPU cores of a rank.
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub cpus_per_task: u32,
    /// Curate by an array of this many jobs with a GPU each, instead of by ranks.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub array: Option<u32>,
    /// Time limit of a job; one that reaches it is requeued and continues.
    #[arg(long, default_value = "12:00:00", value_name = "TIME")]
    pub time: String,
    /// Partition.
    #[arg(long, value_name = "NAME")]
    pub partition: Option<String>,
    /// Account.
    #[arg(long, value_name = "NAME")]
    pub account: Option<String>,
    /// One more option of sbatch, e.g. `--extra=--constraint=a100`; repeatable.
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    pub extra: Vec<String>,
    /// With the stages evaluate and pipeline: directory of a client, with update.safetensors or
    /// train.jsonl, and test.jsonl if there is something to score; repeatable.
    #[arg(long, value_name = "DIR")]
    pub client: Vec<PathBuf>,
    /// Print the scripts and the commands, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
}

/// What can be submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Stage {
    /// Collect the tuples.
    Curate,
    /// Train the translator.
    Train,
    /// Score clients, and write the report; without clients, the report alone.
    Evaluate,
    /// All of these, each when the one before it has succeeded.
    Pipeline,
}

/// Submits what was asked for, after a look at everything that it needs.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    let (clients, device) = check(job)?;
    let run = std::path::absolute(&job.run.run)?;
    words::check_path("--run", &run)?;
    let program = std::env::current_exe().context("cannot find the path of this program")?;
    words::check_path("the program", &program)?;
    let resources = job.resources(device);
    let batches = job.batches(&clients);
    let place = |batch: &Batch| run.join("slurm").join(format!("{}.sbatch", batch.name));
    if job.dry_run {
        for (i, batch) in batches.iter().enumerate() {
            let script = place(batch);
            let before = (i > 0).then(|| format!("<id of {}>", batches[i - 1].name));
            let words = slurm::sbatch_arguments(&script, before.as_deref());
            let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
            context.ui.result(format!("# {}", script.display()));
            context.ui.result(batch.render(&resources, &program, &run).trim_end());
            context.ui.result(format!("# command: sbatch {}", words.join(" ")));
        }
        return Ok(());
    }
    slurm::find_sbatch()?;
    // The jobs read them there.
    RunSettings::open(&job.run)?.store(&context.ui)?;
    for dir in ["slurm", "logs"].map(|name| run.join(name)) {
        std::fs::create_dir_all(&dir).with_context(|| format!("{}: cannot make", dir.display()))?;
    }
    for batch in &batches {
        let text = batch.render(&resources, &program, &run);
        write_atomic(&place(batch), |out| std::io::Write::write_all(out, text.as_bytes()))?;
    }
    let mut ids: Vec<String> = vec![];
    for batch in &batches {
        match slurm::sbatch(&place(batch), ids.last().map(String::as_str)) {
            Ok(id) => ids.push(id),
            // A chain without its end is of no use.
            Err(error) if ids.is_empty() => return Err(error),
            Err(error) => {
                return Err(match slurm::scancel(&ids) {
                    Ok(()) => error,
                    Err(e) => error.context(format!("{e:#}; still in the queue: {}", ids.join(" "))),
                });
            }
        }
        let id = ids.last().expect("one was just added");
        context.ui.result(format!("job {id}: {}, {}", batch.name, place(batch).display()));
    }
    let logs = quoted(&job.run.run.join("logs").to_string_lossy());
    context.ui.line(format!("watch: squeue --jobs={}; logs: {logs}", ids.join(",")));
    Ok(())
}

/// Looks at configuration, models, data and clients; the clients' directories as absolute
/// paths, and the kind of device of the settings. Writes nothing.
fn check(job: &Job) -> Result<(Vec<String>, DeviceKind)> {
    job.check_words()?;
    let settings = RunSettings::open(&job.run)?;
    let config = settings.config();
    job.check_gpus(config.device.kind)?;
    if job.array.is_some() && !matches!(job.stage, Stage::Curate | Stage::Pipeline) {
        return Err(unusable("--array: only curation runs as an array"));
    }
    if !job.client.is_empty() && !matches!(job.stage, Stage::Evaluate | Stage::Pipeline) {
        return Err(unusable("--client: only for the stages evaluate and pipeline"));
    }
    check_model(config, Role::Tiny)?;
    check_model(config, Role::Llm)?;
    if matches!(job.stage, Stage::Curate | Stage::Pipeline) {
        check_data(config)?;
    }
    let missing = match job.stage {
        Stage::Train => Some((settings.tuples_dir().join("manifest.json"), "tuple store", "curate")),
        Stage::Evaluate if !job.client.is_empty() => {
            Some((settings.translator_dir().join("validation.json"), "trained translator", "train"))
        }
        _ => None,
    };
    // A job that waits for another one finds there what is not there yet.
    let waits = job.extra.iter().any(|option| option.starts_with("--dependency"));
    if let Some((file, what, stage)) = missing.filter(|(file, ..)| !waits && !file.is_file()) {
        let hint = format!(
            "submit the stage {stage} first, or the stage pipeline, or add --extra=--dependency=afterok:JOB"
        );
        return Err(failed(format!("{}: there is no {what}", file.display()), hint));
    }
    let clients = job.client.iter().map(|dir| check_client(dir)).collect::<Result<_>>()?;
    Ok((clients, config.device.kind))
}

fn check_model(config: &Config, role: Role) -> Result<()> {
    let (name, dir) = (role.name(), model_dir(config, role)?);
    DecoderConfig::read(dir).with_context(|| format!("models.{name}"))?;
    let entries = std::fs::read_dir(dir).with_context(|| format!("models.{name}: {}", dir.display()))?;
    let names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    let has = |found: &dyn Fn(&str) -> bool| names.iter().any(|name| name.to_str().is_some_and(found));
    for (found, what) in [
        (has(&|name| name == "tokenizer.json"), "tokenizer.json"),
        (has(&|name| name.ends_with(".safetensors")), "weights in safetensors files"),
    ] {
        if !found {
            return Err(unusable(format!("models.{name}: {}: expected {what}, found none", dir.display())));
        }
    }
    Ok(())
}

fn check_data(config: &Config) -> Result<()> {
    for path in config.data.public.as_slice() {
        let wrong = match path {
            path if path.as_os_str().is_empty() => "not set; expected a JSONL, JSON or Parquet file",
            path if !path.exists() => "there is no such file or directory",
            _ => continue,
        };
        return Err(unusable(format!("data.public: {}: {wrong}", path.display())));
    }
    Ok(())
}

fn check_client(dir: &Path) -> Result<String> {
    if ![UPDATE_FILE, "train.jsonl"].iter().any(|name| dir.join(name).is_file()) {
        let what = format!("--client {}: expected {UPDATE_FILE} or train.jsonl there", dir.display());
        return Err(unusable(what));
    }
    let dir = std::path::absolute(dir)?;
    Ok(words::check_argument("--client", &dir)?.to_string())
}

impl Job {
    /// Refuses what must not stand in a batch script.
    fn check_words(&self) -> Result<()> {
        words::check_time("--time", &self.time)?;
        self.partition.iter().try_for_each(|name| words::check_name("--partition", name))?;
        self.account.iter().try_for_each(|name| words::check_name("--account", name))?;
        self.extra.iter().try_for_each(|word| words::check_option("--extra", word))
    }

    /// GPUs of a node: as asked for, or as the settings can use.
    fn gpus(&self, device: DeviceKind) -> u32 {
        let usual = if device != DeviceKind::Cpu && computes_on_gpus() { GPUS_PER_NODE } else { 0 };
        self.gpus_per_node.unwrap_or(usual)
    }

    /// Refuses GPUs that the jobs would leave idle, and jobs that would find none.
    fn check_gpus(&self, device: DeviceKind) -> Result<()> {
        let in_extra = |word: &String| GPU_OPTIONS.iter().any(|option| word.starts_with(option));
        let extra = self.extra.iter().find(|word| in_extra(word));
        let gpus = self.gpus(device);
        let asked = match extra {
            Some(word) => format!("--extra={word}"),
            None => format!("--gpus-per-node {gpus}"),
        };
        let (what, hint) = match (device, gpus > 0 || extra.is_some()) {
            (DeviceKind::Auto | DeviceKind::Cuda, true) if !computes_on_gpus() => (
                format!("{asked}: this program was built without CUDA and would leave the GPUs idle"),
                "build it with `--features cuda`, or submit with --gpus-per-node 0",
            ),
            (DeviceKind::Cpu, true) => (
                format!("{asked}: device.kind is cpu, which would leave the GPUs idle"),
                "add --device auto, or submit with --gpus-per-node 0",
            ),
            (DeviceKind::Cuda, false) => (
                format!("device.kind is cuda, but the jobs ask for no GPUs ({asked})"),
                "submit with --gpus-per-node 1 or more, or add --device auto",
            ),
            _ => return Ok(()),
        };
        Err(unusable_with(what, Some(hint.into())))
    }

    fn resources(&self, device: DeviceKind) -> Resources {
        Resources {
            gpus_per_node: self.gpus(device) as usize,
            cpus_per_task: self.cpus_per_task as usize,
            time: self.time.clone(),
            partition: self.partition.clone(),
            account: self.account.clone(),
            extra: self.extra.clone(),
        }
    }

    /// The jobs, in the order in which they follow each other.
    fn batches(&self, clients: &[String]) -> Vec<Batch> {
        let batch = |script, name: &str, nodes| Batch {
            script,
            name: format!("gradtx-{name}"),
            nodes,
            array: None,
            arguments: vec![],
        };
        let nodes = self.nodes as usize;
        let curate = match self.array {
            Some(jobs) => Batch { array: Some(jobs as usize), ..batch(Script::CurateArray, "curate", 1) },
            None => batch(Script::Curate, "curate", nodes),
        };
        let train = batch(Script::Train, "train", nodes);
        let mut scores = vec![batch(Script::Evaluate, "report", 1)];
        if !clients.is_empty() {
            let evaluate = batch(Script::Evaluate, "evaluate", 1);
            scores.insert(0, Batch { array: Some(clients.len()), arguments: clients.to_vec(), ..evaluate });
        }
        match self.stage {
            Stage::Curate => vec![curate],
            Stage::Train => vec![train],
            Stage::Evaluate => scores,
            Stage::Pipeline => [curate, train].into_iter().chain(scores).collect(),
        }
    }
}
