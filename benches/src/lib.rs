//! `bench`: what this device reaches, on the shapes of real models with random weights.
//!
//! In: a device, names of models, sizes; no checkpoint and no data. Out: one line of JSON for
//! everything that was measured (with `--out`, and as events with `--json`), and a table for
//! people.
//!
//! Every run begins with what the device reaches at best: a large matrix product and a large
//! copy ([`ceilings`]), in the same type and minute as what follows. All other lines are held
//! against these two: `share_of_gemm`, `share_of_copy`. Operations and bytes are counted by
//! formula ([`counts`], [`gradtx_plan::cost::work`]), never by what a kernel happens to do.
//!
//! | what | file | measured |
//! |---|---|---|
//! | `ceilings` | [`ceilings`] | the large product and the large copy alone |
//! | `kernels` | [`kernels`] | every operation by itself, calls back to back |
//! | `finetune` | [`finetune`] | steps of adapters beside a frozen base, and of the base alone |
//! | `train` | [`train`] | steps of the Grad-Transformer |
//! | `translate` | [`translate`] | the translation of one update |
//! | `products` | [`products`] | translation by products: inner products, decomposition, read-out |
//! | `generate` | [`generate`] | greedy decoding |
//! | `comm` | [`comm`] | sums and gathers between ranks |
//! | `table` | [`table`] | results of several files against the targets |
//!
//! The lines with a `work` are what `gradtx plan --calibrate` learns rates from.

pub mod ceilings;
pub mod comm;
pub mod counts;
pub mod finetune;
pub mod generate;
pub mod kernels;
pub mod machine;
pub mod measure;
mod measured;
pub mod models;
pub mod options;
pub mod products;
pub mod profile;
pub mod results;
pub mod table;
pub mod train;
pub mod translate;
pub mod tuples;
pub mod values;

pub(crate) use measured::{Measured, On};

use anyhow::Result;
use clap::Subcommand;
use gradtx_kernels::{Backend, Real};
use gradtx_run::cluster::World;
use gradtx_run::config::DeviceConfig;
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, dispatch};
use gradtx_run::failure::unusable;
use machine::Machine;
use options::Common;
use results::Results;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

/// What to measure.
#[derive(Debug, clap::Args)]
pub struct Job {
    /// What to measure.
    #[command(subcommand)]
    pub what: What,
}

/// The benchmarks.
#[derive(Debug, Subcommand)]
pub enum What {
    /// What the device reaches at best: a large matrix product and a large copy.
    Ceilings(ceilings::Job),
    /// Every operation by itself, and the matrix products of a model.
    Kernels(kernels::Job),
    /// A step of LoRA fine-tuning on a packed stream, and the same step of the frozen base alone.
    Finetune(finetune::Job),
    /// A training step of the Grad-Transformer.
    Train(train::Job),
    /// The translation of updates.
    Translate(translate::Job),
    /// Translation by products: inner products of students, decomposition of the LLM's adapters, read-out.
    Products(products::Job),
    /// Greedy generation, token by token.
    Generate(generate::Job),
    /// Sums and gathers between the ranks that srun or mpirun started, or between threads.
    Comm(comm::Job),
    /// The table of targets, from the results of several runs.
    Table(table::Job),
}

/// Measures.
pub fn run(context: &Context, world: &World, job: &Job) -> Result<()> {
    match &job.what {
        What::Ceilings(job) => on_device(context, &job.common, job),
        What::Kernels(job) => on_device(context, &job.common, job),
        What::Finetune(job) => on_device(context, &job.common, job),
        What::Train(job) => on_device(context, &job.common, job),
        What::Translate(job) => on_device(context, &job.common, job),
        What::Products(job) => on_device(context, &job.common, job),
        What::Generate(job) => on_device(context, &job.common, job),
        What::Comm(job) => comm::run(context, world, job),
        What::Table(job) => table::run(context, job),
    }
}

struct Session<'a, M> {
    context: &'a Context,
    common: &'a Common,
    job: &'a M,
    started: Instant,
}

fn on_device<M: Measured>(context: &Context, common: &Common, job: &M) -> Result<()> {
    common.check()?;
    let settings = DeviceConfig { kind: common.device, dtype: common.dtype(), ..DeviceConfig::default() };
    dispatch(&settings, context, Session { context, common, job, started: Instant::now() })
}

/// Adds lines to a file.
fn append(file: &Path, lines: &[String]) -> Result<()> {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let mut to = std::fs::OpenOptions::new().create(true).append(true).open(file);
    let written = to
        .as_mut()
        .map_err(|e| e.to_string())
        .and_then(|to| to.write_all(text.as_bytes()).map_err(|e| e.to_string()));
    written.map_err(|why| unusable(format!("--tune {}: {why}", file.display())))
}

impl<M: Measured> Work for Session<'_, M> {
    type Output = ();

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<()> {
        let Self { context, common, job, started } = self;
        let machine = Machine::of(device);
        let mut results = Results::new(context.ui.clone(), device, &machine, common, X::DTYPE)?;
        let ceilings = ceilings::measure::<X, D>(device, &machine, common, &mut results)?;
        results.hold_against(&ceilings);
        let (machine, ceilings, profile) = (&machine, &ceilings, common.profile);
        let threads = context.threads;
        let on = On { device, machine, ceilings, started, profile, threads };
        match &common.tune {
            None => job.measure::<X, D>(&on, &mut results)?,
            Some(file) => {
                let lines = machine::tuned(device, || job.measure::<X, D>(&on, &mut results))?;
                append(file, &lines)?;
            }
        }
        results.finish();
        Ok(())
    }
}
