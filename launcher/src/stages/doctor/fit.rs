//! The memory that stages will take, from their own plans, against what is there.
//!
//! Data is not read: streams are taken to be as long as the settings allow, so what is said
//! is the most that a stage can take. Base weights count as float32, which is what they
//! become in memory.

use super::Check;
use crate::args::Role;
use crate::config::{Config, RUN_FILE};
use crate::stages::side::lora_config;
use crate::stages::train::model_config;
use anyhow::{Context as _, Result, ensure};
use gradtx_kernels::cpu::Cpu;
use gradtx_models::decoder::{Decoder, DecoderConfig, GenerateLimits, Generator};
use gradtx_models::grad_transformer::{GradTransformer, Trainer};
use gradtx_models::lora::{BlockLayout, LoraJobs};
use gradtx_runtime::artifact::is_model_dir;
use gradtx_runtime::data::BatchCapacity;
use gradtx_runtime::plan::{MemoryPlan, Purpose, available_memory, human_bytes};
use serde_json::json;
use std::path::Path;

/// What the stages of a run take. `run` is its directory, or a run file.
pub fn of_run(run: &Path) -> Vec<Check> {
    let file = if run.is_dir() { run.join(RUN_FILE) } else { run.to_owned() };
    let topic = format!("run {}", run.display());
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
    let mut checks = vec![];
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
                let plan = model.finetuning(&config, jobs, recipe.batch);
                checks.push(fits(
                    &format!("curate {name}"),
                    format!("{jobs} jobs at once"),
                    &plan,
                    "device.stream_tokens or curate.concurrent",
                ));
                let recipe = if role == Role::Tiny { &config.finetune.tiny } else { &config.finetune.llm };
                let plan = model.finetuning(&config, 1, recipe.batch);
                let topic = format!("finetune {name}");
                checks.push(fits(&topic, "one job".into(), &plan, "device.stream_tokens"));
                checks.push(model.generating(&config, &format!("evaluate {name}")));
                layouts.push([model.layout.blocks(), model.layout.width()]);
            }
        }
    }
    if let [student, teacher] = layouts[..] {
        checks.push(training(&config, student, teacher).unwrap_or_else(|error| {
            Check::problem("train", format!("{error:#}")).advice("look at the section [translator]")
        }));
    }
    let public = config.data.public.as_slice();
    for path in public.iter().filter(|path| !path.as_os_str().is_empty() && !path.exists()) {
        checks.push(
            Check::problem("public data", format!("{}: there is no such file", path.display()))
                .advice("set data.public to files of examples, or a directory of them"),
        );
    }
    checks
}

/// What one model takes with the default settings.
pub fn of_model(dir: &Path) -> Vec<Check> {
    let config = Config::default();
    let name = dir.display();
    match Model::read(&config, dir) {
        Err(error) => vec![
            Check::problem(&format!("model {name}"), format!("{error:#}"))
                .advice("name a Hugging Face model directory"),
        ],
        Ok(model) => {
            let recipe = &config.finetune.tiny;
            let plan = model.finetuning(&config, 1, recipe.batch);
            let what = format!("one adapter, streams of {} tokens", config.device.stream_tokens);
            vec![
                fits(&format!("fine-tune {name}"), what, &plan, "device.stream_tokens"),
                model.generating(&config, &format!("generate {name}")),
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
        ensure!(dir.is_dir(), "{}: no such directory", dir.display());
        let model = DecoderConfig::read(dir)?;
        ensure!(is_model_dir(dir), "{}: there are no weights (model.safetensors)", dir.display());
        let layout = BlockLayout::new(&model, &lora_config(&config.adapter)?)
            .with_context(|| format!("{}: cannot hold the adapters", dir.display()))?;
        Ok(Self { config: model, layout })
    }

    /// The frozen base model.
    fn base(&self) -> MemoryPlan {
        let mut plan = MemoryPlan::new();
        let values = Decoder::<Cpu, f32>::layout_of(&self.config).total();
        plan.add(Purpose::Frozen, "base model", &[values], size_of::<f32>());
        plan
    }

    /// Fine-tuning of adapters on streams as long as they may be, with a label on every token.
    fn finetuning(&self, config: &Config, jobs: usize, batch: usize) -> MemoryPlan {
        let segments = jobs * batch;
        let tokens = config.device.stream_tokens.max(config.data.max_length);
        let tokens = tokens.min(segments * config.data.max_length);
        let capacity = BatchCapacity { tokens, segments: segments.min(tokens), labels: tokens };
        let mut plan = self.base();
        plan.extend(LoraJobs::<Cpu, f32>::plan(&self.config, &self.layout, jobs, capacity));
        plan
    }

    /// Generation for as many prompts at once as the settings say, each as long as it may be.
    fn generating(&self, config: &Config, topic: &str) -> Check {
        let (longest, settings) = (config.data.max_length, &config.evaluate);
        let limits = GenerateLimits {
            rows: settings.batch,
            prompt_tokens: longest.max(config.device.stream_tokens.min(longest * settings.batch)),
            context: longest + settings.max_new_tokens,
        };
        let mut plan = self.base();
        plan.extend(Generator::<Cpu, f32>::plan(&self.config, limits, Some(&self.layout)));
        let what = format!("{} prompts of up to {longest} tokens at once", settings.batch);
        fits(topic, what, &plan, "evaluate.batch or evaluate.max_new_tokens")
    }
}

/// Training of the translator between two sides, each `[blocks, width]`.
fn training(config: &Config, student: [usize; 2], teacher: [usize; 2]) -> Result<Check> {
    let shape = model_config(&config.translator, student, teacher)?;
    let model = GradTransformer::<Cpu, f32>::outline(&Cpu::new(1), shape)?;
    let plan = Trainer::plan(&model, config.train.micro_batch)?;
    let what = format!(
        "{} parameters, {} tuples at once, [{}, {}] to [{}, {}]",
        model.layout().count(),
        config.train.micro_batch,
        student[0],
        student[1],
        teacher[0],
        teacher[1]
    );
    Ok(fits("train", what, &plan, "train.micro_batch"))
}

/// Compares a plan with the memory that there is. `knobs` are the settings that lower it.
fn fits(topic: &str, what: String, plan: &MemoryPlan, knobs: &str) -> Check {
    let need = plan.total();
    let available = available_memory().unwrap_or(0);
    let found = format!("{what}: at most {}", human_bytes(need));
    let by_purpose: serde_json::Map<String, serde_json::Value> = plan
        .totals()
        .into_iter()
        .map(|(purpose, bytes)| (json!(purpose).as_str().unwrap_or_default().to_string(), json!(bytes)))
        .collect();
    let facts = json!({ "bytes": need, "available": available, "by_purpose": by_purpose });
    let check = match need <= available {
        true => Check::ok(topic, found),
        false => Check::problem(topic, format!("{found}, but {} are available", human_bytes(available)))
            .advice(format!("lower {knobs}, or take a machine with more memory")),
    };
    check.facts(facts)
}
