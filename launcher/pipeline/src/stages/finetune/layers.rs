//! Fine-tuning of full weights: what `finetune` does where `finetune.use_peft` is false.
//!
//! Out: `layers.safetensors`, the layers' tensors under the names that they have in the model and in their types, with
//! notes of the emulator that they are of and the number of examples. While it works, the directory has
//! `checkpoint.safetensors`, from which a run that was stopped continues.

use super::log::{ShowSteps, write_rate};
use anyhow::Result;
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{Decoder, LayerParams};
use gradtx_models::{LAYERS_FILE, write_layers};
use gradtx_run::config::{Config, Recipe};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, dispatch, memory_for};
use gradtx_run::failure::{stopped, unusable_with};
use gradtx_run::interrupt::{ShutdownGuard, stop_requested};
use gradtx_runtime::artifact::TensorSource;
use gradtx_runtime::data::Dataset;
use gradtx_runtime::metrics::Rate;
use gradtx_train::lora::layers::{LayerCheckpoint, LayerTraining};
use gradtx_train::lora::trainer::{self, Callback, JobResult, Step};
use gradtx_train::model_spec::{ModelSpec, layer_params};
use gradtx_train::step_log::METRICS_FILE;
use serde_json::Value;
use std::path::Path;

const CHECKPOINT_FILE: &str = "checkpoint.safetensors";

/// What is trained: the layers that the settings name, all of them, or an emulator's edge.
///
/// # Errors
/// Where what is asked for needs an adapter.
pub(super) fn params(
    config: &Config,
    side: &ModelSpec,
    [save_adapter, allow_refinement]: [bool; 2],
) -> Result<LayerParams> {
    let needs_adapter = |what: &str, hint: &str| {
        let what = format!("{what}: expected finetune.use_peft = true; found false, which trains no adapter");
        Err(unusable_with(what, Some(hint.into())))
    };
    if config.privacy.is_on() {
        let hint = "train a LoRA adapter with differential privacy: full weights would take a gradient of their own \
                    size for each example";
        return needs_adapter("[privacy]", hint);
    }
    if save_adapter {
        return needs_adapter(
            "--save-adapter",
            "leave it away: full weights are written as layers.safetensors",
        );
    }
    if allow_refinement {
        return needs_adapter(
            "--allow-refinement",
            "refinement is of translated updates, which are adapters'",
        );
    }
    layer_params(&side.model, &config.lora)
}

/// A training of full weights that is ready to begin.
pub(super) struct FullWeights<'a> {
    pub(super) config: &'a Config,
    pub(super) side: &'a ModelSpec,
    pub(super) params: &'a LayerParams,
    pub(super) recipe: &'a Recipe,
    /// Directory of the results.
    pub(super) out: &'a Path,
    /// What the result depends on.
    pub(super) of: Value,
}

impl FullWeights<'_> {
    /// Trains, and writes the layers; returns the files and the loss of the last step.
    pub(super) fn make(self, context: &Context, examples: &Dataset, key: u64) -> Result<(Vec<String>, f64)> {
        let Self { config, side, params, recipe, out, of } = self;
        let base = TensorSource::open(&side.dir)?;
        let stream_tokens = config.device.max_tokens_per_microbatch;
        let training = LayerTraining { side, params, recipe, stream_tokens };
        let checkpoint = LayerCheckpoint { path: out.join(CHECKPOINT_FILE), of };
        let own = trainer::Job { examples: examples.examples.iter().collect(), key };
        let guard = ShutdownGuard::begin();
        let work = TrainLayers { context, training: &training, job: &own, checkpoint: &checkpoint, out };
        let Some((values, trained, rate)) = dispatch(&config.device, context, work)? else {
            return Err(stopped(stop_requested().unwrap_or_default()));
        };
        drop(guard);
        write_rate(out, trained.losses.len(), rate)?;
        let notes = side.notes(examples.examples.len());
        write_layers(&out.join(LAYERS_FILE), params, &values, &base, &notes)?;
        // The result is there; the checkpoint is three times as large.
        let _ = std::fs::remove_file(&checkpoint.path);
        let loss = trained.losses.last().copied().unwrap_or(f64::NAN);
        Ok((vec![LAYERS_FILE.into(), METRICS_FILE.into()], loss))
    }
}

struct TrainLayers<'a> {
    context: &'a Context,
    training: &'a LayerTraining<'a>,
    job: &'a trainer::Job<'a>,
    checkpoint: &'a LayerCheckpoint,
    /// Directory of the metrics.
    out: &'a Path,
}

impl Work for TrainLayers<'_> {
    type Output = Option<(Vec<f32>, JobResult, Rate)>;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Self::Output> {
        let Self { context, training, job, checkpoint, out } = self;
        let LayerTraining { side, recipe, params, .. } = training;
        let (plan, packing) = training.plan::<X, D>(job)?;
        plan.check(memory_for(device, &context.place)?)?;
        let mut decoder = Decoder::<D, X>::load_trainable(device, &side.dir)?;
        let name = format!("finetune {}", side.role.name());
        let layers = params.layers();
        context.ui.line(format!("{name}: full weights of layers {layers:?}"));
        context.ui.detail(format!("{name}: {packing}"));
        context.show_plan(&name, &plan);
        let steps = ShowSteps {
            progress: context.ui.progress("finetune", recipe.max_steps as u64),
            log: None,
            out,
            device_bytes: plan.total(),
            recipe,
            examples: job.examples.len(),
        };
        let mut callback = UntilStopped { steps };
        let trained = training.run(&mut decoder, job, checkpoint, &mut callback)?;
        callback.steps.sync()?;
        Ok(trained)
    }
}

/// Shows every step, and ends when a signal asks for it.
struct UntilStopped<'a> {
    steps: ShowSteps<'a>,
}

impl Callback for UntilStopped<'_> {
    fn step(&mut self, step: &Step<'_>) -> Result<bool> {
        self.steps.step(step)?;
        Ok(stop_requested().is_none())
    }
}
