//! `bench counts`: the launches of a step on a GPU, what each has to do, and how long that should take. Needs no GPU.
//!
//! In: sizes, as `bench finetune`, `bench train` and `bench generate` take them, and a device. Out: a table of operations with the
//! names that `--profile` gives them: launches, operations, bytes, the time that the device needs at least (**floor**: operations
//! at the large product's rate or bytes at the large copy's, whichever is longer), and the time that they should take, by the share
//! of the floor that each kind of work has reached (`work.rs`); the sum of both.
//!
//! Operations and bytes are those of [`super::counts`]; of a whole step they agree with [`gradtx_plan::cost::work`].

mod adapters;
mod decoder;
mod operations;
mod translator;
mod work;

#[cfg(test)]
mod tests;

use super::finetune;
use super::measure::rounded;
use super::measured::Ceilings;
use super::models::{NamedDecoder, NamedTranslator, TranslatorArgs};
use super::options::{Blocks, at_least_one};
use adapters::Adapters;
use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table, presets};
use decoder::{Model, Sequences};
use gradtx_kernels::cpu::Cpu;
use gradtx_models::grad_transformer::GradTransformer;
use gradtx_plan::cost::device::{Cluster, Gpu, Hardware};
use gradtx_run::context::Context;
use gradtx_run::failure::unusable;
use gradtx_run::ui::is_silent;
use operations::{Operation, Operations};
use serde_json::{Value, json};
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use translator::Step;

/// Which step, on which device.
#[derive(Debug, clap::Args)]
pub struct Job {
    /// The step of LoRA fine-tuning of this model, as `bench finetune` does it: qwen2.5-0.5b, 1.5b, 3b, 7b, 14b, 32b, or the path of a
    /// config.json.
    #[arg(long, value_name = "NAME|FILE", default_value = "qwen2.5-7b")]
    model: String,
    /// Tokens of the stream.
    #[arg(long, value_name = "N", default_value_t = 8192)]
    tokens: usize,
    /// Tokens of an example, or of a prompt with --generate (default: 512, or 256).
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Shadow jobs at once in the stream.
    #[arg(long, value_name = "N", default_value_t = 1)]
    jobs: usize,
    /// Rank of the adapters.
    #[arg(long, value_name = "R", default_value_t = 2)]
    rank: usize,
    /// What is adapted.
    #[arg(long, value_delimiter = ',', default_values_t = ["q_proj".to_string(), "v_proj".to_string()])]
    targets: Vec<String>,
    /// In the place of that: greedy generation by the model, as `bench generate` does it.
    #[arg(long, conflicts_with_all = ["tokens", "jobs", "rank", "targets", "translator"])]
    generate: bool,
    /// New tokens of a sequence.
    #[arg(long, value_name = "N", default_value_t = 128, requires = "generate")]
    new: usize,
    /// In the place of that: the training step of the Grad-Transformer, as `bench train` does it, with Flan-T5 of this size (small,
    /// base, large, xl, xxl) or the path of a config.json.
    #[arg(long, value_name = "NAME|FILE", conflicts_with_all = ["model", "tokens", "context", "jobs", "rank", "targets"])]
    translator: Option<String>,
    /// Blocks of the TinyLM's updates and their width.
    #[arg(long, value_name = "BLOCKSxWIDTH", default_value = "36x12800", requires = "translator")]
    tiny: Blocks,
    /// Blocks of the LLM's updates and their width.
    #[arg(long, value_name = "BLOCKSxWIDTH", default_value = "28x22528", requires = "translator")]
    llm: Blocks,
    /// Tuples of a step with --translator (default: 32), or sequences at once with --generate (default: 64).
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// The device.
    #[arg(long, value_enum, default_value = "h100")]
    gpu: Gpu,
    /// Rate of its large product, in TFLOP/s, in the place of what the device is taken to reach.
    #[arg(long, value_name = "X")]
    tflops: Option<f64>,
    /// Rate of its large copy, in TB/s read and written.
    #[arg(long, value_name = "X")]
    tbs: Option<f64>,
    /// Add the lines to this file, one JSON object each.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// A step: its name and sizes in results, and its operations.
struct Counted {
    name: &'static str,
    shape: String,
    operations: Operations,
}

/// Counts, and prints.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    let ceilings = job.ceilings()?;
    let counted = job.counted()?;
    let Ceilings { gemm, copy } = ceilings;
    context.ui.line(format!(
        "counted, not measured: {}, large product {:.0} TFLOP/s, large copy {:.2} TB/s",
        job.gpu.name(),
        gemm / 1e12,
        copy / 1e12
    ));
    let lines: Vec<Value> = counted.iter().map(|counted| line(counted, job.gpu, &ceilings)).collect();
    if let Some(path) = job.out.as_ref().filter(|_| !is_silent()) {
        let cannot = || format!("{}: cannot write", path.display());
        let mut out = OpenOptions::new().create(true).append(true).open(path).with_context(cannot)?;
        lines.iter().try_for_each(|line| writeln!(out, "{line}")).with_context(cannot)?;
    }
    for (counted, line) in counted.iter().zip(lines) {
        if !context.ui.is_json() {
            context.ui.result(format!("{}, {}\n{}", counted.name, counted.shape, table(counted, &ceilings)));
        }
        context.ui.result_object("bench", line);
    }
    Ok(())
}

impl Job {
    /// The rates of the large product and the large copy.
    fn ceilings(&self) -> Result<Ceilings> {
        if self.gpu == Gpu::Cpu {
            return Err(unusable("--gpu cpu: launches are counted for GPUs; `gradtx bench` measures a CPU"));
        }
        let hardware = Hardware::of(&Cluster { nodes: 1, gpus_per_node: 1, gpu: self.gpu, threads: 1 });
        let rate = |option: &str, given: Option<f64>, known: f64| match given {
            None => Ok(known),
            Some(rate) if rate > 0.0 && rate.is_finite() => Ok(1e12 * rate),
            Some(rate) => Err(unusable(format!("{option} {rate}: expected a number above 0"))),
        };
        Ok(Ceilings {
            gemm: rate("--tflops", self.tflops, work::GEMM_SHARE * hardware.peak)?,
            copy: rate("--tbs", self.tbs, work::COPY_SHARE * hardware.bandwidth)?,
        })
    }

    fn counted(&self) -> Result<Vec<Counted>> {
        let sizes = [("--tokens", self.tokens), ("--jobs", self.jobs), ("--rank", self.rank)];
        sizes.into_iter().try_for_each(|(option, n)| at_least_one(option, n))?;
        at_least_one("--batch", self.batch.unwrap_or(1))?;
        match &self.translator {
            Some(_) => Ok(vec![self.training()?]),
            None if self.generate => self.generation(),
            None => Ok(vec![self.finetuning()?]),
        }
    }

    /// The decoder, whose operations are known: with rotary positions and a gated MLP.
    fn decoder(&self) -> Result<NamedDecoder> {
        let model = NamedDecoder::find(&self.model)?;
        if model.config.block().attention.is_rotary {
            return Ok(model);
        }
        let kind = model.config.family.model_type();
        let what =
            format!("--model {}: expected a model with rotary positions; found type {kind}", self.model);
        Err(unusable(format!("{what}, whose launches are not counted")))
    }

    fn hopper(&self) -> bool {
        matches!(self.gpu, Gpu::H100 | Gpu::H200)
    }

    fn finetuning(&self) -> Result<Counted> {
        let model = self.decoder()?;
        let each = self.context.unwrap_or(512);
        let lengths = finetune::examples(self.tokens, each, self.jobs)?;
        let layout = model.adapters(self.rank, &self.targets)?;
        let adapters = Adapters::new(&layout, self.jobs)?;
        let operations = Model { config: &model.config, hopper: self.hopper() }.finetune(&lengths, &adapters);
        Ok(Counted { name: "finetune", shape: finetune::shape(&model.name, &lengths, self.jobs), operations })
    }

    fn generation(&self) -> Result<Vec<Counted>> {
        let model = self.decoder()?;
        let (batch, prompt, new) = (self.batch.unwrap_or(64), self.context.unwrap_or(256), self.new);
        at_least_one("--context", prompt)?;
        if new < 2 {
            return Err(unusable("--new: expected at least 2, since the first one is the prompts'"));
        }
        let shape = format!("{}, batch {batch}, prompt {prompt}, {new} new", model.name);
        let sequences = Sequences { batch, prompt, new };
        let of = Model { config: &model.config, hopper: self.hopper() };
        let prompts = ("generate prompts", of.prompts(sequences));
        let each = |(name, operations)| Counted { name, shape: shape.clone(), operations };
        Ok([prompts, ("generate", of.token(sequences))].map(each).into())
    }

    fn training(&self) -> Result<Counted> {
        let args = TranslatorArgs { translator: self.translator.clone(), tiny: self.tiny, llm: self.llm };
        let translator = NamedTranslator::find(&args, false)?;
        let outline = GradTransformer::<Cpu, f32>::meta(&Cpu::new(1), translator.config.clone())?;
        let (config, batch) = (&translator.config, self.batch.unwrap_or(32));
        let operations = Step { config, values: outline.layout().total(), batch }.training();
        Ok(Counted { name: "train", shape: format!("{} batch {batch}", translator.shape()), operations })
    }
}

/// Sums over a step.
struct Sums {
    launches: usize,
    flops: f64,
    bytes: f64,
    floor: f64,
    expected: f64,
}

impl Sums {
    fn of(operations: &[Operation], ceilings: &Ceilings) -> Self {
        let sum = |of: &dyn Fn(&Operation) -> f64| operations.iter().map(of).sum();
        Self {
            launches: operations.iter().map(|o| o.calls).sum(),
            flops: sum(&|o| o.count.flops),
            bytes: sum(&|o| o.count.bytes),
            floor: sum(&|o| o.floor(ceilings)),
            expected: sum(&|o| o.expected(ceilings)),
        }
    }
}

fn line(counted: &Counted, gpu: Gpu, ceilings: &Ceilings) -> Value {
    let all = counted.operations.all();
    let sums = Sums::of(all, ceilings);
    let operation = |o: &Operation| {
        json!({"name": o.name, "calls": o.calls, "flops": o.count.flops, "bytes": o.count.bytes,
            "floor_s": rounded(o.floor(ceilings)), "expected_s": rounded(o.expected(ceilings))})
    };
    json!({"who": "counted", "name": counted.name, "shape": counted.shape, "gpu": gpu.name(), "dtype": "bf16",
        "gemm_tflops": rounded(ceilings.gemm / 1e12), "copy_tb_per_s": rounded(ceilings.copy / 1e12),
        "launches": sums.launches, "flops": sums.flops, "bytes": sums.bytes,
        "floor_s": rounded(sums.floor), "expected_s": rounded(sums.expected),
        "operations": all.iter().map(operation).collect::<Vec<_>>(), "version": env!("CARGO_PKG_VERSION")})
}

/// The operations, the longest first, and their sum.
fn table(counted: &Counted, ceilings: &Ceilings) -> Table {
    let mut all = counted.operations.all().to_vec();
    let sums = Sums::of(&all, ceilings);
    all.sort_by(|a, b| b.expected(ceilings).total_cmp(&a.expected(ceilings)));
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header(["operation", "calls", "GFLOP", "GB", "floor, ms", "expected, ms", "floor / expected"]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut row = |name: &str, calls: usize, flops: f64, bytes: f64, floor: f64, expected: f64| {
        table.add_row([
            name.to_string(),
            calls.to_string(),
            format!("{:.1}", flops / 1e9),
            format!("{:.3}", bytes / 1e9),
            format!("{:.3}", 1e3 * floor),
            format!("{:.3}", 1e3 * expected),
            format!("{:.1} %", 100.0 * floor / expected),
        ]);
    };
    for o in &all {
        row(&o.name, o.calls, o.count.flops, o.count.bytes, o.floor(ceilings), o.expected(ceilings));
    }
    row("sum", sums.launches, sums.flops, sums.bytes, sums.floor, sums.expected);
    table
}
