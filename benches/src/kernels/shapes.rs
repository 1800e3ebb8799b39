//! [`Shapes`]: sizes of what is measured, and [`Bench`], which measures it.

use crate::counts::{Count, Sizes};
use crate::measure;
use crate::models::{NamedDecoder, NamedTranslator};
use crate::results::{Entry, Results};
use anyhow::Result;
use gradtx_kernels::ops::LmHead;
use gradtx_kernels::{Device, Real};
use gradtx_models::decoder::DecoderConfig;
use gradtx_models::grad_transformer::GradTransformerConfig;
use gradtx_models::lora::BlockLayout;
use gradtx_plan::cost::rates::Kind;
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use serde_json::{Value, json};

/// Sizes of everything that is measured.
pub struct Shapes {
    /// The decoder.
    pub model: NamedDecoder,
    /// Places of its adapter matrices.
    pub layout: BlockLayout,
    /// The translator.
    pub translator: NamedTranslator,
    /// Tokens of the stream.
    pub tokens: usize,
    /// Tuples of the translator's batch.
    pub batch: usize,
    /// Tokens in the cache of a sequence that decodes.
    pub context: usize,
    /// Values of flat buffers.
    pub values: usize,
    /// Bytes of an activation.
    pub x: usize,
}

impl Shapes {
    /// Sizes of the decoder.
    pub fn config(&self) -> &DecoderConfig {
        &self.model.config
    }

    /// Sizes of the translator.
    pub fn translator(&self) -> &GradTransformerConfig {
        &self.translator.config
    }

    /// Rows of the residual stream.
    pub fn sizes(&self) -> Sizes {
        Sizes { tokens: self.tokens, hidden: self.config().hidden, x: self.x }
    }

    /// The largest buffers that exist at once, roughly: those of the head, the MLP, or AdamW.
    pub fn plan<X: Real, D: LmHead<X>>(&self, tokens: usize) -> MemoryPlan {
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
pub struct Bench<'a, D: Device> {
    /// The device.
    pub device: &'a D,
    /// Where lines go.
    pub results: &'a mut Results,
    /// Only operations whose names contain this.
    pub only: Option<&'a str>,
}

impl<D: Device> Bench<'_, D> {
    /// Whether anything of this name is asked for. Ask before buffers are made.
    pub fn wants(&self, name: &str) -> bool {
        self.only.is_none_or(|only| name.contains(only))
    }

    /// Measures an operation that is bound by memory.
    pub fn memory(
        &mut self,
        name: &str,
        shape: impl Into<String>,
        count: Count,
        call: impl FnMut() -> gradtx_kernels::Result<()>,
    ) -> Result<()> {
        self.measure(name, shape.into(), count, Some(Kind::Memory), Value::Null, call)
    }

    /// Measures an operation that computes.
    pub fn compute(
        &mut self,
        name: &str,
        shape: impl Into<String>,
        count: Count,
        more: Value,
        call: impl FnMut() -> gradtx_kernels::Result<()>,
    ) -> Result<()> {
        self.measure(name, shape.into(), count, None, more, call)
    }

    /// Measures an operation, as one of some kind of work.
    pub fn measure(
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
