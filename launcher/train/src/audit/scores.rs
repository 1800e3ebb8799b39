//! Membership inference against an update vector: scores of examples.
//!
//! In: a model, an update of its initial adapter, and examples. Out: [`Scores`] of each, larger for what
//! was probably trained on. The attacker knows the model, the update and the example, and nothing else.

use crate::model_spec::ModelSpec;
use anyhow::Result;
use gradtx_kernels::{Backend, Buffer, Real};
use gradtx_models::decoder::{Activations, AdapterView, Decoder, Gradients, Mode};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, memory_for};
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, Example, PackedBatch, SegmentInfo};
use gradtx_runtime::plan::Purpose;

/// How an example is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attack {
    /// Minus the loss with the update.
    Loss,
    /// How much the update lowers the loss.
    LossChange,
    /// Cosine of the update with minus the example's gradient at the initial adapter.
    GradientAlignment,
}

impl Attack {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Loss, Self::LossChange, Self::GradientAlignment];

    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loss => "loss",
            Self::LossChange => "loss change",
            Self::GradientAlignment => "gradient alignment",
        }
    }
}

/// An example's scores, in the order of [`Attack::ALL`].
pub type Scores = [f64; 3];

/// Scores examples one by one.
pub struct Scoring<'a> {
    /// Where messages go.
    pub context: &'a Context,
    /// The model with its initial adapter.
    pub side: &'a ModelSpec,
    /// `[L · d]`
    pub update: &'a [f32],
    /// What is scored.
    pub examples: &'a [Example],
}

impl Scoring<'_> {
    fn capacity(&self) -> BatchCapacity {
        let mut capacity = BatchCapacity { segments: 1, ..BatchCapacity::default() };
        for example in self.examples {
            capacity.tokens = capacity.tokens.max(example.tokens.len());
            capacity.labels = capacity.labels.max(example.labels());
        }
        capacity
    }
}

/// One example as a stream; its loss is the mean over its labels.
fn stream(example: &Example) -> PackedBatch {
    let mut stream = PackedBatch::default();
    let info = SegmentInfo { adapter: 0, grad_row: 0, key: 0 };
    stream.push(example, info, 1.0 / example.labels().max(1) as f64);
    stream
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

impl Work for Scoring<'_> {
    type Output = Vec<Scores>;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Vec<Scores>> {
        let (layout, capacity) = (&self.side.layout, self.capacity());
        let mode = Mode::Adapters(layout);
        let mut plan = Decoder::<D, X>::plan(&self.side.model, false);
        for name in ["initial adapter", "trained adapter", "gradient"] {
            plan.add(Purpose::Trained, name, &[layout.total()], size_of::<f32>());
        }
        plan.extend(Activations::<D, X>::plan(&self.side.model, capacity, mode));
        plan.check(memory_for(device, &self.context.place)?)?;
        let decoder = Decoder::<D, X>::load(device, &self.side.dir)?;
        let mut acts = Activations::new(&decoder, capacity, mode)?;
        let mut batch = DeviceBatch::new(device, capacity)?;
        let trained = self.side.adapter_of(self.update);
        let (initial, trained) = (device.buffer_from(&self.side.init)?, device.buffer_from(&trained)?);
        let mut gradient = device.zeros(layout.total())?;
        let zeros = vec![0.0f32; layout.total()];
        let length = norm(self.update).max(f64::MIN_POSITIVE);
        let mut progress = self.context.ui.progress("audit", self.examples.len() as u64);
        let mut scores = Vec::with_capacity(self.examples.len());
        for example in self.examples {
            let stream = stream(example);
            batch.load(device, &stream)?;
            let view = |values| AdapterView { values, layout, dropout: 0.0 };
            decoder.loss(&mut acts, &batch, Some(view(&trained)))?;
            let after = mean_loss(&stream, &device.to_host(acts.losses())?);
            device.upload(gradient.all_mut(), &zeros)?;
            let grads = Gradients::Adapters(gradient.all_mut());
            decoder.loss_and_gradient(&mut acts, &batch, Some(view(&initial)), grads)?;
            let before = mean_loss(&stream, &device.to_host(acts.losses())?);
            let found = device.to_host(gradient.view(layout.trained()))?;
            let along: f64 = found.iter().zip(self.update).map(|(&g, &u)| f64::from(g) * f64::from(u)).sum();
            let alignment = -along / (length * norm(&found).max(f64::MIN_POSITIVE));
            scores.push([-after, before - after, alignment]);
            progress.set(scores.len() as u64, "examples");
        }
        Ok(scores)
    }
}

fn mean_loss(stream: &PackedBatch, losses: &[f32]) -> f64 {
    stream.weights.iter().zip(losses).map(|(w, loss)| w * f64::from(*loss)).sum()
}
