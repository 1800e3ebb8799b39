//! Pretraining of the world's base models, until they are as able as they should be.
//!
//! In: a role and a seed. Out: a model directory in Hugging Face form with `metrics.jsonl`.
//!
//! Ability is measured, not assumed: the greedy exact match on held-out letter sequences
//! with every operation told. The LLM goes on to [`Goal::LLM`], the TinyLM stops half-way,
//! so that the gap between them is the same whatever the machine. Shift and format are
//! hidden with a probability that rises from 0, so that both models know every operation
//! and can only guess when it is hidden.
//!
//! The architecture is Qwen2's. Its embedding is not scaled up as in some other families,
//! so it starts at unit variance (with an LM head of its own), which is what makes such
//! small models learn in a few hundred steps. Muon moves the matrices, AdamW the rest.

use crate::args::Role;
use crate::config::DeviceConfig;
use crate::dispatch::{Work, dispatch};
use crate::failure::failed;
use crate::record::{self, State};
use crate::stages::Context;
use crate::world::tasks::{END, LONGEST, Part, Sample, Sampler, id, vocabulary};
use crate::world::tokenizer;
use anyhow::Result;
use gradtx_kernels::rng::{derive, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::{Decoder, DecoderConfig, Family, InitialWeights, RopeScaling};
use gradtx_runtime::artifact::write_atomic;
use gradtx_runtime::data::{Example, PackedBatch, SegmentInfo};
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
    /// Exact match from which the learning rate falls to zero over [`COOLDOWN`] steps.
    cool_from: f64,
    /// Steps from one measurement to the next, and once [`Goal::LOOK_CLOSER`] is reached.
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
const MOST_STEPS: u32 = 800;
/// Learning rate of AdamW.
const ADAMW_LR: f64 = 5e-3;
/// Learning rate of Muon.
const MUON_LR: f64 = 0.02;
/// Steps of warm-up.
const WARMUP: u32 = 30;
/// Steps over which the learning rate falls once the model is able.
const COOLDOWN: u32 = 60;
/// Probability of hiding shift and format, reached linearly between two steps.
const HIDE: f64 = 0.25;
const HIDE_BETWEEN: (f64, f64) = (40.0, 90.0);

/// Makes a base model in a directory, unless it is there and intact.
pub fn make(context: &Context, device: &DeviceConfig, dir: &Path, role: Role, seed: u64) -> Result<()> {
    let settings = json!({ "role": role, "seed": seed });
    let State::Open(output) = record::open(dir, "pretrain", settings)? else {
        return Ok(());
    };
    let key = derive_named(derive_named(seed, "pretrain"), role.name());
    let history = dispatch(device, context.threads, Pretrain { context, dir, role, key })?;
    tokenizer::write(dir)?;
    write_atomic(&dir.join("metrics.jsonl"), |out| {
        history.iter().try_for_each(|m| {
            let line = json!({ "step": m.step, "loss": m.loss, "told_exact_match": m.told });
            writeln!(out, "{line}")
        })
    })?;
    let files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    output.finish(&files.map(String::from))
}

/// Sizes of a base model.
fn model_config(role: Role) -> DecoderConfig {
    let (hidden, layers, heads, intermediate) = match role {
        Role::Tiny => (48, 2, 4, 128),
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
        tied: false,
        bos: Some(id("<bos>")),
        eos: vec![id(END)],
        pad: Some(id("<unk>")),
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
    role: Role,
    key: u64,
}
