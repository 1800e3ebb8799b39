//! `finetune`: what a client does.
//!
//! In: private data and one base model. Out: `update.safetensors`, the one file that a
//! client sends; `metrics.jsonl` and `throughput.jsonl`; and, when asked for, the adapter
//! in PEFT form. With the LLM in the place of the TinyLM it is what translation is
//! measured against. With `finetune.use_peft = false` the full weights of some layers are trained, and the one file
//! is `layers.safetensors`.

mod layers;
mod log;
mod private;

use crate::artifacts::{expect_run_model, warn_of_changes};
use crate::card::{self, Made};
use crate::package;
use crate::records::FinetuneInputs;
use crate::stages::emulate::expect_prompt;
use anyhow::Result;
use gradtx_kernels::rng::derive_named;
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{Decoder, LayerParams};
use gradtx_run::config::{Config, Recipe, RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, dispatch, memory_for};
use gradtx_run::failure::unusable_with;
use gradtx_run::paths::UPDATE_FILE;
use gradtx_run::role::Role;
use gradtx_run::stage::{self, Inputs, Stage};
use gradtx_runtime::artifact::Privacy;
use gradtx_runtime::data::Dataset;
use gradtx_runtime::metrics::Rate;
use gradtx_runtime::text::shown;
use gradtx_train::examples::Data;
use gradtx_train::lora::trainer::{self, JobResult, LoraTrainer, Snapshots};
use gradtx_train::model_spec::{AdapterInputs, ModelSpec};
use gradtx_train::prompts::Prompts;
use gradtx_train::step_log::METRICS_FILE;
use log::{ShowSteps, write_rate};
use serde_json::json;
use std::path::{Path, PathBuf};

/// What to fine-tune, on what, to where.
pub struct Job {
    /// File or directory of private examples.
    pub data: PathBuf,
    /// Directory of the results.
    pub out: PathBuf,
    /// Which model.
    pub role: Role,
    /// Also write the adapter in PEFT form.
    pub peft: bool,
    /// The client agrees to refinement.
    pub allow_refinement: bool,
}

/// Fine-tunes, unless that is done.
pub fn run(context: &Context, args: &RunArgs, job: &Job) -> Result<()> {
    stage::run(context, &Finetune::open(context, args, job)?).map(drop)
}

/// Fine-tuning that is ready to begin.
pub struct Finetune<'a> {
    job: &'a Job,
    settings: RunSettings,
    /// The settings on this device.
    config: Config,
    side: ModelSpec,
    data: Data,
    prompts: Prompts,
    /// With steps in the place of epochs.
    recipe: Recipe,
    /// What is trained in the place of an adapter, if it is.
    layers: Option<LayerParams>,
}

impl<'a> Finetune<'a> {
    /// Opens what a job needs.
    pub fn open(context: &Context, args: &RunArgs, job: &'a Job) -> Result<Self> {
        let settings = RunSettings::open(args)?;
        let (config, package) = package::settings(settings.run(), settings.config().clone())?;
        let config = config.on_device(context, &job.out)?;
        let run = settings.run();
        let side = package::open_model(run, package.as_ref(), &config, job.role, context.threads)?;
        warn_of_changes(context, &settings, Self::NAME)?;
        expect_run_model(&settings, job.role, &side.space.base_model)?;
        let data = Data::read(std::slice::from_ref(&job.data), &config.data, "--data")?;
        let prompts = data.prompts(&config, &side)?;
        expect_prompt(&side, &prompts)?;
        let recipe = match job.role {
            Role::Tiny => &config.finetune.tiny,
            Role::Llm => &config.finetune.llm,
        };
        let recipe = recipe.resolved(data.records.len());
        if job.allow_refinement && side.model.emulator.is_some() {
            let what = format!(
                "--allow-refinement: expected the TinyLM; found a GradOT emulator, {}",
                shown(&side.dir)
            );
            let hint =
                "refinement is of translations, and what is trained through an emulator is not translated";
            return Err(unusable_with(what, Some(hint.into())));
        }
        if config.privacy.is_on() {
            gradtx_train::privacy::check(&recipe)?;
        }
        let layers = match config.finetune.use_peft {
            true => None,
            false => Some(layers::params(&config, &side, [job.peft, job.allow_refinement])?),
        };
        Ok(Self { job, settings, config, side, data, prompts, recipe, layers })
    }
}

impl Stage for Finetune<'_> {
    type Inputs = FinetuneInputs;
    /// The loss of the last step.
    type Output = f64;

    fn dir(&self) -> &Path {
        &self.job.out
    }

    fn settings(&self) -> Option<&RunSettings> {
        Some(&self.settings)
    }

    fn inputs(&self) -> Result<FinetuneInputs> {
        let Self { job, config, side, data, prompts, recipe, layers, .. } = self;
        Ok(FinetuneInputs {
            seed: config.seed,
            data: data.inputs(&config.data, &[prompts]),
            max_length: config.data.max_length,
            adapter: match layers {
                None => ModelSpec::adapter_inputs(&config.lora, &[side]),
                Some(_) => AdapterInputs::default(),
            },
            recipe: recipe.clone(),
            device: config.device.clone(),
            model: side.space.base_model.clone(),
            peft: job.peft,
            refinement: job.allow_refinement.then(|| "allowed".into()),
            privacy: config.privacy.is_on().then(|| config.privacy.clone()),
            layers: layers.as_ref().map(|params| params.layers().to_vec()),
            reading: config.data.reading_inputs(),
        })
    }

    fn assumed(&self) -> Vec<String> {
        self.data.assumed(&[(self.job.role, &self.prompts)])
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, f64)> {
        let Self { job, config, side, data, prompts, recipe, .. } = self;
        data.announce_left_out(context);
        let steps = recipe.epochs_as_steps(data.records.len());
        steps.into_iter().for_each(|steps| context.ui.line(format!("finetune: {steps}")));
        let examples = data.examples(prompts, side, context, "finetune")?;
        // The key is the data's: a client's order does not depend on where its files lie.
        let key = derive_named(derive_named(config.seed, "client"), &data.checksum);
        if let Some(params) = &self.layers {
            let training = layers::FullWeights {
                config,
                side,
                params,
                recipe,
                out: &job.out,
                of: self.inputs()?.value()?,
            };
            return training.make(context, &examples, key);
        }
        let (trained, rate, privacy) = match config.privacy.is_on() {
            true => private::train(self, context, &examples.examples, key)?,
            false => self.train(context, &examples, key)?,
        };
        write_rate(&job.out, trained.losses.len(), rate)?;
        let mut files = vec![UPDATE_FILE.to_string(), METRICS_FILE.into()];
        if job.peft {
            files.extend(side.write_trained_peft(&job.out, &trained.updates, examples.examples.len())?);
            let made = made_of(recipe, examples.examples.len(), &privacy);
            files.push(card::write_beside_adapter(&side.dir, &side.layout, &made, &job.out)?);
        }
        let loss = trained.losses.last().copied().unwrap_or(f64::NAN);
        let mut update = side.update(trained.updates, examples.examples.len() as u64);
        update.meta.refinement = job.allow_refinement;
        update.meta.privacy = privacy;
        update.write(&job.out.join(UPDATE_FILE))?;
        Ok((files, loss))
    }

    fn report(&self, context: &Context, loss: &f64) -> Result<()> {
        let job = self.job;
        let text = format!("finetune {}: loss {loss:.4}, {}", job.role.name(), job.out.display());
        context.ui.done("finetune", &job.out, json!({ "model": job.role, "loss": loss }), text);
        Ok(())
    }
}

impl Finetune<'_> {
    /// Trains without a privacy guarantee.
    fn train(&self, context: &Context, examples: &Dataset, key: u64) -> Result<(JobResult, Rate, Privacy)> {
        let Self { job, config, side, recipe, .. } = self;
        let training = LoraTrainer {
            side,
            recipe,
            snapshots: Snapshots { count: 1, every: 1 },
            stream_tokens: config.device.max_tokens_per_microbatch,
        };
        let work = OneJob { context, training, examples, key, out: &job.out };
        let (trained, rate) = dispatch(&config.device, context, work)?;
        Ok((trained, rate, Privacy::None))
    }
}

/// What the card of the adapter says.
fn made_of(recipe: &Recipe, examples: usize, privacy: &Privacy) -> Made {
    Made {
        how: format!("was trained on {examples} examples of one owner"),
        settings: vec![
            ("optimizer steps", recipe.max_steps.to_string()),
            ("examples of a step", recipe.global_batch_size.to_string()),
            ("learning rate", format!("{:e}", recipe.learning_rate)),
        ],
        privacy: privacy.clone(),
    }
}

struct OneJob<'a> {
    context: &'a Context,
    training: LoraTrainer<'a>,
    examples: &'a Dataset,
    key: u64,
    /// Directory of the metrics.
    out: &'a Path,
}

impl Work for OneJob<'_> {
    type Output = (JobResult, Rate);

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<(JobResult, Rate)> {
        let LoraTrainer { side, recipe, .. } = self.training;
        let jobs = [trainer::Job { examples: self.examples.examples.iter().collect(), key: self.key }];
        let (plan, packing) = self.training.plan::<X, D>(&jobs)?;
        plan.check(memory_for(device, &self.context.place)?)?;
        let decoder = Decoder::<D, X>::load(device, &side.dir)?;
        self.context.ui.detail(format!("finetune {}: {packing}", side.role.name()));
        self.context.show_plan(&format!("finetune {}", side.role.name()), &plan);
        let mut watched = ShowSteps {
            progress: self.context.ui.progress("finetune", recipe.max_steps as u64),
            log: None,
            out: self.out,
            device_bytes: plan.total(),
            recipe,
            examples: self.examples.examples.len(),
        };
        let done = self.training.run(&decoder, &jobs, None, &mut watched)?;
        watched.sync()?;
        let (trained, rate) = done.expect("nobody stopped it");
        Ok((trained.into_iter().next().expect("one job gives one result"), rate))
    }
}
