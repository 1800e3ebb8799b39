//! What every stage takes of a rank's memory: the stages' own memory plans, made without a
//! device and without weights, with sizes as they are on the device to be planned for.
//!
//! Streams are taken to be as long as the settings and the examples allow, with a label on
//! every token, so what is said is the most that a stage can take.

use super::device::Gpu;
use anyhow::{Context, Result};
use gradtx_kernels::cpu::Cpu;
use gradtx_models::decoder::{Decoder, DecoderConfig, GenerateLimits, Generator};
use gradtx_models::grad_transformer::{self, GradTransformer, GradTransformerConfig, Trainer};
use gradtx_models::lora::{BlockLayout, MultiLora};
use gradtx_run::config::{AdapterConfig, EvaluateConfig};
use gradtx_run::role::Role;
use gradtx_runtime::data::BatchCapacity;
use gradtx_runtime::plan::{MemoryPlan, Planned, Purpose};
use gradtx_train::emulator::pass_memory;
use gradtx_train::model_spec::adapter_layout;
use serde::{Serialize, Serializer};
use std::ops::Range;
use std::path::Path;

/// A base model's sizes; no weights.
#[derive(Clone, Debug)]
pub struct Model {
    /// Which of the two.
    pub role: Role,
    /// Its sizes.
    pub config: DecoderConfig,
    /// Its adapters.
    pub layout: BlockLayout,
}

impl Model {
    /// Reads the `config.json` of a model directory.
    pub fn read(dir: &Path, role: Role, adapter: &AdapterConfig) -> Result<Self> {
        Self::new(DecoderConfig::read(dir)?, role, adapter)
            .with_context(|| format!("{}: cannot hold the adapters", dir.display()))
    }

    /// A model of these sizes.
    pub fn new(config: DecoderConfig, role: Role, adapter: &AdapterConfig) -> Result<Self> {
        let layout = adapter_layout(&config, adapter)?;
        Ok(Self { role, config, layout })
    }
}

/// A rank's memory in a stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// Bytes that the stage takes at most.
    pub need: u64,
    /// Bytes that there are.
    pub available: u64,
    /// The needed bytes by purpose.
    #[serde(serialize_with = "as_map")]
    pub by_purpose: Vec<(Purpose, u64)>,
}

fn as_map<S: Serializer>(pairs: &[(Purpose, u64)], serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().map(|(purpose, bytes)| (purpose, bytes)))
}

impl Memory {
    /// Compares a plan with what there is.
    pub fn of(plan: &MemoryPlan, available: u64) -> Self {
        Self { need: plan.total(), available, by_purpose: plan.totals() }
    }

    /// Whether there is enough.
    pub fn fits(&self) -> bool {
        self.need <= self.available
    }
}

/// Buffers that are statistics, indices or angles: not in the type of activations. By the
/// last part of their names.
const OWN_TYPE: [&str; 12] = [
    "inv_rms", "lse", "delta", "losses", "cos", "sin", "sums", "keys", "buckets", "tokens", "weights",
    "scale",
];

/// A plan made for f32, as it is where activations and frozen values take fewer bytes. What
/// is trained stays f32, and so do its gradients and moments.
fn on_device(plan: &MemoryPlan, gpu: Gpu) -> MemoryPlan {
    let mut out = MemoryPlan::new();
    for entry in plan.entries() {
        let size = element(entry);
        let keeps = matches!(entry.purpose, Purpose::Trained | Purpose::Gradients | Purpose::Optimizer)
            || size != 4
            || OWN_TYPE.iter().any(|end| entry.name.ends_with(end));
        let size = if keeps { size } else { gpu.element() as usize };
        out.add_pieces(entry.purpose, entry.name.as_str(), &entry.shape, size, entry.pieces);
    }
    out
}

/// What fine-tuning is made of.
#[derive(Clone, Copy, Debug)]
pub struct Streams {
    /// Jobs at once.
    pub jobs: usize,
    /// Examples of a job's optimizer step.
    pub batch: usize,
    /// Most tokens of a stream.
    pub stream_tokens: usize,
    /// Tokens of the longest example.
    pub longest: usize,
}

/// The base model and the fine-tuning of several jobs on it.
pub fn finetuning(model: &Model, streams: Streams, gpu: Gpu) -> MemoryPlan {
    let Streams { jobs, batch, stream_tokens, longest } = streams;
    let examples = jobs.saturating_mul(batch);
    let tokens = stream_tokens.max(longest).min(examples.saturating_mul(longest));
    let capacity = BatchCapacity { tokens, segments: examples.min(tokens), labels: tokens };
    let mut plan = Decoder::<Cpu, f32>::plan(&model.config, false);
    plan.extend(MultiLora::<Cpu, f32>::plan(&model.config, &model.layout, jobs, capacity));
    on_device(&plan, gpu)
}

/// The LLM and the sums of these layers for an emulator.
pub fn emulating(model: &DecoderConfig, layers: &[usize], capacity: BatchCapacity, gpu: Gpu) -> MemoryPlan {
    on_device(&pass_memory::<f32, Cpu>(model, layers, capacity), gpu)
}

/// The base model and generation with an adapter, for prompts as long as examples.
pub fn generating(
    model: &Model,
    settings: &EvaluateConfig,
    longest: usize,
    stream_tokens: usize,
    gpu: Gpu,
) -> MemoryPlan {
    let limits = GenerateLimits {
        rows: settings.per_device_eval_batch_size,
        prompt_tokens: longest
            .max(stream_tokens.min(longest.saturating_mul(settings.per_device_eval_batch_size))),
        context: longest + settings.max_new_tokens,
    };
    let mut plan = Decoder::<Cpu, f32>::plan(&model.config, false);
    plan.extend(Generator::<Cpu, f32>::plan(&model.config, limits, Some(&model.layout)));
    on_device(&plan, gpu)
}

/// The translator in training: `micro_batch` tuples at once, validation of `validated` at
/// once, and an optimizer whose moments (and masters) are spread over `shards` ranks.
/// Also says how many parameters there are.
pub fn training(
    config: &GradTransformerConfig,
    micro_batch: usize,
    validated: usize,
    shards: usize,
    gpu: Gpu,
) -> Result<(MemoryPlan, usize)> {
    let model = GradTransformer::<Cpu, f32>::meta(&Cpu::new(1), config.clone())?;
    let mut plan = Trainer::plan(&model, micro_batch)?;
    plan.extend(grad_transformer::Generator::plan(&model, validated.max(1))?);
    let values = model.layout().total();
    let shard = [values.div_ceil(shards.max(1))];
    let mut out = MemoryPlan::new();
    for entry in on_device(&plan, gpu).entries() {
        match (entry.purpose, gpu.element()) {
            (Purpose::Trained, size @ ..4) => {
                out.add(Purpose::Trained, "values", &[values], size as usize);
                out.add(Purpose::Trained, "masters", &shard, 4);
            }
            (Purpose::Optimizer, _) => out.add(entry.purpose, entry.name.as_str(), &shard, 4),
            _ => {
                out.add_pieces(entry.purpose, entry.name.as_str(), &entry.shape, element(entry), entry.pieces)
            }
        }
    }
    Ok((out, model.layout().count()))
}

/// The translator and one update on its way through it.
pub(crate) fn translating(config: &GradTransformerConfig, gpu: Gpu) -> Result<MemoryPlan> {
    let model = GradTransformer::<Cpu, f32>::meta(&Cpu::new(1), config.clone())?;
    let mut plan = model.plan_values()?;
    plan.extend(grad_transformer::Generator::plan(&model, 1)?);
    Ok(on_device(&plan, gpu))
}

/// Bytes of an element.
fn element(entry: &Planned) -> usize {
    let values = entry.shape.iter().fold(1u64, |product, &n| product.saturating_mul(n as u64));
    (entry.bytes / values.max(1)) as usize
}

/// The largest number in a range for which a plan fits; plans grow with it.
pub fn largest(range: Range<usize>, fits: impl Fn(usize) -> bool) -> Option<usize> {
    let Range { start, end } = range;
    if start >= end || !fits(start) {
        return None;
    }
    let (mut good, mut bad) = (start, end);
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        if fits(middle) { good = middle } else { bad = middle }
    }
    Some(good)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::calibrate::published;
    use gradtx_models::grad_transformer::StartToken;
    use gradtx_models::t5::T5Config;

    const STREAMS: Streams = Streams { jobs: 4, batch: 16, stream_tokens: 8192, longest: 1024 };

    fn model(name: &str) -> Model {
        Model::new(published(name).unwrap(), Role::Llm, &AdapterConfig::default()).unwrap()
    }

    #[test]
    fn a_gpu_takes_half_of_what_is_not_trained() {
        let model = model("qwen2.5-0.5b");
        let (cpu, gpu) = (finetuning(&model, STREAMS, Gpu::Cpu), finetuning(&model, STREAMS, Gpu::H100));
        let of = |plan: &MemoryPlan, purpose| {
            plan.totals().iter().find(|(p, _)| *p == purpose).map_or(0, |(_, bytes)| *bytes)
        };
        assert_eq!(of(&gpu, Purpose::Frozen), 494_032_768 * 2, "published: 494,032,768 parameters");
        assert_eq!(of(&cpu, Purpose::Frozen), 2 * of(&gpu, Purpose::Frozen));
        for purpose in [Purpose::Trained, Purpose::Gradients, Purpose::Optimizer] {
            assert_eq!(of(&cpu, purpose), of(&gpu, purpose));
        }
        let ratio = of(&cpu, Purpose::Activations) as f64 / of(&gpu, Purpose::Activations) as f64;
        assert!(ratio > 1.9 && ratio < 2.0, "statistics stay: {ratio}");
        let statistics = |plan: &MemoryPlan| {
            plan.entries().iter().filter(|e| e.name == "lse").map(|e| e.bytes).sum::<u64>()
        };
        assert_eq!(statistics(&cpu), statistics(&gpu));
        assert!(statistics(&cpu) > 0);
    }

    #[test]
    fn a_frozen_a_has_no_moments() {
        let adapter = AdapterConfig { r: 8, ..AdapterConfig::default() };
        let frozen = AdapterConfig { freeze_a: true, ..adapter.clone() };
        let [whole, frozen] = [adapter, frozen]
            .map(|adapter| Model::new(published("qwen2.5-7b").unwrap(), Role::Llm, &adapter).unwrap());
        assert_eq!((frozen.layout.width(), frozen.layout.blocks()), (8 * (3584 + 512), 28));
        let of = |model: &Model, purpose| {
            let plan = finetuning(model, STREAMS, Gpu::H100);
            plan.totals().iter().find(|(p, _)| *p == purpose).map_or(0, |(_, bytes)| *bytes)
        };
        let of_a = 28 * 8 * 2 * 3584;
        assert_eq!(of(&whole, Purpose::Optimizer) - of(&frozen, Purpose::Optimizer), 4 * 2 * 4 * of_a);
        assert_eq!(of(&whole, Purpose::Trained), of(&frozen, Purpose::Trained));
    }

    #[test]
    fn short_examples_need_no_long_streams() {
        let model = model("qwen2.5-0.5b");
        let small = Streams { jobs: 1, batch: 2, longest: 100, ..STREAMS };
        let exact = Streams { stream_tokens: 200, ..small };
        assert_eq!(finetuning(&model, small, Gpu::H100), finetuning(&model, exact, Gpu::H100));
    }

    #[test]
    fn sharded_translators_take_less_masters_included() {
        let config = GradTransformerConfig {
            student_width: 96,
            student_blocks: 5,
            teacher_width: 160,
            teacher_blocks: 7,
            start_token: StartToken::Embedded,
            targets: Default::default(),
            t5: T5Config { num_layers: 2, num_decoder_layers: 3, ..T5Config::preset("small").unwrap() },
        };
        let need = |shards, gpu| training(&config, 4, 8, shards, gpu).unwrap().0;
        let (one, four) = (need(1, Gpu::A100x80), need(4, Gpu::A100x80));
        let values = training(&config, 4, 8, 1, Gpu::Cpu).unwrap().1 as u64;
        let saved = one.total() - four.total();
        assert!(saved.abs_diff(3 * 4 * values * 3 / 4) < 1 << 16, "{saved} {values}");
        let has = |plan: &MemoryPlan, name: &str| plan.entries().iter().any(|e| e.name == name);
        assert!(has(&one, "masters") && !has(&need(1, Gpu::Cpu), "masters"));
        // On the CPU the plan is the trainer's own.
        let model = GradTransformer::<Cpu, f32>::meta(&Cpu::new(1), config.clone()).unwrap();
        let mut own = Trainer::plan(&model, 4).unwrap();
        own.extend(grad_transformer::Generator::plan(&model, 8).unwrap());
        assert_eq!(need(1, Gpu::Cpu), own);
    }

    #[test]
    fn the_largest_that_fits_is_found() {
        for limit in [1, 2, 7, 99] {
            assert_eq!(largest(1..100, |n| n <= limit), Some(limit));
        }
        assert_eq!(largest(1..100, |_| true), Some(99));
        assert_eq!(largest(1..100, |_| false), None);
        assert_eq!(largest(5..5, |_| true), None);
    }
}
