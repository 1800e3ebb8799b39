//! `emulate`: an emulator of the LLM for clients that may not share data (GradOT).
//!
//! In: the LLM, and public data. Out, in the directory:
//!
//! ```text
//! model/        the emulator, to be given to clients: config.json, weights, tokenizer, modeling_gradot.py
//! statistics/   NNN.safetensors, sums over public data; NNN.parts.safetensors, singular vectors and scores
//! report.json   what was kept, and how close the emulator is
//! ```
//!
//! Statistics and report say what of the LLM is left out, and stay with its owner. Layers whose statistics are there
//! are not computed again.

mod measure;
mod parts;
mod statistics;
mod support;
mod write;

use crate::artifacts::open_side;
use crate::records::EmulateInputs;
use anyhow::{Context as _, Result};
use gradtx_kernels::rng::derive;
use gradtx_models::decoder::Emulator;
use gradtx_models::gradot::{Choice, choose_channels, choose_components, lambda};
use gradtx_run::config::{Config, RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::dispatch::dispatch;
use gradtx_run::failure::{failed, unusable};
use gradtx_run::paths::EMULATOR_DIR;
use gradtx_run::role::Role;
use gradtx_run::stage::{self, Stage};
use gradtx_runtime::artifact::write_json;
use gradtx_train::examples::Data;
use gradtx_train::model_spec::ModelSpec;
use gradtx_train::prompts::Prompts;
use measure::{Measured, Measuring};
use parts::Parts;
use serde_json::{Value, json};
use statistics::Statistics;
use std::path::{Path, PathBuf};
use support::Support;

/// The emulator itself, below the stage's directory.
pub const MODEL_DIR: &str = "model";
const STATISTICS_DIR: &str = "statistics";
const REPORT_FILE: &str = "report.json";

/// What to compress, to where.
#[derive(Clone, Debug, clap::Args)]
pub struct Job {
    /// The run and its configuration.
    #[command(flatten)]
    pub run: RunArgs,
    /// Directory for the emulator, its statistics and report.json (default: RUN/emulator). Clients get its folder
    /// `model`, and nothing else.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Write whole matrices with the same function, which every program opens without code of ours; as large as the
    /// LLM.
    #[arg(long)]
    pub dense: bool,
}

/// Makes the emulator, unless that is done.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    stage::run(context, &Emulate::open(context, job)?).map(drop)
}

/// An emulator that is ready to be made.
pub struct Emulate {
    settings: RunSettings,
    /// The settings on this device.
    config: Config,
    dir: PathBuf,
    is_dense: bool,
    llm: ModelSpec,
    public: Data,
    prompts: Prompts,
    /// Without shapes of layers.
    emulator: Emulator,
}

impl Emulate {
    /// Opens what a job needs.
    pub fn open(context: &Context, job: &Job) -> Result<Self> {
        let dir = job.out.clone().unwrap_or_else(|| job.run.run.join(EMULATOR_DIR));
        let settings = RunSettings::open(&job.run)?;
        let config = settings.config().clone().on_device(context, &dir)?;
        let llm = open_side(&config, Role::Llm, context.threads)?;
        llm.model.expect_compressible(&format!("models.llm = {}", llm.dir.display()))?;
        let (layers, [first, last]) = (llm.model.layers, config.emulator.edge);
        if first.saturating_add(last) >= layers {
            let why = format!(
                "emulator.edge = [{first}, {last}]: expected fewer than all {layers} layers of the LLM"
            );
            return Err(unusable(why));
        }
        let public = Data::read(config.data.public.as_slice(), &config.data, "data.public")?;
        let prompts = public.prompts(&config, &llm)?;
        let emulator = Emulator {
            edge: config.emulator.edge,
            ratio: config.emulator.ratio,
            layers: vec![],
            base_fingerprint: llm.space.base_model.clone(),
        };
        Ok(Self { settings, config, dir, is_dense: job.dense, llm, public, prompts, emulator })
    }

    fn middle(&self) -> std::ops::Range<usize> {
        let [first, last] = self.emulator.edge;
        first..self.llm.model.layers - last
    }

    /// What stays of every middle layer, and for the report what λ was.
    fn choose(&self, parts: &[Parts]) -> (Vec<Choice>, [f64; 2]) {
        let settings = &self.config.emulator;
        let lambdas = [
            lambda(settings.lambda, parts.iter().flat_map(|parts| &parts.attention).map(|a| &a.candidates)),
            lambda(settings.lambda, parts.iter().map(|parts| &parts.channels)),
        ];
        let mut matrices = vec![];
        let mut channels = vec![];
        for (layer, parts) in self.middle().zip(parts) {
            let key = derive(self.config.seed, layer as u64);
            for (i, attention) in parts.attention.iter().enumerate() {
                let scores =
                    attention.candidates.scores(settings.score, lambdas[0], derive(key, 1 + i as u64));
                matrices.push(attention.matrix(layer, scores));
            }
            channels.push(parts.channels.scores(settings.score, lambdas[1], key));
        }
        let kept = choose_components(&matrices, settings.ratio, settings.keep, settings.allocate);
        let channels = choose_channels(&channels, settings.ratio, settings.keep, settings.allocate);
        let of_layer = |(kept, channels): (&[Vec<usize>], Vec<usize>)| Choice {
            components: std::array::from_fn(|i| kept[i].clone()),
            channels,
        };
        (kept.chunks_exact(4).zip(channels).map(of_layer).collect(), lambdas)
    }
}

impl Stage for Emulate {
    type Inputs = EmulateInputs;
    /// The report.
    type Output = Value;
    const RESUMES: bool = true;

    fn dir(&self) -> &Path {
        &self.dir
    }

    fn settings(&self) -> Option<&RunSettings> {
        Some(&self.settings)
    }

    fn inputs(&self) -> Result<EmulateInputs> {
        let Self { config, llm, public, prompts, .. } = self;
        Ok(EmulateInputs {
            seed: config.seed,
            data: public.inputs(&config.data, &[prompts]),
            max_length: config.data.max_length,
            emulator: config.emulator.clone(),
            dense: self.is_dense,
            device: config.device.clone(),
            llm: llm.space.base_model.clone(),
            reading: config.data.reading_inputs(),
        })
    }

    fn assumed(&self) -> Vec<String> {
        self.public.assumed(&[(Role::Llm, &self.prompts)])
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, Value)> {
        let Self { config, dir, llm, public, prompts, emulator, .. } = self;
        let own = dir.join(STATISTICS_DIR);
        std::fs::create_dir_all(&own).with_context(|| format!("{}: cannot make", own.display()))?;
        let examples = public.examples(prompts, llm, context, "emulate")?.examples;
        let support = Support::new(&examples, config)?;
        let layers: Vec<usize> = self.middle().collect();
        let statistics = Statistics { dir: &own, side: llm, layers: &layers, streams: &support.streams };
        dispatch(&config.device, context, statistics::Collecting { statistics: &statistics, context })?;
        let mut progress = context.ui.progress("emulate: decomposition", layers.len() as u64);
        let mut parts = vec![];
        for (done, &layer) in layers.iter().enumerate() {
            parts.push(Parts::of_layer(&statistics, layer)?);
            progress.set(done as u64 + 1, format!("layer {layer}"));
        }
        drop(progress);
        let (choices, lambdas) = self.choose(&parts);
        let model = dir.join(MODEL_DIR);
        std::fs::create_dir_all(&model).with_context(|| format!("{}: cannot make", model.display()))?;
        let written =
            write::Writing { statistics: &statistics, emulator, choices: &choices, is_dense: self.is_dense };
        let files = written.write(&model)?;
        let measuring = Measuring { context, llm, model: &model, edge: emulator, streams: &support.held_out };
        let measured = dispatch(&config.device, context, measuring)?;
        let report = self.summary(&statistics, &choices, lambdas, &support, &measured)?;
        write_json(&dir.join(REPORT_FILE), &report)?;
        let mut all: Vec<String> = files.into_iter().map(|file| format!("{MODEL_DIR}/{file}")).collect();
        all.push(REPORT_FILE.into());
        Ok((all, report))
    }

    fn report(&self, context: &Context, report: &Value) -> Result<()> {
        let number = |name: &str| report[name].as_f64().unwrap_or(f64::NAN);
        let text = format!(
            "emulate: {:.1} % of the middle, public loss {:.4} (LLM {:.4}), cosine of the edge's gradient {:.4}, {}",
            100.0 * number("kept"),
            number("emulator_loss"),
            number("llm_loss"),
            number("edge_gradient_cosine"),
            self.dir.join(MODEL_DIR).display()
        );
        let numbers = json!({
            "kept": report["kept"], "emulator_loss": report["emulator_loss"], "llm_loss": report["llm_loss"],
            "edge_gradient_cosine": report["edge_gradient_cosine"],
        });
        context.ui.done("emulate", &self.dir, numbers, text);
        Ok(())
    }
}

impl Emulate {
    /// The report: by layer what was kept, then how close the emulator is.
    fn summary(
        &self,
        statistics: &Statistics<'_>,
        choices: &[Choice],
        [of_attention, of_mlp]: [f64; 2],
        support: &Support,
        measured: &Measured,
    ) -> Result<Value> {
        let mut layers = vec![];
        let (mut kept, mut whole) = (0.0, 0.0);
        for (&layer, choice) in statistics.layers.iter().zip(choices) {
            let summary = parts::summary(statistics, layer, choice)?;
            kept += summary.kept as f64;
            whole += summary.whole as f64;
            layers.push(summary.json);
        }
        if whole == 0.0 {
            return Err(failed("the middle has no parameters", "use another model"));
        }
        let Measured { llm_loss, emulator_loss, cosine, relative_error } = *measured;
        Ok(json!({
            "kept": kept / whole,
            "parameters": { "middle": whole, "kept": kept },
            "lambda": { "attention": of_attention, "mlp": of_mlp },
            "support": { "examples": support.examples, "tokens": support.tokens, "held_out": support.held_out_examples },
            "llm_loss": llm_loss,
            "emulator_loss": emulator_loss,
            "edge_gradient_cosine": cosine,
            "edge_gradient_relative_error": relative_error,
            "layers": layers,
        }))
    }
}
