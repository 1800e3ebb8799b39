//! `plan`: what a run will take, before anything runs.
//!
//! In: a configuration (or a sweep of them), the base models' `config.json`, the public data
//! where it is there, and a cluster. Out: memory per rank, time and GPU hours of every stage,
//! how shadow jobs spread over ranks, and what will not fit; see [`crate::cost`]. Nothing is
//! written.

use crate::cost::calibrate::Calibration;
use crate::cost::device::Hardware;
use crate::cost::memory::Model;
use crate::cost::prediction::{Emulating, Stage};
use crate::cost::products::ByProducts;
use crate::cost::rates::{Basis, Kind};
use crate::cost::{Cluster, Gpu, Lengths, Prediction, Question, Rates, predict};
use crate::privacy;
use crate::sweep_cost::SweepCost;
use anyhow::{Context as _, Result};
use clap::builder::ArgPredicate;
use comfy_table::{CellAlignment, Table, presets};
use gradtx_run::config::{Config, DeviceKind, DtypeKind, GroupBy, Preset, PrivacyArgs, read_sweep};
use gradtx_run::context::Context;
use gradtx_run::failure::{unusable, unusable_with};
use gradtx_run::role::Role;
use gradtx_run::text::{counted, human_seconds};
use gradtx_runtime::plan::{available_memory, human_bytes};
use gradtx_train::examples::Data;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Where benchmark results are found, from the working directory.
const RESULTS: &str = "benches/results";

/// Ranks of a cluster that is planned for.
const MAX_RANKS: u32 = 1_000_000;
/// Tokens of an example.
const MAX_TOKENS: i64 = 16 << 20;

/// What to plan, for which machines.
#[derive(Debug, clap::Args)]
pub struct Job {
    /// Run file (TOML).
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Run directory whose run.toml to take, where there is no --config.
    #[arg(long, value_name = "DIR")]
    pub run: Option<PathBuf>,
    /// Sweep file (TOML): all of its runs, summed up.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["config", "run", "preset", "set"])]
    pub sweep: Option<PathBuf>,
    /// Settings that take the place of the run file's, before --set.
    #[arg(long, value_enum)]
    pub preset: Option<Preset>,
    /// Override one setting, e.g. `--set train.learning_rate=0.002`; repeatable.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Nodes.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub nodes: u32,
    /// GPUs of a node, one rank each; with `--gpu cpu`, ranks of a node.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub gpus_per_node: u32,
    /// What they are.
    #[arg(
        long,
        value_enum,
        required = false,
        required_unless_present = "dp",
        default_value_if("dp", ArgPredicate::IsPresent, "cpu")
    )]
    pub gpu: Gpu,
    /// File or directory of benchmark results (JSON lines) to take rates from, before those
    /// in benches/results; repeatable.
    #[arg(long, value_name = "FILE")]
    pub calibrate: Vec<PathBuf>,
    /// Tokens of an example, instead of counting them in the public data.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=MAX_TOKENS))]
    pub tokens_per_example: Option<u32>,
    /// How many of these are trained on (default: four of ten).
    #[arg(long, value_name = "N", requires = "tokens_per_example")]
    pub labels_per_example: Option<u32>,
    /// Clients to be served.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub clients: u32,
    /// Test examples of each client.
    #[arg(long, default_value_t = 1000, value_name = "N")]
    pub test_examples: u32,
    /// Instead of machines: what a private fine-tuning would cost and how noisy it would be.
    #[command(flatten)]
    pub privacy: PrivacyArgs,
    /// With --dp-epsilon or --dp-noise-multiplier: examples of the client.
    #[arg(long, value_name = "N", requires = "dp", value_parser = clap::value_parser!(u32).range(1..=1_000_000_000))]
    pub examples: Option<u32>,
}

/// Predicts, and prints.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    if job.privacy.is_typed() {
        return privacy::run(context, job);
    }
    let mut planner = Planner::new(context, job)?;
    let Some(file) = &job.sweep else {
        let config = Config::look(job.run.as_deref(), job.config.as_deref(), job.preset, &job.set)?;
        let found = planner.predict(&config)?;
        match context.ui.is_json() {
            true => context.ui.result_object("plan", serde_json::to_value(&found)?),
            false => context.ui.result(page(&found)),
        }
        return Ok(());
    };
    let runs = read_sweep(file)?;
    let found = runs.iter().map(|run| {
        let prediction = planner.predict(&run.config).with_context(|| run.name.clone())?;
        Ok((run.name.clone(), run.config.curation_hash(), prediction))
    });
    let found = SweepCost::of(found.collect::<Result<Vec<_>>>()?);
    match context.ui.is_json() {
        true => context.ui.result_object("plan", serde_json::to_value(&found)?),
        false => context.ui.result(sweep_page(&found, hours(job.gpu))),
    }
    Ok(())
}

/// What a configuration takes on the cluster of a job, whose own configuration is not looked at.
///
/// # Errors
/// If models, data or calibration cannot be read, or the settings do not go with the cluster.
pub fn prediction(context: &Context, job: &Job, config: &Config) -> Result<Prediction> {
    Planner::new(context, job)?.predict(config)
}

/// Predicts configurations for one cluster; reads every data file once.
struct Planner<'a> {
    context: &'a Context,
    job: &'a Job,
    cluster: Cluster,
    rates: Rates,
    memory: u64,
    /// Lengths of data that was read, by what they depend on.
    counted: HashMap<String, Rc<Lengths>>,
    data: HashMap<String, Rc<Data>>,
}

impl<'a> Planner<'a> {
    fn new(context: &'a Context, job: &'a Job) -> Result<Self> {
        let ranks = job.nodes.saturating_mul(job.gpus_per_node);
        if ranks > MAX_RANKS {
            let what = format!("--nodes {} --gpus-per-node {}", job.nodes, job.gpus_per_node);
            return Err(unusable(format!("{what}: expected at most {MAX_RANKS} ranks, found {ranks}")));
        }
        let per_node = job.gpus_per_node as usize;
        let cluster = Cluster {
            nodes: job.nodes as usize,
            gpus_per_node: per_node,
            gpu: job.gpu,
            threads: (context.threads / per_node).max(1),
        };
        let mut calibration = Calibration::default();
        let results = Path::new(RESULTS);
        if results.is_dir() {
            calibration.read(results)?;
        }
        job.calibrate.iter().try_for_each(|path| calibration.read(path))?;
        let memory = match job.gpu {
            // The machine at hand stands for a node.
            Gpu::Cpu => available_memory()? / per_node as u64,
            _ => Hardware::of(&cluster).memory,
        };
        let rates = Rates::new(&cluster, &calibration);
        Ok(Self { context, job, cluster, rates, memory, counted: HashMap::new(), data: HashMap::new() })
    }

    fn predict(&mut self, config: &Config) -> Result<Prediction> {
        let config = &config.expected();
        check_gpu(config, self.job.gpu)?;
        let models = [Role::Tiny, Role::Llm].map(|role| model(config, role));
        let [tiny, llm] = models;
        let models = [tiny?, llm?];
        let lengths = [self.lengths(config, Role::Tiny)?, self.lengths(config, Role::Llm)?];
        let groups = match &config.curate.group_by {
            GroupBy::Random => vec![],
            _ if !lengths[0].counted => vec![],
            GroupBy::Column(column) => {
                self.data(config)?.groups(column)?.into_iter().map(|group| group.rows).collect()
            }
        };
        let question = Question {
            config,
            models: &models,
            lengths: [&lengths[0], &lengths[1]],
            groups: &groups,
            cluster: self.cluster,
            memory: self.memory,
            clients: self.job.clients as usize,
            test_examples: self.job.test_examples as usize,
        };
        let mut found = predict(&question, &self.rates)?;
        if self.job.gpu != Gpu::Cpu && config.device.dtype == DtypeKind::F32 {
            let what = "device.dtype is f32, but GPUs are planned for in bf16: values and activations take twice as much";
            found.warnings.push(what.into());
        }
        Ok(found)
    }

    fn data(&mut self, config: &Config) -> Result<Rc<Data>> {
        let key = format!("{:?}", (&config.data.public, config.data.split, config.data.reading()));
        if let Some(data) = self.data.get(&key) {
            return Ok(data.clone());
        }
        let data = Rc::new(Data::read(config.data.public.as_slice(), &config.data, "data.public")?);
        data.announce(self.context);
        self.data.insert(key, data.clone());
        Ok(data)
    }

    fn lengths(&mut self, config: &Config, role: Role) -> Result<Rc<Lengths>> {
        if let Some(tokens) = self.job.tokens_per_example {
            let labels = self.job.labels_per_example.unwrap_or((tokens * 2).div_ceil(5));
            if labels >= tokens {
                return Err(unusable(format!(
                    "--labels-per-example {labels}: expected fewer than the {tokens} tokens"
                )));
            }
            return Ok(Rc::new(Lengths::uniform(tokens as usize, labels as usize)));
        }
        let missing = config.data.public.as_slice().iter().find(|path| !path.exists());
        if let Some(path) = missing {
            let why = match path.as_os_str().is_empty() {
                true => "data.public: not set".to_string(),
                false => format!("data.public: {}: no such file", path.display()),
            };
            return Err(unusable(format!("{why}; give --tokens-per-example to plan without data")));
        }
        let dir = directory(config, role)?;
        let key = format!("{:?}", (&config.data, dir));
        if let Some(lengths) = self.counted.get(&key) {
            return Ok(lengths.clone());
        }
        let data = self.data(config)?;
        let lengths = Rc::new(Lengths::of_data(&data, config, dir, self.context.threads)?);
        self.counted.insert(key, lengths.clone());
        Ok(lengths)
    }
}

/// Refuses a plan for devices that the settings would not use.
fn check_gpu(config: &Config, gpu: Gpu) -> Result<()> {
    let (what, hint) = match (config.device.kind, gpu) {
        (DeviceKind::Cpu, gpu) if gpu != Gpu::Cpu => (
            format!("--gpu {}: device.kind is cpu, which would leave the GPUs idle", gpu.name()),
            "plan with --set device.kind=auto, or with --gpu cpu",
        ),
        (DeviceKind::Cuda, Gpu::Cpu) => (
            "--gpu cpu: device.kind is cuda, which does not compute on a CPU".to_string(),
            "plan with --set device.kind=auto, or for a GPU",
        ),
        _ => return Ok(()),
    };
    Err(unusable_with(what, Some(hint.into())))
}

pub(crate) fn directory(config: &Config, role: Role) -> Result<&Path> {
    let dir = match role {
        Role::Tiny => &config.models.tiny,
        Role::Llm => &config.models.llm,
    };
    if dir.as_os_str().is_empty() {
        let what = format!("models.{}: not set; expected a directory with a config.json", role.name());
        return Err(unusable(what));
    }
    Ok(dir)
}

fn model(config: &Config, role: Role) -> Result<Model> {
    Model::read(directory(config, role)?, role, &config.lora)
}

/// A number of three digits with the SI prefix for its size.
fn si(x: f64) -> String {
    for (size, prefix) in [(1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")] {
        if x >= size {
            return format!("{:.2} {prefix}", x / size);
        }
    }
    format!("{x:.0} ")
}

fn hours(gpu: Gpu) -> &'static str {
    if gpu == Gpu::Cpu { "rank hours" } else { "GPU hours" }
}

/// All of a prediction, for people.
fn page(p: &Prediction) -> String {
    let Cluster { nodes, gpus_per_node, gpu, threads } = p.cluster;
    let each = if gpu == Gpu::Cpu { format!(" of {threads} threads") } else { String::new() };
    let mut lines = vec![
        format!(
            "{}: {} of {gpus_per_node} {}{each}",
            counted(p.ranks, "rank"),
            counted(nodes, "node"),
            gpu.name()
        ),
        format!("examples: tiny {}; llm {}", p.examples[0], p.examples[1]),
        table(p).to_string(),
        curation(p),
        training(p),
        by_products(p),
        recommendation(p),
    ];
    lines.extend(p.emulation.as_ref().map(emulation));
    lines.push(format!(
        "in all, with {}: {}, {:.2} {}; * is for comparison and not counted",
        counted(p.clients, "client"),
        human_seconds(p.seconds),
        p.gpu_hours,
        hours(gpu)
    ));
    lines.extend(rates(p));
    lines.extend(p.warnings.iter().map(|warning| format!("warning: {warning}")));
    lines.join("\n")
}

fn table(p: &Prediction) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header([
        "stage",
        "steps",
        "tokens",
        "FLOP",
        "time",
        hours(p.cluster.gpu),
        "memory of a rank",
        "rate",
    ]);
    for stage in &p.stages {
        table.add_row(row(stage));
    }
    for column in table.column_iter_mut().skip(1).take(6) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn row(stage: &Stage) -> [String; 8] {
    let memory = human_bytes(stage.memory.need);
    [
        if stage.needed { stage.name.clone() } else { format!("{} *", stage.name) },
        format!("{:.0}", stage.steps),
        si(stage.tokens),
        si(stage.flops),
        human_seconds(stage.seconds),
        format!("{:.2}", stage.gpu_hours),
        if stage.memory.fits() { memory } else { format!("{memory}: TOO MUCH") },
        stage.basis.name().into(),
    ]
}

fn curation(p: &Prediction) -> String {
    let c = &p.curation;
    let [fewest, most] = c.jobs_per_rank;
    let jobs = if fewest == most { fewest.to_string() } else { format!("{fewest} to {most}") };
    format!(
        "curate: {} in all, {} groups, {jobs} jobs per rank; of the ranks' time {:.1} % waiting, {:.1} % loading \
         models; {} in {} files",
        human_seconds(c.seconds),
        c.groups,
        100.0 * c.idle_share,
        100.0 * c.loading_share,
        human_bytes(c.disk),
        c.files
    )
}

fn training(p: &Prediction) -> String {
    let t = &p.training;
    format!(
        "train: {}parameters, {} per rank and step; a step is {} of computing, {} of updating, {} of \
         communication that is not hidden (of {})",
        si(t.parameters as f64),
        counted(t.tuples_per_rank, "tuple"),
        human_seconds(t.compute),
        human_seconds(t.update),
        human_seconds(t.network),
        human_seconds(t.network_in_all)
    )
}

/// Translation by products and refinement, as a line.
fn by_products(p: &Prediction) -> String {
    let ByProducts { shadows, seconds, penalty_seconds, host_memory, refine_seconds, .. } = &p.by_products;
    format!(
        "translate by products of {shadows} shadows: inner products {}, decomposition {}, read-out {}, {} of host \
         memory; penalty {}, once per run; refine: {}",
        human_seconds(seconds.inner_products),
        human_seconds(seconds.decomposition),
        human_seconds(seconds.read_out),
        human_bytes(*host_memory),
        human_seconds(*penalty_seconds),
        human_seconds(*refine_seconds)
    )
}

/// Statistics for an emulator, as a line.
fn emulation(e: &Emulating) -> String {
    let Emulating { layers, passes, tokens, flops, seconds, memory, disk, parameters: [llm, emulator] } = e;
    let passes = if *passes == 1 { "1 pass".into() } else { format!("{passes} passes") };
    let too_much = if memory.fits() { "" } else { ", TOO MUCH" };
    format!(
        "emulate {layers} layers, {passes} over {tokens} tokens: {}FLOP and {} on each rank, {} of memory{too_much}, \
         {} of files; about {} of {} parameters",
        si(*flops),
        human_seconds(*seconds),
        human_bytes(memory.need),
        human_bytes(*disk),
        si(*emulator as f64).trim_end(),
        si(*llm as f64).trim_end(),
    )
}

/// What would be faster, as a line.
pub fn recommendation(p: &Prediction) -> String {
    let r = &p.recommended;
    format!(
        "recommended: curate on {} with curate.jobs_per_batch = {}: {}, {:.1} % of it waiting; train on {} of {}: {}",
        counted(r.curate_nodes, "node"),
        r.curate_concurrent,
        human_seconds(r.curate_seconds),
        100.0 * r.curate_idle_share,
        counted(r.train_nodes, "node"),
        counted(r.train_gpus_per_node, "rank"),
        human_seconds(r.train_seconds)
    )
}

/// The rates, a line each, but for plain products, which are only what others compare with.
fn rates(p: &Prediction) -> Vec<String> {
    let mut lines = vec![];
    for rate in p.rates.iter().filter(|rate| rate.kind != Kind::Gemm || rate.basis == Basis::Measured) {
        let unit = if rate.kind.computes() { "FLOP/s" } else { "B/s" };
        let from = rate.from.as_ref().map_or(String::new(), |file| format!(" in {file}"));
        lines.push(format!(
            "rate of {}: {}{unit} per rank, {:.0} % of the device's; {}{from}",
            rate.kind.name(),
            si(rate.per_second),
            100.0 * rate.share,
            rate.basis.name()
        ));
    }
    let lengths = if p.examples_counted { "counted in the public data" } else { "given" };
    lines.push(format!("lengths of examples: {lengths}; network and loading of models: assumed"));
    lines
}

/// A sweep, with the rates and warnings behind it.
fn sweep_page(found: &SweepCost, unit: &str) -> String {
    let mut lines = vec![found.page(unit)];
    lines.extend(found.runs.first().into_iter().flat_map(|run| rates(&run.prediction)));
    // Most warnings are about the cluster and the same for all.
    let mut warned: Vec<(&String, Vec<&str>)> = vec![];
    for run in &found.runs {
        for warning in &run.prediction.warnings {
            match warned.iter_mut().find(|(known, _)| *known == warning) {
                Some((_, runs)) => runs.push(&run.name),
                None => warned.push((warning, vec![&run.name])),
            }
        }
    }
    lines.extend(warned.iter().map(|(warning, runs)| match runs[..] {
        [run] => format!("warning: {run}: {warning}"),
        _ if runs.len() == found.runs.len() => format!("warning: all runs: {warning}"),
        _ => format!("warning: {}: {warning}", runs.join("; ")),
    }));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        let times = [0.02, 5.0, 125.0, 10_000.0, 900_000.0].map(human_seconds);
        assert_eq!(times, ["20.0 ms", "5.0 s", "2.1 min", "2.8 h", "10.4 days"]);
        assert_eq!([5.0, 1.5e9, 2e19].map(si), ["5 ", "1.50 G", "20.00 E"]);
    }
}
