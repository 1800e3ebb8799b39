//! `bench comm`: sums and gathers of the translator's gradient buckets between ranks.
//!
//! Under `srun` or `mpirun` the ranks are the processes that were started, also on several nodes;
//! started alone they are threads of this process (`--ranks 1,2,4`), of which one means nothing
//! but the cost of a call.
//!
//! `bytes` is the whole vector, f32; a call takes as long as its slowest rank. `gb_per_s` is bytes
//! by time; `wire_gb_per_s` is what one rank sends by time, which can be held against the network's
//! rate: (N − 1)/N of the bytes for reduce-scatter and all-gather, twice that for all-reduce.
//! `buckets` is what a training step exchanges: a reduce-scatter of every bucket, all of them
//! started before the first is waited for, and then an all-gather of every one.

use super::measure::Times;
use super::measure::rounded;
use super::models::{NamedTranslator, TranslatorArgs};
use super::options::at_least_one;
use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table, presets};
use gradtx_kernels::cpu::Cpu;
use gradtx_models::grad_transformer::GradTransformer;
use gradtx_run::cluster::World;
use gradtx_run::context::Context;
use gradtx_run::text::today;
use gradtx_run::ui::{Ui, is_silent};
use gradtx_runtime::comm::{Collectives, Comm, local};
use gradtx_runtime::parallel::{BUCKET_BYTES, Shards};
use gradtx_runtime::params::ParamLayout;
use gradtx_runtime::plan::human_bytes;
use serde_json::{Value, json};
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

/// What to measure, and how often.
#[derive(Debug, clap::Args)]
pub struct Job {
    #[command(flatten)]
    sizes: TranslatorArgs,
    /// Numbers of threads, where no other processes were started.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 2])]
    ranks: Vec<usize>,
    /// Sizes of whole vectors in bytes.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [64 << 10, 1 << 20, 16 << 20, 64 << 20])]
    bytes: Vec<usize>,
    /// Calls that are not counted.
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: usize,
    /// Calls that are counted.
    #[arg(long, value_name = "N", default_value_t = 7)]
    runs: usize,
    /// Add the lines to this file, one JSON object each.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Measures; rank 0 gives.
pub fn run(context: &Context, world: &World, job: &Job) -> Result<()> {
    at_least_one("--runs", job.runs)?;
    job.ranks.iter().chain(&job.bytes).try_for_each(|&n| at_least_one("--ranks and --bytes", n))?;
    let translator = NamedTranslator::find(&job.sizes, true)?;
    let outline = GradTransformer::<Cpu, f32>::meta(&Cpu::new(1), translator.config.clone())?;
    let mut lines = vec![];
    if world.comm().size() > 1 {
        lines = measure(world.comm(), "mpi", job, outline.layout())?;
    } else {
        context.ui.line("one process: ranks are threads; start it with mpirun or srun for others");
        for &size in &job.ranks {
            lines.extend(among_threads(size, job, outline.layout())?);
        }
    }
    if is_silent() {
        return Ok(());
    }
    tell(&context.ui, job, &lines)
}

fn among_threads(size: usize, job: &Job, layout: &ParamLayout) -> Result<Vec<Value>> {
    std::thread::scope(|scope| {
        let of = |comm| measure(&comm, "threads", job, layout);
        let ranks: Vec<_> = local(size).into_iter().map(|comm| scope.spawn(move || of(comm))).collect();
        let mut lines = vec![];
        for rank in ranks {
            lines.extend(rank.join().expect("measuring does not panic")?);
        }
        Ok(lines)
    })
}

fn tell(ui: &Ui, job: &Job, lines: &[Value]) -> Result<()> {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(["what", "ranks", "bytes", "ms", "GB/s", "GB/s sent by a rank"]);
    for line in lines {
        let text = |key: &str| line[key].as_str().unwrap_or_default().to_string();
        let number = |key: &str| line[key].as_f64().unwrap_or(0.0);
        table.add_row([
            text("name"),
            format!("{} {}", line["ranks"], text("over")),
            human_bytes(number("bytes") as u64),
            format!("{:.3}", 1e3 * number("median_s")),
            format!("{:.2}", number("gb_per_s")),
            format!("{:.2}", number("wire_gb_per_s")),
        ]);
        ui.result_object("bench", line.clone());
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    if !ui.is_json() {
        ui.result(table.to_string());
    }
    if let Some(path) = &job.out {
        let open = || -> std::io::Result<()> {
            let mut file = OpenOptions::new().create(true).append(true).open(path)?;
            lines.iter().try_for_each(|line| writeln!(file, "{line}"))
        };
        open().with_context(|| format!("{}: cannot write", path.display()))?;
    }
    Ok(())
}

/// Measures every operation and size; rank 0 gets the lines.
fn measure(comm: &dyn Comm, over: &str, job: &Job, layout: &ParamLayout) -> Result<Vec<Value>> {
    let (rank, size) = (comm.rank(), comm.size());
    let others = (size - 1) as f64 / size as f64;
    let mut told = Told { comm, over, job, lines: vec![] };
    for &bytes in &job.bytes {
        // So many that ranks can share them evenly.
        let share = (bytes / size_of::<f32>()).div_ceil(size);
        let mut whole: Vec<f32> = (0..share * size).map(|i| (i % 97) as f32 + rank as f32).collect();
        let mut part = vec![1.0f32; share];
        let bytes = share * size * size_of::<f32>();
        told.timed("all-reduce", bytes, 2.0 * others, || Ok(comm.all_reduce_sum(&mut whole)?))?;
        told.timed("reduce-scatter", bytes, others, || Ok(comm.reduce_scatter_sum(&whole, &mut part)?))?;
        told.timed("all-gather", bytes, others, || Ok(comm.all_gather(&part, &mut whole)?))?;
    }
    let shards = Shards::new(layout, size, BUCKET_BYTES / size_of::<f32>());
    let mut flat: Vec<f32> = (0..layout.total()).map(|i| (i % 97) as f32 + rank as f32).collect();
    let bytes = flat.len() * size_of::<f32>();
    told.timed("buckets", bytes, 2.0 * others, || exchange(comm, &shards, &mut flat))?;
    Ok(told.lines)
}

/// What a training step exchanges.
fn exchange(comm: &dyn Comm, shards: &Shards, flat: &mut [f32]) -> Result<()> {
    let mut pending = vec![];
    for bucket in shards.buckets() {
        pending.push(comm.start_reduce_scatter_sum(&flat[bucket.range()], &bucket.lengths())?);
    }
    for (bucket, sum) in shards.buckets().iter().zip(pending) {
        sum.wait(&mut flat[bucket.share(comm.rank())])?;
    }
    for bucket in shards.buckets() {
        let part = flat[bucket.share(comm.rank())].to_vec();
        comm.all_gather_parts(&part, &bucket.lengths(), &mut flat[bucket.range()])?;
    }
    Ok(())
}

/// Lines in the making.
struct Told<'a> {
    comm: &'a dyn Comm,
    over: &'a str,
    job: &'a Job,
    lines: Vec<Value>,
}

impl Told<'_> {
    fn timed(
        &mut self,
        name: &str,
        bytes: usize,
        sent: f64,
        mut call: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let comm = self.comm;
        let mut samples = Vec::with_capacity(self.job.runs);
        for run in 0..self.job.warmup + self.job.runs {
            comm.barrier()?;
            let begin = Instant::now();
            call()?;
            let own = begin.elapsed().as_secs_f64();
            let mut all = vec![0.0; comm.size()];
            comm.all_gather(&[own], &mut all)?;
            if run >= self.job.warmup {
                samples.push(all.into_iter().fold(0.0, f64::max));
            }
        }
        if comm.rank() == 0 {
            let times = Times::new(samples, 1);
            let rate = bytes as f64 / times.median() / 1e9;
            self.lines.push(json!({
                "who": "gradtx", "name": name, "over": self.over, "ranks": comm.size(),
                "ranks_per_node": comm.place().local_size, "bytes": bytes,
                "median_s": rounded(times.median()), "q1_s": rounded(times.quantile(0.25)),
                "q3_s": rounded(times.quantile(0.75)), "runs": times.runs(),
                "gb_per_s": rounded(rate), "wire_gb_per_s": rounded(rate * sent),
                "version": env!("CARGO_PKG_VERSION"), "date": today(),
            }));
        }
        Ok(())
    }
}
