//! `bench finetune`: a LoRA step on one packed stream, and the same step of the frozen base.
//!
//! The step is the pipeline's own: forward with dropout, backward, clipping of every job, AdamW.
//! Every token but the first of an example is a label.
//!
//! **Operations**, by [`DecoderWork::finetuning`]: the base is frozen, so 4N per token and not
//! 6N (2N forwards, 2N backwards for the gradient of the input; N are the values of the blocks'
//! matrices), three times the forward operations of causal attention within segments, and 4VH
//! of the head per label. The adapters' own products (6 per value of an adapter) are left out
//! of the base's count.
//!
//! **The base alone** is the same stream forwards and backwards through a layout without
//! targets: the same frozen products and attention, the gradient carried to the first block,
//! but no down- and up-projections, no adapter gradients, no optimizer. The part that a step
//! with adapters takes longer is their overhead.

use super::counts::Count;
use super::measure::{self, Times};
use super::models::{NamedDecoder, check_memory, stream};
use super::options::{Common, at_least_one};
use super::results::{Entry, Results, rounded};
use super::{Measured, On, machine, profile};
use anyhow::{Result, ensure};
use gradtx_kernels::ops::AdamWStep;
use gradtx_kernels::{Backend, Buffer, Real};
use gradtx_models::decoder::{Activations, AdapterView, Decoder, Gradients, Mode};
use gradtx_models::lora::{BlockLayout, MultiLora, initial_adapter};
use gradtx_plan::cost::rates::Kind;
use gradtx_plan::cost::tokens::Lengths;
use gradtx_plan::cost::work::{Cost, DecoderWork};
use gradtx_run::failure::unusable;
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, PackedBatch};
use gradtx_runtime::plan::MemoryPlan;
use serde_json::{Value, json};

/// A step's sizes.
#[derive(Debug, clap::Args)]
pub struct Job {
    #[command(flatten)]
    pub(super) common: Common,
    /// The base model: qwen2.5-0.5b, 1.5b, 3b, 7b, 14b, 32b, or the path of a config.json
    /// (default: 0.5b on a CPU, 7b on a GPU).
    #[arg(long, value_name = "NAME|FILE")]
    model: Option<String>,
    /// Tokens of the stream (default: 256 on a CPU, 8192 on a GPU).
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Tokens of an example (default: 128 on a CPU, 512 on a GPU); the last one may be shorter.
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
}

/// Numbers of an optimizer step.
pub(super) const STEP: AdamWStep =
    AdamWStep { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: 1 };

/// Lengths of examples of `each` tokens that fill a stream.
fn lengths(tokens: usize, each: usize) -> Vec<usize> {
    (0..tokens.div_ceil(each)).map(|i| each.min(tokens - i * each)).collect()
}

/// Lengths of the examples of a step, of `each` tokens, of so many jobs.
///
/// # Errors
/// If an example has no label, or a job no example.
pub(crate) fn examples(tokens: usize, each: usize, jobs: usize) -> Result<Vec<usize>> {
    at_least_one("--tokens", tokens)?;
    at_least_one("--jobs", jobs)?;
    if each < 2 {
        return Err(unusable("--context: expected at least 2, a token and its successor"));
    }
    let examples = tokens.div_ceil(each);
    if examples < jobs {
        return Err(unusable(format!("--jobs {jobs}: the stream holds {examples} examples")));
    }
    Ok(lengths(tokens, each))
}

/// A step's sizes, for people.
pub(crate) fn shape(model: &str, lengths: &[usize], jobs: usize) -> String {
    let tokens: usize = lengths.iter().sum();
    let jobs = if jobs == 1 { String::new() } else { format!(", {jobs} jobs") };
    format!("{model}, {tokens} tokens in {} examples{jobs}", lengths.len())
}

/// Room for so many tokens in examples of `each`.
fn capacity(tokens: usize, each: usize) -> BatchCapacity {
    BatchCapacity { tokens, segments: tokens.div_ceil(each), labels: tokens }
}

/// Operations of a step on examples of these lengths.
pub fn operations(work: &DecoderWork<'_>, lengths: &[usize]) -> f64 {
    let cost = |n: &usize| work.finetuning(&Lengths::uniform(*n, n - 1).mean(None), 1.0, *n);
    lengths.iter().map(cost).fold(Cost::default(), |a, b| a + b).flops
}

impl Measured for Job {
    fn measure<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        on: &On<'_, D>,
        results: &mut Results,
    ) -> Result<()> {
        let is_cpu = on.machine.is_cpu();
        let by_default = if is_cpu { "qwen2.5-0.5b" } else { "qwen2.5-7b" };
        let model = NamedDecoder::find(self.model.as_deref().unwrap_or(by_default))?;
        let tokens = self.tokens.unwrap_or(if is_cpu { 256 } else { 8192 });
        let each = self.context.unwrap_or(if is_cpu { 128 } else { 512 });
        let lengths = examples(tokens, each, self.jobs)?;
        let layout = model.adapters(self.rank, &self.targets)?;
        check_memory(on.device, &model.name, "--tokens", tokens, |tokens| {
            Ok(plan::<X, D>(&model, &layout, self.jobs, capacity(tokens, each)))
        })?;
        if self.model.is_none() && is_cpu {
            results
                .say("a small model, since this is a CPU: --model qwen2.5-7b --tokens 8192 is the real one");
        }
        self.steps::<X, D>(on, results, &model, &layout, &lengths)
    }
}

fn plan<X: Real<Acc = f32>, D: Backend<X>>(
    model: &NamedDecoder,
    layout: &BlockLayout,
    jobs: usize,
    capacity: BatchCapacity,
) -> MemoryPlan {
    let mut plan = Decoder::<D, X>::plan(&model.config, false);
    plan.extend(MultiLora::<D, X>::plan(&model.config, layout, jobs, capacity));
    plan
}

impl Job {
    fn steps<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        on: &On<'_, D>,
        results: &mut Results,
        model: &NamedDecoder,
        layout: &BlockLayout,
        lengths: &[usize],
    ) -> Result<()> {
        let tokens: usize = lengths.iter().sum();
        let decoder = model.make::<X, D>(on.device)?;
        let batch = stream(lengths, model.config.vocab, self.jobs);
        let (base, first_step) = frozen_steps(on, results, &decoder, &batch)?;
        let (adapted, times_of, memory) = self.adapted_steps(on, results, &decoder, layout, &batch)?;
        let shares = machine::shares_of_time(on.device, adapted.total());

        let work = DecoderWork { model: &model.config, layout, element: size_of::<X>() as f64 };
        let adapters = 6.0 * (layout.total() * tokens) as f64;
        let flops = operations(&work, lengths);
        let fields = |times: &Times| {
            json!({"model": model.name, "tokens": tokens, "examples": lengths.len(), "jobs": self.jobs,
                "rank": self.rank, "targets": self.targets,
                "tokens_per_s": rounded(tokens as f64 / times.median())})
        };
        let count = Count::flops(flops - adapters);
        let mut more = fields(&base);
        more["first_step_s"] = rounded(first_step);
        results.add(
            on.device,
            Entry::new("finetune base alone", shape(&model.name, lengths, 1), count, base.clone()).with(more),
        )?;
        let mut more = fields(&adapted);
        more["overhead"] = rounded(adapted.median() / base.median() - 1.0);
        more["share_of_time"] = shares;
        more["operations"] = times_of;
        // While there were all buffers.
        more["peak_memory_bytes"] = json!(memory);
        let planned = plan::<X, D>(model, layout, self.jobs, BatchCapacity::of([&batch]));
        more["planned_memory_bytes"] = json!(machine::room(on.device)?.taken(&planned));
        let shape = shape(&model.name, lengths, self.jobs);
        let entry = Entry::new("finetune", shape, Count::flops(flops), adapted);
        results.add(on.device, entry.of(Kind::Lora).with(more))
    }

    fn adapted_steps<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        on: &On<'_, D>,
        results: &Results,
        decoder: &Decoder<D, X>,
        layout: &BlockLayout,
        batch: &PackedBatch,
    ) -> Result<(Times, Value, Option<u64>)> {
        let room = BatchCapacity::of([batch]);
        let mut jobs = MultiLora::new(decoder, layout, self.jobs, &initial_adapter(layout, 2), room)?;
        let mut step = 0;
        let mut train = || {
            step += 1;
            if step as usize == self.common.warmup + 1 {
                machine::start_profile(on.device);
            }
            let report = jobs.train_step(decoder, batch, AdamWStep { step, ..STEP }, Some(1.0))?;
            finite(&report.losses)
        };
        let times = measure::step(on.device, results.repeats(), &mut train)?;
        let times_of = profile::of_step(on, train)?;
        Ok((times, times_of, results.used_memory(on.device)))
    }
}

fn finite(losses: &[f64]) -> Result<()> {
    ensure!(losses.iter().all(|loss| loss.is_finite()), "losses are {losses:?}");
    Ok(())
}

/// Steps without adapters: forward and backward of the same stream. Also the seconds from the
/// command's beginning to the end of the first of them.
fn frozen_steps<X: Real<Acc = f32>, D: Backend<X>>(
    on: &On<'_, D>,
    results: &Results,
    decoder: &Decoder<D, X>,
    batch: &PackedBatch,
) -> Result<(Times, f64)> {
    let layout = BlockLayout::without_targets(decoder.config());
    let room = BatchCapacity::of([batch]);
    let mut acts = Activations::new(decoder, room, Mode::Adapters(&layout))?;
    let mut on_device = DeviceBatch::new(on.device, room)?;
    let (values, mut grads) = (on.device.zeros(0)?, on.device.zeros(0)?);
    let mut first_step = None;
    let times = measure::step(on.device, results.repeats(), || {
        on_device.load(on.device, batch)?;
        let view = AdapterView { values: &values, layout: &layout, dropout: 0.0 };
        let grads = Gradients::Adapters(grads.all_mut());
        decoder.loss_and_gradient(&mut acts, &on_device, Some(view), grads)?;
        let losses = on.device.to_host(acts.losses())?;
        first_step.get_or_insert_with(|| on.started.elapsed());
        finite(&[losses.iter().map(|loss| loss.to_f64()).sum()])
    })?;
    Ok((times, first_step.map_or(0.0, |time| time.as_secs_f64())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_models::lora::LoraConfig;

    #[test]
    fn examples_fill_the_stream_and_cost_their_tokens() {
        assert_eq!(lengths(10, 4), [4, 4, 2]);
        assert_eq!(lengths(8, 4), [4, 4]);
        let model = NamedDecoder::find("qwen2.5-7b").unwrap();
        let layout = BlockLayout::new(&model.config, &LoraConfig::default()).unwrap();
        let work = DecoderWork { model: &model.config, layout: &layout, element: 2.0 };
        // By hand: 6.525 billion values of the blocks, 545 million of the head, 28 blocks of
        // attention of 3,584 over the pairs of two examples, adapters of 630,784 values.
        let (h, q, kv, f, v, l) = (3584.0, 3584.0, 512.0, 18_944.0, 152_064.0, 28.0);
        let n = l * (h * (q + 2.0 * kv) + q * h + 3.0 * h * f);
        let pairs = 4.0 * 5.0 / 2.0 + 2.0 * 3.0 / 2.0;
        let wanted = 6.0 * 4.0 * n + 4.0 * (3.0 + 1.0) * h * v + 12.0 * l * q * pairs + 6.0 * 6.0 * 630_784.0;
        let found = operations(&work, &[4, 2]);
        assert!((found / wanted - 1.0).abs() < 1e-12, "{found} {wanted}");
        // The count of training all parameters is another one.
        assert!((found / (1.5 * wanted) - 1.0).abs() > 0.3);
    }
}
