//! The memory that stages will take, from their own plans, against what is there.
//!
//! Data is not read: streams are taken to be as long as the settings allow, so what is said
//! is the most that a stage can take. Compared with what the device has that the settings name.

use super::check::Check;
use anyhow::{Context as _, Result, ensure};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{Decoder, DecoderConfig, GenerateLimits, Generator, LayerParams, LayerTrainer};
use gradtx_models::grad_transformer::{GradTransformer, GradTransformerConfig, Trainer};
use gradtx_models::lora::{BlockLayout, MultiLora};
use gradtx_run::config::{Config, DeviceConfig, DeviceKind, DtypeKind, RUN_FILE, run_dir};
use gradtx_run::context::Context;
use gradtx_run::device::take;
use gradtx_run::dispatch::{Question, Work, answer, dispatch, memory};
use gradtx_run::role::Role;
use gradtx_runtime::artifact::TensorSource;
use gradtx_runtime::data::BatchCapacity;
use gradtx_runtime::plan::{MemoryPlan, Room, human_bytes};
use gradtx_train::emulator::{Emulation, pass_memory, passes_that};
use gradtx_train::examples::Data;
use gradtx_train::model_spec::{adapter_layout, layer_params};
use gradtx_train::prompts::Prompts;
use gradtx_train::translator::{model_config, target_shape};
use serde_json::json;
use std::path::Path;

/// What the stages of a run take. `run` is its directory, or a run file.
pub fn of_run(context: &Context, run: &Path) -> Vec<Check> {
    let file = if run.is_dir() { run.join(RUN_FILE) } else { run.to_owned() };
    let topic = format!("run {}", run.display());
    if !file.is_file() {
        let (what, hint) = run_dir::describe(run);
        return vec![Check::problem(&topic, format!("{}: {what}", run.display())).advice(hint)];
    }
    let config = Config::read(&file).and_then(|config| {
        config.check()?;
        Ok(config)
    });
    let config = match config {
        Ok(config) => config,
        Err(error) => {
            return vec![
                Check::problem(&topic, format!("{error:#}"))
                    .advice("name a run directory that has a configuration, or a run file"),
            ];
        }
    };
    let mut checks = vec![device(&config, context)];
    let config = on_device(config, context);
    let there = Memory::of(&config.device, context);
    let mut layouts = vec![];
    for (role, dir) in [(Role::Tiny, &config.models.tiny), (Role::Llm, &config.models.llm)] {
        match Model::read(&config, dir) {
            Err(error) => checks.push(
                Check::problem(&format!("model {}", role.name()), format!("{error:#}"))
                    .advice(format!("set models.{} to a Hugging Face model directory", role.name())),
            ),
            Ok(model) => {
                let name = role.name();
                let jobs = config.curate.most_at_once();
                let recipe = if role == Role::Tiny { &config.curate.tiny } else { &config.curate.llm };
                let plan = model.finetuning(&config, jobs, recipe.global_batch_size, None);
                checks.push(there.fits(
                    &format!("curate {name}"),
                    format!("{jobs} jobs at once"),
                    &plan,
                    "device.max_tokens_per_microbatch or curate.jobs_per_batch",
                ));
                let recipe = if role == Role::Tiny { &config.finetune.tiny } else { &config.finetune.llm };
                let full = match config.finetune.use_peft {
                    true => None,
                    false => layer_params(&model.config, &config.lora).ok(),
                };
                let plan = model.finetuning(&config, 1, recipe.global_batch_size, full.as_ref());
                let topic = format!("finetune {name}");
                let what = full.map_or("one job".into(), |params| {
                    format!("full weights of layers {:?}", params.layers())
                });
                checks.push(there.fits(&topic, what, &plan, "device.max_tokens_per_microbatch"));
                checks.push(model.generating(&config, &there, &format!("evaluate {name}")));
                checks.extend((role == Role::Llm).then(|| model.emulating(&config, &there)).flatten());
                layouts.push([model.layout.blocks(), model.layout.width()]);
                checks.push(prompt(&config, dir, &model.config, name));
            }
        }
    }
    if let [student, teacher] = layouts[..] {
        checks.push(training(context, &config, &there, [student, teacher]).unwrap_or_else(|error| {
            Check::problem("train", format!("{error:#}")).advice("look at the section [translator]")
        }));
    }
    checks.extend(public_data(&config));
    checks
}

/// Whether the public data is there and can be read, as the stages will read it.
fn public_data(config: &Config) -> Vec<Check> {
    let public = config.data.public.as_slice();
    let mut checks = vec![];
    for path in public.iter().filter(|path| !path.as_os_str().is_empty() && !path.exists()) {
        checks.push(
            Check::problem("public data", format!("{}: there is no such file", path.display()))
                .advice("set data.public to files of examples, or a directory of them"),
        );
    }
    if checks.is_empty() && public.iter().any(|path| !path.as_os_str().is_empty()) {
        checks.push(match Data::read(public, &config.data, "data.public") {
            Ok(data) => Check::ok("public data", data.facts.line().trim_start_matches("data: ")),
            Err(error) => Check::problem("public data", format!("{error:#}"))
                .advice("correct the data, or the section [data] of the run file"),
        });
    }
    checks
}

/// Whether a model knows the prompt form, and generation stops where its answers end.
fn prompt(config: &Config, dir: &Path, model: &DecoderConfig, name: &str) -> Check {
    let topic = format!("prompt {name}");
    match Prompts::new(&config.data, dir, model, None) {
        Err(error) => Check::problem(&topic, format!("{error:#}")).advice("choose another data.prompt"),
        Ok(prompts) => {
            let size = prompts.tokenizer.size();
            let mut found = prompts.assumed().join("; ");
            if size > model.vocab {
                found += &format!(
                    "; its tokenizer has ids up to {}, the model's embedding {} rows: data with other ids is refused",
                    size - 1,
                    model.vocab
                );
            }
            let fine = prompts.check.notes().is_empty() && size <= model.vocab;
            if fine { Check::ok(&topic, found) } else { Check::note(&topic, found) }
        }
    }
}

/// Whether the settings use the devices that are here.
fn device(config: &Config, context: &Context) -> Check {
    match take(&config.device, &context.place) {
        Err(error) => Check::problem("device", format!("{error:#}"))
            .advice("set device.kind, or ask on a machine that has the device"),
        Ok(taken) => {
            let idle = config.device.kind == DeviceKind::Cpu && has_gpu(context);
            match taken.warning {
                Some(warning) => Check::problem("device", warning.trim_start_matches("warning: ")).advice(
                    "build with `--features cuda` for GPUs, or set device.kind to cpu where that is meant",
                ),
                None if idle => Check::problem("device", format!("{}: a GPU is here", taken.what))
                    .advice("set device.kind to auto, or ask on a machine without GPUs"),
                None => Check::ok("device", taken.what),
            }
        }
    }
}

/// With the device that is taken here; as it is where none can be.
fn on_device(config: Config, context: &Context) -> Config {
    match take(&config.device, &context.place) {
        Ok(taken) => Config { device: taken.settings, ..config },
        Err(_) => config,
    }
}

/// Whether `auto` would take a GPU here.
fn has_gpu(context: &Context) -> bool {
    let auto = DeviceConfig { kind: DeviceKind::Auto, dtype: DtypeKind::Auto, ..DeviceConfig::default() };
    take(&auto, &context.place).is_ok_and(|taken| taken.settings.kind == DeviceKind::Cuda)
}

/// What one model takes with the default settings.
pub fn of_model(context: &Context, dir: &Path) -> Vec<Check> {
    let config = on_device(Config::default(), context);
    let there = Memory::of(&config.device, context);
    let name = dir.display();
    match Model::read(&config, dir) {
        Err(error) => vec![
            Check::problem(&format!("model {name}"), format!("{error:#}"))
                .advice("name a Hugging Face model directory"),
        ],
        Ok(model) => {
            let recipe = &config.finetune.tiny;
            let plan = model.finetuning(&config, 1, recipe.global_batch_size, None);
            let what = format!("one adapter, streams of {} tokens", config.device.max_tokens_per_microbatch);
            vec![
                prompt(&config, dir, &model.config, &name.to_string()),
                there.fits(&format!("fine-tune {name}"), what, &plan, "device.max_tokens_per_microbatch"),
                model.generating(&config, &there, &format!("generate {name}")),
            ]
        }
    }
}

/// A base model's sizes.
struct Model {
    config: DecoderConfig,
    layout: BlockLayout,
}

impl Model {
    fn read(config: &Config, dir: &Path) -> Result<Self> {
        ensure!(!dir.as_os_str().is_empty(), "not set; expected a model directory");
        let model = DecoderConfig::read(dir)?;
        model.check_weights(&TensorSource::open(dir)?)?;
        let layout = adapter_layout(&model, &config.lora)
            .with_context(|| format!("{}: cannot hold the adapters", dir.display()))?;
        Ok(Self { config: model, layout })
    }

    /// Fine-tuning of adapters, or of the full weights of layers, on streams as long as they may be, with a label on
    /// every token.
    fn finetuning(
        &self,
        config: &Config,
        jobs: usize,
        batch: usize,
        full: Option<&LayerParams>,
    ) -> MemoryPlan {
        let segments = jobs.saturating_mul(batch);
        let tokens = config.device.max_tokens_per_microbatch.max(config.data.max_length);
        let tokens = tokens.min(segments.saturating_mul(config.data.max_length));
        let capacity = BatchCapacity { tokens, segments: segments.min(tokens), labels: tokens };
        answer(&config.device, Finetuning { model: self, jobs, full, capacity })
    }

    /// Generation for as many prompts at once as the settings say, each as long as it may be.
    fn generating(&self, config: &Config, there: &Memory, topic: &str) -> Check {
        let (longest, settings) = (config.data.max_length, &config.evaluate);
        let limits = GenerateLimits {
            rows: settings.per_device_eval_batch_size,
            prompt_tokens: longest.max(
                config
                    .device
                    .max_tokens_per_microbatch
                    .min(longest.saturating_mul(settings.per_device_eval_batch_size)),
            ),
            context: longest + settings.max_new_tokens,
        };
        let plan = answer(&config.device, Generating { model: self, limits });
        let what =
            format!("{} prompts of up to {longest} tokens at once", settings.per_device_eval_batch_size);
        there.fits(topic, what, &plan, "evaluate.per_device_eval_batch_size or evaluate.max_new_tokens")
    }
}

impl Model {
    /// Statistics for an emulator, in as many passes as memory asks for; nothing where the edge is the whole model.
    fn emulating(&self, config: &Config, there: &Memory) -> Option<Check> {
        let layers: Vec<usize> =
            Emulation { model: &self.config, settings: &config.emulator }.middle().collect();
        let longest = config.device.max_tokens_per_microbatch.max(config.data.max_length);
        let tokens = longest.min(config.emulator.num_tokens);
        let capacity = BatchCapacity { tokens, segments: tokens, labels: tokens };
        let plan = |layers: &[usize]| answer(&config.device, Summing { model: self, layers, capacity });
        let room = there.0.as_ref().copied().unwrap_or(Room::Host(0));
        let passes = passes_that(&layers, |layers| room.holds(&plan(layers)));
        let most = passes.iter().max_by_key(|layers| layers.len())?;
        let times = if passes.len() == 1 { "1 pass".to_owned() } else { format!("{} passes", passes.len()) };
        let what = format!("{} layers in {times} over the data", layers.len());
        Some(there.fits("emulate", what, &plan(most), "device.max_tokens_per_microbatch"))
    }
}

/// What the base model and sums over products of these layers take.
struct Summing<'a> {
    model: &'a Model,
    layers: &'a [usize],
    capacity: BatchCapacity,
}

impl Question for Summing<'_> {
    type Answer = MemoryPlan;

    fn answer<X: Real<Acc = f32>, D: Backend<X>>(self) -> MemoryPlan {
        pass_memory::<X, D>(&self.model.config, self.layers, self.capacity)
    }
}

/// What the base model and so many jobs on it take.
struct Finetuning<'a> {
    model: &'a Model,
    jobs: usize,
    /// What is trained in the place of adapters.
    full: Option<&'a LayerParams>,
    capacity: BatchCapacity,
}

impl Question for Finetuning<'_> {
    type Answer = MemoryPlan;

    fn answer<X: Real<Acc = f32>, D: Backend<X>>(self) -> MemoryPlan {
        let Model { config, layout } = self.model;
        let mut plan = Decoder::<D, X>::plan(config, false);
        plan.extend(match self.full {
            None => MultiLora::<D, X>::plan(config, layout, self.jobs, self.capacity),
            Some(params) => LayerTrainer::<D, X>::plan(config, params, self.capacity),
        });
        plan
    }
}

/// What the base model and generation take.
struct Generating<'a> {
    model: &'a Model,
    limits: GenerateLimits,
}

impl Question for Generating<'_> {
    type Answer = MemoryPlan;

    fn answer<X: Real<Acc = f32>, D: Backend<X>>(self) -> MemoryPlan {
        let Model { config, layout } = self.model;
        let mut plan = Decoder::<D, X>::plan(config, false);
        plan.extend(Generator::<D, X>::plan(config, self.limits, Some(layout)));
        plan
    }
}

/// What training of a translator of this shape takes.
struct TrainingOf {
    shape: GradTransformerConfig,
    micro_batch: usize,
}

impl Work for TrainingOf {
    /// Parameters, and everything that is allocated.
    type Output = (usize, MemoryPlan);

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Self::Output> {
        let model = GradTransformer::<D, X>::meta(device, self.shape)?;
        Ok((model.layout().count(), Trainer::plan(&model, self.micro_batch)?))
    }
}

/// Training of the translator between two sides, each `[blocks, width]`.
fn training(
    context: &Context,
    config: &Config,
    there: &Memory,
    [student, teacher]: [[usize; 2]; 2],
) -> Result<Check> {
    let teacher = target_shape(&config.train, teacher, config.curate.num_subsets);
    let shape = model_config(&config.translator, student, teacher)?;
    let micro_batch = config.train.per_device_train_batch_size;
    let (parameters, plan) = dispatch(&config.device, context, TrainingOf { shape, micro_batch })?;
    let what = format!(
        "{parameters} parameters, {micro_batch} tuples at once, [{}, {}] to [{}, {}]",
        student[0], student[1], teacher[0], teacher[1]
    );
    Ok(there.fits("train", what, &plan, "train.per_device_train_batch_size"))
}

/// The memory of the device that settings name; or why there is none.
struct Memory(std::result::Result<Room, String>);

impl Memory {
    fn of(settings: &DeviceConfig, context: &Context) -> Self {
        Self(memory(settings, &context.place).map_err(|error| format!("{error:#}")))
    }

    /// Compares a plan with it. `knobs` are the settings that lower the plan.
    fn fits(&self, topic: &str, what: String, plan: &MemoryPlan, knobs: &str) -> Check {
        let room = self.0.as_ref().copied().unwrap_or(Room::Host(0));
        let (need, available) = (room.taken(plan), room.available());
        let found = format!("{what}: at most {}", human_bytes(need));
        let by_purpose: serde_json::Map<String, serde_json::Value> = plan
            .totals()
            .into_iter()
            .map(|(purpose, bytes)| (json!(purpose).as_str().unwrap_or_default().to_string(), json!(bytes)))
            .collect();
        let facts = json!({ "bytes": need, "available": available, "by_purpose": by_purpose });
        let check = match &self.0 {
            Ok(_) if need <= available => Check::ok(topic, found),
            Ok(_) => Check::problem(topic, format!("{found}, but {} are available", human_bytes(available)))
                .advice(format!("lower {knobs}, or take a machine with more memory")),
            Err(why) => Check::problem(topic, format!("{found}, but {why}"))
                .advice("set device.kind to cpu, or ask on a machine that has the device"),
        };
        check.facts(facts)
    }
}
