//! `emulate`: an emulator of the LLM for clients that may not share data (GradOT).
//!
//! In: the LLM, and public data. Out, in the directory:
//!
//! ```text
//! model/        the emulator, to be given to clients: config.json, weights, tokenizer, modeling_gradot.py
//! statistics/   a stage of its own: NNN.safetensors, sums over public data; NNN.parts.safetensors, singular vectors
//!               and the terms of scores
//! report.json   what was kept, and how close the emulator is
//! ```
//!
//! Statistics and report say what of the LLM is left out, and stay with its owner. Statistics do not depend on the
//! settings of selection (ratio, λ, score): another emulator can be made from the same. Ranks share the statistics and
//! the decompositions; rank 0 selects, writes and measures.

mod choose;
mod collect;
mod dry_run;
mod files;
mod labels;
mod measure;
mod parts;
mod report;
mod statistics;
mod support;
mod try_lambda;
mod write;

use crate::artifacts::open_side;
use crate::records::{EmulateInputs, StatisticsInputs};
use anyhow::{Context as _, Result};
use choose::{Chosen, choose};
pub use collect::Collection;
use gradtx_models::decoder::Emulator;
use gradtx_run::cluster::World;
use gradtx_run::config::{Config, EmulatorConfig, RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::dispatch::dispatch;
use gradtx_run::failure::{unusable, unusable_with};
use gradtx_run::paths::{EMULATOR_DIR, EMULATOR_MODEL_DIR};
use gradtx_run::role::Role;
use gradtx_run::stage::{self, Inputs, Stage};
use gradtx_run::text::quoted;
use gradtx_runtime::artifact::{checksum, write_json};
use gradtx_runtime::comm::Comm;
use gradtx_train::emulator::Emulation;
use gradtx_train::examples::Data;
use gradtx_train::model_spec::ModelSpec;
use gradtx_train::prompts::Prompts;
use measure::{Measured, Measuring, OfModel};
use parts::Parts;
use serde_json::{Value, json};
use statistics::Statistics;
use std::path::{Path, PathBuf};
use support::Support;

const STATISTICS_DIR: &str = "statistics";
/// What was kept, and how close the emulator is.
pub const REPORT_FILE: &str = "report.json";

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
    /// Directory of statistics, made if it is not there (default: `statistics` in the emulator's directory). They do
    /// not depend on ratio, lambda, keep, allocate and score: emulators with others can be made from the same.
    #[arg(long, value_name = "DIR")]
    pub statistics: Option<PathBuf>,
    /// Write whole matrices with the same function, which every program opens without code of ours; as large as the
    /// LLM.
    #[arg(long)]
    pub dense: bool,
    /// Print sizes, passes over the data and memory, and make nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Print what an emulator would be with each of these values of emulator.lambda, e.g. 0,0.25,0.5,1. Of the results
    /// only the statistics are kept.
    #[arg(long, value_name = "LIST", value_delimiter = ',', conflicts_with = "dry_run")]
    pub try_lambda: Vec<f64>,
}

/// Makes the emulator, unless that is done.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    run_on_ranks(context, &World::alone(), job)
}

/// The same by all ranks of a world together.
pub fn run_on_ranks(context: &Context, world: &World, job: &Job) -> Result<()> {
    let stage = Emulate::open(context, world, job)?;
    if job.dry_run {
        return stage.dry_run(context);
    }
    if !job.try_lambda.is_empty() {
        return stage.try_lambda(context, &job.try_lambda);
    }
    stage::run_on_ranks(context, world.comm(), &stage).map(drop)
}

/// Fails if a model is an emulator that was made by examples of another prompt form: it keeps what counts for the tokens
/// of that one.
pub fn expect_prompt(side: &ModelSpec, prompts: &Prompts) -> Result<()> {
    let made_by = side.model.emulator.as_ref().and_then(|emulator| emulator.prompt.as_deref());
    let form = prompts.form().name();
    match made_by.filter(|made_by| *made_by != form) {
        None => Ok(()),
        Some(made_by) => {
            let what = format!(
                "{}: this emulator was made by examples in the prompt form `{made_by}`; found `{form}`",
                side.dir.display()
            );
            Err(unusable_with(what, Some(format!("set data.prompt = \"{made_by}\""))))
        }
    }
}

/// An emulator that is ready to be made, on one of the ranks that share it.
pub struct Emulate<'a> {
    comm: &'a dyn Comm,
    settings: RunSettings,
    /// The settings on this device.
    config: Config,
    dir: PathBuf,
    /// Of the statistics.
    own: PathBuf,
    is_dense: bool,
    llm: ModelSpec,
    public: Data,
    prompts: Prompts,
    /// Without shapes of layers.
    emulator: Emulator,
    layers: Vec<usize>,
}

impl<'a> Emulate<'a> {
    /// Opens what a job needs.
    pub fn open(context: &Context, world: &'a World, job: &Job) -> Result<Self> {
        let dir = job.out.clone().unwrap_or_else(|| job.run.run.join(EMULATOR_DIR));
        let own = job.statistics.clone().unwrap_or_else(|| dir.join(STATISTICS_DIR));
        let settings = RunSettings::open_on_ranks(&job.run, world)?;
        let config = settings.config().clone().on_device_of_ranks(context, world, &dir)?;
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
        let emulation = Emulation { model: &llm.model, settings: &config.emulator };
        let emulator = Emulator {
            edge: config.emulator.edge,
            ratio: emulation.ratio(),
            layers: vec![],
            base_fingerprint: llm.space.base_model.clone(),
            prompt: Some(prompts.form().name().into()),
        };
        let layers = emulation.middle().collect();
        let (comm, is_dense) = (world.comm(), job.dense);
        Ok(Self { comm, settings, config, dir, own, is_dense, llm, public, prompts, emulator, layers })
    }

    fn support(&self, context: &Context) -> Result<Support> {
        let examples = self.public.examples(&self.prompts, &self.llm, context, "emulate")?.examples;
        Support::new(&examples, &self.config)
    }

    fn statistics_inputs(&self) -> StatisticsInputs {
        let Self { config, llm, public, prompts, .. } = self;
        let EmulatorConfig { edge, num_tokens, fisher, .. } = config.emulator;
        StatisticsInputs {
            seed: config.seed,
            data: public.inputs(&config.data, &[prompts]),
            max_length: config.data.max_length,
            edge,
            num_tokens,
            fisher,
            device: config.device.clone(),
            llm: llm.space.base_model.clone(),
            reading: config.data.reading_inputs(),
        }
    }

    /// Checksum of what statistics depend on.
    fn statistics_of(&self) -> Result<String> {
        Ok(checksum(self.statistics_inputs().value()?.to_string().as_bytes()))
    }

    /// Has all ranks collect the statistics, unless they are there, and calls this with them on rank 0.
    fn with_statistics<T>(
        &self,
        context: &Context,
        support: &Support,
        work: impl FnOnce(&Statistics<'_>, &[Parts]) -> Result<T>,
    ) -> Result<Option<T>> {
        let inputs = self.statistics_inputs();
        let of = self.statistics_of()?;
        let statistics = Statistics { dir: &self.own, side: &self.llm, layers: &self.layers, of: &of };
        let device = &self.config.device;
        let collection = Collection { comm: self.comm, device, inputs, statistics, support };
        stage::run_on_ranks(context, self.comm, &collection)?;
        if self.comm.rank() != 0 {
            return Ok(None);
        }
        let parts: Vec<Parts> =
            self.layers.iter().map(|layer| Parts::read(&statistics, *layer)).collect::<Result<_>>()?;
        work(&statistics, &parts).map(Some)
    }

    /// Writes the emulator into a directory, which is made if it is not there; returns its files.
    fn write(&self, statistics: &Statistics<'_>, chosen: &Chosen, model: &Path) -> Result<Vec<String>> {
        std::fs::create_dir_all(model).with_context(|| format!("{}: cannot make", model.display()))?;
        let Self { emulator, is_dense, .. } = self;
        write::Writing { statistics, emulator, chosen, is_dense: *is_dense }.write(model)
    }

    /// Measures a model on what is held out.
    fn measure(&self, context: &Context, support: &Support, dir: &Path) -> Result<OfModel> {
        let measuring = Measuring { context, dir, edge: &self.emulator, streams: &support.held_out };
        dispatch(&self.config.device, context, measuring)
    }
}

impl Stage for Emulate<'_> {
    type Inputs = EmulateInputs;
    /// On rank 0 the report.
    type Output = Option<Value>;
    const HAS_RANKS: bool = true;
    const RESUMES: bool = true;

    fn dir(&self) -> &Path {
        &self.dir
    }

    fn settings(&self) -> Option<&RunSettings> {
        Some(&self.settings)
    }

    fn advice(&self) -> String {
        let [run, own, dir] =
            [self.settings.run(), &self.own, &self.dir].map(|path| quoted(&path.to_string_lossy()));
        format!(
            "to keep it, make another emulator from the same statistics: gradtx emulate --run {run} --out OTHER \
             --statistics {own} with the settings to change; or remove {dir} to start over"
        )
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

    fn make(&self, context: &Context) -> Result<(Vec<String>, Option<Value>)> {
        let Self { config, dir, layers, .. } = self;
        let support = self.support(context)?;
        let made = self.with_statistics(context, &support, |statistics, parts| {
            let chosen = choose(&config.emulator, config.seed, layers, parts);
            let model = dir.join(EMULATOR_MODEL_DIR);
            let files = self.write(statistics, &chosen, &model)?;
            let [llm, emulator] = [&self.llm.dir, &model].map(|dir| self.measure(context, &support, dir));
            let measured = Measured::new(&llm?, &emulator?);
            let report = report::Report { statistics, chosen: &chosen, parts, support: &support, measured };
            report.warn(context, &config.emulator);
            let report = report.json()?;
            write_json(&dir.join(REPORT_FILE), &report)?;
            let mut all: Vec<String> =
                files.into_iter().map(|file| format!("{EMULATOR_MODEL_DIR}/{file}")).collect();
            all.push(REPORT_FILE.into());
            Ok((all, report))
        })?;
        Ok(made.map_or((vec![], None), |(files, report)| (files, Some(report))))
    }

    fn report(&self, context: &Context, report: &Option<Value>) -> Result<()> {
        let Some(report) = report else { return Ok(()) };
        let number = |name: &str| report[name].as_f64().unwrap_or(f64::NAN);
        let text = format!(
            "emulate: {:.1} % of the middle, public loss {:.4} (LLM {:.4}), cosine of the edge's gradient {:.4}, {}",
            100.0 * number("kept"),
            number("emulator_loss"),
            number("llm_loss"),
            number("edge_gradient_cosine"),
            self.dir.join(EMULATOR_MODEL_DIR).display()
        );
        let numbers = json!({
            "kept": report["kept"], "emulator_loss": report["emulator_loss"], "llm_loss": report["llm_loss"],
            "edge_gradient_cosine": report["edge_gradient_cosine"],
        });
        context.ui.done("emulate", &self.dir, numbers, text);
        Ok(())
    }
}
