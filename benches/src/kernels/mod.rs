//! `bench kernels`: every operation by itself, at the sizes of a model.
//!
//! Calls are queued back to back and waited for once per sample, so that launch latency counts
//! only where a call is shorter than its launch. Operations and bytes are those of
//! [`super::counts`]. The streams of packed attention have segments of 256 to 2048 tokens.
//!
//! Buffers that fit into the device's cache are read faster than memory gives: a `share_of_copy`
//! above 1 says so.

mod attention;
mod flat;
mod matrix;
mod rows;

use super::counts::{Count, Sizes};
use super::models::{NamedDecoder, NamedTranslator, TranslatorArgs, check_memory};
use super::options::{Common, at_least_one};
use super::results::{Entry, Results};
use super::{Measured, On, measure};
use anyhow::Result;
use gradtx_kernels::ops::LmHead;
use gradtx_kernels::{Backend, Device, Real};
use gradtx_models::decoder::DecoderConfig;
use gradtx_models::grad_transformer::GradTransformerConfig;
use gradtx_models::lora::BlockLayout;
use gradtx_plan::cost::rates::Kind;
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use serde_json::{Value, json};

/// Which sizes.
#[derive(Debug, clap::Args)]
pub struct Job {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(flatten)]
    sizes: TranslatorArgs,
    /// The decoder whose sizes to take: qwen2.5-0.5b, 1.5b, 3b, 7b, 14b, 32b, or the path of a
    /// config.json (default: 0.5b on a CPU, 7b on a GPU).
    #[arg(long, value_name = "NAME|FILE")]
    model: Option<String>,
    /// Tokens of the stream (default: 1024 on a CPU, 8192 on a GPU).
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Tuples of a translator's batch (default: 8 on a CPU, 32 on a GPU), and sequences that
    /// decode at once (twice as many).
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Tokens in the cache of a sequence that decodes.
    #[arg(long, value_name = "N", default_value_t = 320)]
    context: usize,
    /// Values of flat buffers, for AdamW and conversions (default: 16 million on a CPU, 256 million
    /// on a GPU).
    #[arg(long, value_name = "N")]
    values: Option<usize>,
    /// Rank of the adapters.
    #[arg(long, value_name = "R", default_value_t = 2)]
    rank: usize,
    /// What is adapted.
    #[arg(long, value_delimiter = ',', default_values_t = ["q_proj".to_string(), "v_proj".to_string()])]
    targets: Vec<String>,
    /// Only operations whose names contain this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// Sizes of everything that is measured.
struct Shapes {
    model: NamedDecoder,
    layout: BlockLayout,
    translator: NamedTranslator,
    tokens: usize,
    batch: usize,
    context: usize,
    values: usize,
    /// Bytes of an activation.
    x: usize,
}

impl Shapes {
    fn config(&self) -> &DecoderConfig {
        &self.model.config
    }

    fn translator(&self) -> &GradTransformerConfig {
        &self.translator.config
    }

    /// Rows of the residual stream.
    fn sizes(&self) -> Sizes {
        Sizes { tokens: self.tokens, hidden: self.config().hidden, x: self.x }
    }

    /// The largest buffers that exist at once, roughly: those of the head, the MLP, or AdamW.
    fn plan<X: Real, D: LmHead<X>>(&self, tokens: usize) -> MemoryPlan {
        let (c, mut plan) = (self.config(), MemoryPlan::new());
        let wide = 5 * c.intermediate + 2 * c.hidden;
        let translator =
            self.batch * (self.translator().teacher_blocks * self.translator().teacher_width) * 3;
        plan.add(Purpose::Activations, "activations", &[tokens, wide], self.x);
        plan.add(Purpose::Activations, "head", &[c.vocab, c.hidden + D::CHUNK], self.x);
        plan.add(Purpose::Activations, "tuples", &[translator], self.x);
        plan.add(Purpose::Optimizer, "flat buffers", &[4, self.values], 4);
        plan
    }
}

/// Measures operations and adds their lines.
struct Bench<'a, D: Device> {
    device: &'a D,
    results: &'a mut Results,
    only: Option<&'a str>,
}

impl<D: Device> Bench<'_, D> {
    /// Whether anything of this name is asked for. Ask before buffers are made.
    fn wants(&self, name: &str) -> bool {
        self.only.is_none_or(|only| name.contains(only))
    }

    /// Measures an operation that is bound by memory.
    fn memory(
        &mut self,
        name: &str,
        shape: impl Into<String>,
        count: Count,
        call: impl FnMut() -> gradtx_kernels::Result<()>,
    ) -> Result<()> {
        self.measure(name, shape.into(), count, Some(Kind::Memory), Value::Null, call)
    }

    /// Measures an operation that computes.
    fn compute(
        &mut self,
        name: &str,
        shape: impl Into<String>,
        count: Count,
        more: Value,
        call: impl FnMut() -> gradtx_kernels::Result<()>,
    ) -> Result<()> {
        self.measure(name, shape.into(), count, None, more, call)
    }

    fn measure(
        &mut self,
        name: &str,
        shape: String,
        count: Count,
        work: Option<Kind>,
        more: Value,
        mut call: impl FnMut() -> gradtx_kernels::Result<()>,
    ) -> Result<()> {
        if !self.wants(name) {
            return Ok(());
        }
        let times = measure::operation(self.device, self.results.repeats(), || Ok(call()?))?;
        let mut entry = Entry::new(name, shape, count, times).with(with_bench(more));
        entry.work = work;
        self.results.add(self.device, entry)
    }
}

/// Says which benchmark a line is of.
fn with_bench(more: Value) -> Value {
    let mut more = if more.is_object() { more } else { json!({}) };
    more["bench"] = "kernels".into();
    more
}

impl Measured for Job {
    fn measure<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        on: &On<'_, D>,
        results: &mut Results,
    ) -> Result<()> {
        let is_cpu = on.machine.is_cpu();
        let by_default = |cpu: usize, gpu: usize| if is_cpu { cpu } else { gpu };
        let name = if is_cpu { "qwen2.5-0.5b" } else { "qwen2.5-7b" };
        let model = NamedDecoder::find(self.model.as_deref().unwrap_or(name))?;
        let shapes = Shapes {
            layout: model.adapters(self.rank, &self.targets)?,
            model,
            translator: NamedTranslator::find(&self.sizes, is_cpu)?,
            tokens: self.tokens.unwrap_or(by_default(1024, 8192)),
            batch: self.batch.unwrap_or(by_default(8, 32)),
            context: self.context,
            values: self.values.unwrap_or(by_default(16_000_000, 256_000_000)),
            x: size_of::<X>(),
        };
        for (option, value) in
            [("--tokens", shapes.tokens), ("--batch", shapes.batch), ("--context", shapes.context)]
        {
            at_least_one(option, value)?;
        }
        at_least_one("--values", shapes.values)?;
        check_memory(on.device, "bench kernels", "--tokens", shapes.tokens, |n| Ok(shapes.plan::<X, D>(n)))?;
        if self.model.is_none() && is_cpu {
            results.say(
                "sizes of small models, since this is a CPU: --model, --translator, --tokens change them",
            );
        }
        let mut bench = Bench { device: on.device, results, only: self.only.as_deref() };
        rows::measure::<X, D>(&mut bench, &shapes)?;
        flat::measure::<X, D>(&mut bench, &shapes)?;
        attention::measure::<X, D>(&mut bench, &shapes)?;
        matrix::measure::<X, D>(&mut bench, &shapes)
    }
}
