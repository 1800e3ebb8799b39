//! Pretraining of the world's base models, until they are as able as they should be.
//!
//! In: a role and a seed. Out: a model directory in Hugging Face form with `metrics.jsonl`.
//!
//! Ability is measured, not assumed: the greedy exact match on held-out letter sequences
//! with every operation told. The LLM goes on until it is always right, the TinyLM stops half-way,
//! so that the gap between them is the same whatever the machine. Shift and format are
//! hidden with a probability that rises from 0, so that both models know every operation
//! and can only guess when it is hidden.
//!
//! The architecture is Qwen2's. Its embedding is not scaled up as in some other families,
//! so it starts at unit variance (with an LM head of its own), which is what makes such
//! small models learn in a few hundred steps. Muon moves the matrices, AdamW the rest.

use crate::tasks::{END, LONGEST, Part, Sample, Sampler, id, vocabulary};
use crate::{World, tokenizer};
use anyhow::Result;
use gradtx_kernels::ops::AdamWStep;
use gradtx_kernels::rng::{derive, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{
    Decoder, DecoderConfig, Family, FullTrainer, GenerateLimits, Generator, InitialWeights, PretrainStep,
    Prompt, RopeScaling,
};
use gradtx_run::config::{DeviceConfig, DeviceKind, DtypeKind};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, dispatch};
use gradtx_run::failure::failed;
use gradtx_run::role::Role;
use gradtx_run::stage::{self, Inputs, Stage};
use gradtx_runtime::artifact::write_atomic;
use gradtx_runtime::data::{BatchCapacity, Example, PackedBatch, SegmentInfo};
use gradtx_runtime::optim::MuonStep;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::io::Write;
use std::path::Path;

/// When pretraining is done.
#[derive(Clone, Copy, Debug)]
struct Goal {
    /// Exact match to stop at.
    enough: f64,
    /// Exact match that no measurement may exceed: a TinyLM must not be too able.
    at_most: f64,
    /// Exact match from which the learning rates fall to zero over `COOLDOWN` steps.
    cool_from: f64,
    /// Steps from one measurement to the next, and once `LOOK_CLOSER` is reached.
    every: [u32; 2],
}

impl Goal {
    /// Knows every operation.
    const LLM: Self = Self { enough: 0.985, at_most: 1.0, cool_from: 0.9, every: [10, 10] };
    /// Half-way up the cliff that competence climbs within a hundred steps.
    const TINY: Self = Self { enough: 0.46, at_most: 0.58, cool_from: f64::INFINITY, every: [10, 2] };
    /// Exact match from which measurements are closer together.
    const LOOK_CLOSER: f64 = 0.1;
}

/// Examples of one step.
const BATCH: usize = 128;
/// Examples of one measurement.
const MEASURED: usize = 400;
/// Steps after which pretraining is given up.
const MAX_STEPS: u32 = 800;
/// Learning rate of AdamW.
const ADAMW_LR: f64 = 5e-3;
/// Learning rate of Muon.
const MUON_LR: f64 = 0.02;
/// Steps of warm-up.
const WARMUP: u32 = 30;
/// Steps over which the learning rate falls once the model is able.
const COOLDOWN: u32 = 60;
/// Probability of hiding shift and format, reached linearly between two steps.
pub(crate) const HIDE: f64 = 0.25;
const HIDE_BETWEEN: (f64, f64) = (40.0, 90.0);

/// Makes a base model of a world in a directory, unless it is there and intact.
pub fn make(
    context: &Context,
    device: DeviceKind,
    dir: &Path,
    world: World,
    role: Role,
    seed: u64,
) -> Result<()> {
    stage::run(context, &BaseModel { device, dir, world, role, seed }).map(drop)
}

/// What a base model depends on, beside the world that it lies in.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PretrainInputs {
    /// Which of the two models.
    pub role: Role,
    /// Seed of everything in it.
    pub seed: u64,
    /// Where it was made: the CPU goes without saying.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceKind>,
}

impl Inputs for PretrainInputs {
    const STAGE: &'static str = "pretrain";
}

/// A base model that is to be made.
pub struct BaseModel<'a> {
    device: DeviceKind,
    dir: &'a Path,
    world: World,
    role: Role,
    seed: u64,
}

impl Stage for BaseModel<'_> {
    type Inputs = PretrainInputs;
    type Output = ();

    fn dir(&self) -> &Path {
        self.dir
    }

    fn inputs(&self) -> Result<PretrainInputs> {
        let device = Some(self.device).filter(|device| *device != DeviceKind::Cpu);
        Ok(PretrainInputs { role: self.role, seed: self.seed, device })
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, ())> {
        let &Self { device, dir, world, role, seed } = self;
        let key = derive_named(derive_named(seed, "pretrain"), role.name());
        let device = DeviceConfig { kind: device, dtype: DtypeKind::F32, ..DeviceConfig::default() };
        let history = match world {
            World::Smoke => dispatch(&device, context, Untaught { dir, role, key }),
            _ => dispatch(&device, context, Pretrain { context, dir, world, role, key }),
        }?;
        tokenizer::write(dir)?;
        write_atomic(&dir.join("metrics.jsonl"), |out| {
            history.iter().try_for_each(|m| {
                let line = json!({ "step": m.step, "loss": m.loss, "told_exact_match": m.told });
                writeln!(out, "{line}")
            })
        })?;
        let files = [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ];
        Ok((files.map(String::from).into(), ()))
    }

    /// Whoever makes the world says that it is there.
    fn report(&self, _: &Context, (): &()) -> Result<()> {
        Ok(())
    }

    fn was_finished(&self, _: &Context) -> Result<()> {
        Ok(())
    }
}

/// Sizes of a base model. Where it is compressed between its first and last layers, there are more of them.
fn model_config(world: World, role: Role) -> DecoderConfig {
    let (hidden, layers, heads, intermediate) = match role {
        Role::Tiny => (48, 2, 4, 128),
        Role::Llm if world == World::Offsite => (96, 8, 6, 256),
        Role::Llm => (96, 4, 6, 256),
    };
    DecoderConfig {
        family: Family::Qwen2,
        vocab: vocabulary().len(),
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads: 2,
        head_dim: hidden / heads,
        norm_eps: 1e-6,
        rope_theta: 100.0,
        rope_scaling: RopeScaling::None,
        max_positions: 128,
        window: None,
        tied: false,
        bos: Some(id("<bos>")),
        eos: vec![id(END)],
        pad: Some(id("<unk>")),
        emulator: None,
    }
}

/// A measurement on the way.
struct Measured {
    step: u32,
    loss: f64,
    told: f64,
}

struct Pretrain<'a> {
    context: &'a Context,
    dir: &'a Path,
    world: World,
    role: Role,
    key: u64,
}

impl Work for Pretrain<'_> {
    type Output = Vec<Measured>;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Vec<Measured>> {
        let config = model_config(self.world, self.role);
        let goal = match self.role {
            Role::Tiny => Goal::TINY,
            Role::Llm => Goal::LLM,
        };
        let initial = initial_weights(&config);
        let decoder = Decoder::<D, X>::random(device, &config, &initial, derive_named(self.key, "weights"))?;
        let mut decoder = decoder.trainable()?;
        let capacity = BatchCapacity { tokens: BATCH * LONGEST, segments: BATCH, labels: BATCH * LONGEST };
        let mut pretrainer = FullTrainer::new(&decoder, true, capacity)?;
        let mut exam = Exam::new(&decoder, derive_named(self.key, "exam"))?;
        let mut history: Vec<Measured> = vec![];
        let mut cooling: Option<u32> = None;
        let what = format!("pretrain {}", self.role.name());
        let mut progress = self.context.ui.progress(&what, MAX_STEPS as u64);
        for step in 0..MAX_STEPS {
            let batch = batch_of(self.key, step, BATCH);
            let (loss, _) = pretrainer.train_step(&mut decoder, &batch, numbers(step, cooling))?;
            let last = history.last().map_or(0.0, |m| m.told);
            let cool = cooling.is_some_and(|from| step + 1 == from + COOLDOWN);
            if !cool && !(step + 1).is_multiple_of(goal.every[(last >= Goal::LOOK_CLOSER) as usize]) {
                continue;
            }
            let told = exam.exact_match(&decoder)?;
            history.push(Measured { step: step + 1, loss, told });
            progress.set(step as u64 + 1, format!("loss {loss:.3}, exact match {told:.3}"));
            if told >= goal.cool_from {
                cooling.get_or_insert(step + 1);
            }
            if told > goal.at_most {
                let why =
                    format!("{what}: exact match jumped from {last:.3} to {told:.3}, past {}", goal.at_most);
                return Err(failed(why, "try another seed"));
            }
            if told >= goal.enough {
                decoder.save(self.dir, false)?;
                let steps = step + 1;
                self.context.ui.line(format!("{what}: exact match {told:.3} after {steps} steps"));
                return Ok(history);
            }
            if cool {
                break;
            }
        }
        let best = history.iter().map(|m| m.told).fold(0.0, f64::max);
        Err(failed(format!("{what}: exact match reached {best:.3}, not {}", goal.enough), "try another seed"))
    }
}

fn initial_weights(config: &DecoderConfig) -> InitialWeights {
    InitialWeights { embedding: 1.0, head: 1.0 / (config.hidden as f64).sqrt(), matrices: None }
}

/// A base model of world `smoke`: a step or two of the same training, on little.
struct Untaught<'a> {
    dir: &'a Path,
    role: Role,
    key: u64,
}

impl Work for Untaught<'_> {
    type Output = Vec<Measured>;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Vec<Measured>> {
        const EXAMPLES: usize = 4;
        let layers = match self.role {
            Role::Tiny => 1,
            Role::Llm => 2,
        };
        // Heads of a size that real models have, so that they take their way through a device.
        let sizes = DecoderConfig {
            hidden: 64,
            layers,
            heads: 2,
            kv_heads: 1,
            ..model_config(World::Smoke, self.role)
        };
        let config = DecoderConfig { head_dim: 64, intermediate: 96, ..sizes };
        let key = derive_named(self.key, "weights");
        let decoder = Decoder::<D, X>::random(device, &config, &initial_weights(&config), key)?;
        let mut decoder = decoder.trainable()?;
        let tokens = EXAMPLES * LONGEST;
        let capacity = BatchCapacity { tokens, segments: EXAMPLES, labels: tokens };
        let mut pretrainer = FullTrainer::new(&decoder, true, capacity)?;
        let mut history = vec![];
        for step in 0..2 {
            let batch = batch_of(self.key, step, EXAMPLES);
            let (loss, _) = pretrainer.train_step(&mut decoder, &batch, numbers(step, None))?;
            history.push(Measured { step: step + 1, loss, told: 0.0 });
        }
        decoder.save(self.dir, false)?;
        Ok(history)
    }
}

/// The packed stream of a step: so many samples of the family.
fn batch_of(key: u64, step: u32, count: usize) -> PackedBatch {
    let (from, to) = HIDE_BETWEEN;
    let hide = HIDE * ((step as f64 - from) / (to - from)).clamp(0.0, 1.0);
    let mut sampler = Sampler::new(derive(derive_named(key, "samples"), step as u64));
    let examples: Vec<Example> = (0..count).map(|_| sampler.of_family(Part::Train, hide).example()).collect();
    let labels: usize = examples.iter().map(Example::labels).sum();
    let mut batch = PackedBatch::default();
    for example in &examples {
        batch.push(example, SegmentInfo::default(), 1.0 / labels as f64);
    }
    batch
}

/// Learning rates of a step; `cooling` is the step from which they fall.
fn numbers(step: u32, cooling: Option<u32>) -> PretrainStep {
    let warm = ((step + 1) as f64 / WARMUP as f64).min(1.0);
    let cool = cooling.map_or(1.0, |from| 1.0 - (step - from) as f64 / COOLDOWN as f64);
    let rate = warm * cool;
    PretrainStep {
        adamw: AdamWStep {
            lr: ADAMW_LR * rate,
            beta1: 0.9,
            beta2: 0.98,
            eps: 1e-8,
            weight_decay: 0.01,
            step: step + 1,
        },
        max_norm: None,
        muon: Some(MuonStep { lr: MUON_LR * rate, momentum: 0.95, weight_decay: 0.01, step: step + 1 }),
    }
}

/// Held-out samples with every operation told, and buffers to answer them.
struct Exam<D: Backend<X>, X: Real> {
    samples: Vec<Sample>,
    prompts: Vec<Prompt>,
    generator: Generator<D, X>,
}

impl<D: Backend<X>, X: Real> Exam<D, X> {
    fn new(decoder: &Decoder<D, X>, key: u64) -> Result<Self> {
        let mut sampler = Sampler::new(key);
        let samples: Vec<Sample> = (0..MEASURED).map(|_| sampler.of_family(Part::HeldOut, 0.0)).collect();
        let prompts: Vec<Prompt> = samples
            .iter()
            .map(|s| Prompt { tokens: s.prompt.iter().map(|w| id(w)).collect(), adapter: None })
            .collect();
        let limits =
            GenerateLimits { rows: MEASURED, prompt_tokens: MEASURED * LONGEST, context: 2 * LONGEST };
        Ok(Self { samples, prompts, generator: Generator::new(decoder, limits, None)? })
    }

    fn exact_match(&mut self, decoder: &Decoder<D, X>) -> Result<f64> {
        let answers = self.generator.generate(decoder, None, &self.prompts, LONGEST, &[id(END)])?;
        let right = answers.iter().zip(&self.samples).filter(|(answer, sample)| {
            let wanted = sample.response[..sample.response.len() - 1].iter().map(|w| id(w));
            answer.ended && wanted.eq(answer.tokens.iter().copied())
        });
        Ok(right.count() as f64 / self.samples.len() as f64)
    }
}
