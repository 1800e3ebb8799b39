//! [`Trainer`]: gradients over micro-batches, then one AdamW step.
//!
//! A step is [`Trainer::gradients_of`] a batch, [`Trainer::sum_squares`] and
//! [`Trainer::apply`]; [`Trainer::train_step`] is the three in a row. Where ranks share a
//! batch, another program sums their gradients between the first and the second, and their
//! sums of squares between the second and the third: gradients are those of
//! `scale · Σ (pred − target)²`, so what is summed over ranks, with the scale of the whole
//! batch, is the gradient of the mean over all of it.
//!
//! A trainer may own a part of the parameters only, some ranges of the flat buffer: it then
//! keeps masters and moments of those, and updates those ([`ParamStore`]).

use super::{Activations, Batch, GradTransformer};
use crate::t5::{Grads, OnReady};
use gradtx_kernels::ops::{AdamWStep, Backend, Out};
use gradtx_kernels::{AsyncCopy, Buffer, GraphCapture, Real};
use gradtx_runtime::Result;
use gradtx_runtime::buffers::Allocator;
use gradtx_runtime::optim::{FlatAdamW, ParamStore, Trained};
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use std::collections::HashMap;
use std::ops::Range;

/// What a step gives.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean squared error over all elements, before the update.
    pub loss: f64,
    /// Norm of the whole gradient, before clipping.
    pub grad_norm: f64,
}

/// Everything that training needs beside the model.
pub struct Trainer<D: AsyncCopy + GraphCapture, X: Real> {
    acts: Activations<D, X>,
    graphs: HashMap<Repeated, Passes<D>>,
    params: ParamStore<D, X>,
    /// Of the own ranges.
    optimizer: FlatAdamW<D, X::Acc>,
}

/// What the operations of a micro-batch depend on, beside what buffers hold.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Repeated {
    /// Tuples.
    batch: usize,
    /// Which of the two sets of inputs.
    inputs: usize,
    /// The bits of the loss's scale.
    scale: u64,
    /// Whether its gradients are the first of a batch, which are assigned.
    first: bool,
}

/// The passes of such a micro-batch, as the device remembers them.
struct Passes<D: GraphCapture> {
    /// Forward and losses.
    forward: D::Graph,
    backward: D::Graph,
}

/// Kinds of micro-batches whose passes are remembered.
const MAX_GRAPHS: usize = 16;

impl<D: Backend<X>, X: Real> Trainer<D, X> {
    /// Takes memory for micro-batches of at most `micro_batch` tuples. Masters start as the
    /// model's values.
    pub fn new(model: &mut GradTransformer<D, X>, micro_batch: usize) -> Result<Self> {
        let all = 0..model.layout.total();
        Self::of_ranges(model, micro_batch, vec![all])
    }

    /// The same, to update only these ranges of the flat buffer: disjoint, in increasing order,
    /// none empty.
    pub fn of_ranges(
        model: &mut GradTransformer<D, X>,
        micro_batch: usize,
        own: Vec<Range<usize>>,
    ) -> Result<Self> {
        let mut alloc = Allocator::new(&model.dev, Purpose::Trained);
        let mut trainer = Self::allocate(&mut alloc, model, micro_batch, own)?;
        trainer.params.take_masters(&model.dev, &model.values)?;
        Ok(trainer)
    }

    /// The buffers that training takes, the model's own values included.
    pub fn plan(model: &GradTransformer<D, X>, micro_batch: usize) -> Result<MemoryPlan> {
        let all = 0..model.layout.total();
        Self::plan_of_ranges(model, micro_batch, vec![all])
    }

    /// The same for a trainer of these ranges.
    pub fn plan_of_ranges(
        model: &GradTransformer<D, X>,
        micro_batch: usize,
        own: Vec<Range<usize>>,
    ) -> Result<MemoryPlan> {
        Allocator::plan(Purpose::Trained, |alloc| {
            model.allocate_values(alloc)?;
            Self::allocate(alloc, model, micro_batch, own)
        })
    }

    fn allocate(
        alloc: &mut Allocator<'_, D>,
        model: &GradTransformer<D, X>,
        micro_batch: usize,
        own: Vec<Range<usize>>,
    ) -> Result<Self> {
        let total = model.layout.total();
        let params = ParamStore::allocate(alloc, total, own.clone())?;
        let optimizer = FlatAdamW::allocate_ranges(alloc, total, own)?;
        let acts = Activations::allocate(alloc, model, micro_batch)?;
        Ok(Self { acts, graphs: HashMap::new(), params, optimizer })
    }

    /// The optimizer, for checkpoints.
    pub fn optimizer(&self) -> &FlatAdamW<D, X::Acc> {
        &self.optimizer
    }

    /// The optimizer, to be filled from a checkpoint.
    pub fn optimizer_mut(&mut self) -> &mut FlatAdamW<D, X::Acc> {
        &mut self.optimizer
    }

    /// Whether the model's values are their own masters, so that all of them are here.
    pub fn values_are_masters(&self) -> bool {
        ParamStore::<D, X>::values_are_masters()
    }

    /// Master values of the own ranges on the host, one after the other: what a checkpoint
    /// holds, and if all is owned, a translator's file.
    pub fn master_values(&self, model: &GradTransformer<D, X>) -> Result<Vec<f32>> {
        self.params.master_values(&model.dev, &model.values)
    }

    /// Sets master values of the own ranges, and the model's values there with them.
    pub fn set_master_values(&mut self, model: &mut GradTransformer<D, X>, masters: &[f32]) -> Result<()> {
        self.params.set_master_values(&model.dev, &mut model.values, masters)
    }

    /// The gradients summed so far.
    pub fn gradients(&self) -> &D::Buf<X::Acc> {
        self.params.gradients()
    }

    /// The gradients summed so far, for writing.
    pub fn gradients_mut(&mut self) -> &mut D::Buf<X::Acc> {
        self.params.gradients_mut()
    }

    /// Gradients of `scale · Σ (pred − target)²` over a batch, with dropout, in micro-batches as
    /// large as there is room for; returns the sum of squares. In the last micro-batch
    /// `on_ready` learns which gradients are final, with all of them.
    pub fn gradients_of<'t>(
        &mut self,
        model: &GradTransformer<D, X>,
        tuples: impl Into<Batch<'t, D, X>>,
        scale: f64,
        on_ready: &mut dyn FnMut(Range<usize>, D::ViewMut<'_, X::Acc>) -> Result<()>,
    ) -> Result<f64> {
        self.accumulate_all(model, tuples.into(), scale, Some(on_ready))
    }

    /// [`Self::gradients_of`] where nobody waits for parts of them.
    pub fn gradients_alone<'t>(
        &mut self,
        model: &GradTransformer<D, X>,
        tuples: impl Into<Batch<'t, D, X>>,
        scale: f64,
    ) -> Result<f64> {
        self.accumulate_all(model, tuples.into(), scale, None)
    }

    /// Begins to copy the tuples of the next step to the device while it is busy with this one:
    /// between the gradients and whatever waits for them. They are recognised by their keys, and
    /// may but need not be the next ones.
    pub fn load_ahead<'t>(
        &mut self,
        model: &GradTransformer<D, X>,
        tuples: impl Into<Batch<'t, D, X>>,
    ) -> Result<()> {
        let tuples = tuples.into();
        tuples.check(&model.config)?;
        let first = tuples.part(&model.config, 0, self.acts.capacity().min(tuples.len()));
        self.acts.load_ahead(&model.config, first)
    }

    fn accumulate_all(
        &mut self,
        model: &GradTransformer<D, X>,
        tuples: Batch<'_, D, X>,
        scale: f64,
        mut on_ready: Option<OnReady<'_, D, X::Acc>>,
    ) -> Result<f64> {
        tuples.check(&model.config)?;
        let (mut sum, count, room) = (0.0, tuples.len(), self.acts.capacity());
        for from in (0..count).step_by(room) {
            let to = (from + room).min(count);
            let part = tuples.part(&model.config, from, to);
            let on_ready = if to == count { on_ready.take() } else { None };
            let out = if from == 0 { Out::Assign } else { Out::Add };
            sum += self.accumulate(model, part, scale, out, on_ready)?;
            if to < count {
                let next = tuples.part(&model.config, to, (to + room).min(count));
                self.acts.load_ahead(&model.config, next)?;
            }
        }
        Ok(sum)
    }

    /// Assigns or adds the gradients of a micro-batch. Where nobody must be told of parts of them, all
    /// operations of a micro-batch are repeated from the device's memory of the last such one.
    fn accumulate(
        &mut self,
        model: &GradTransformer<D, X>,
        tuples: Batch<'_, D, X>,
        scale: f64,
        out: Out,
        on_ready: Option<OnReady<'_, D, X::Acc>>,
    ) -> Result<f64> {
        model.load_batch(&mut self.acts, tuples)?;
        let (acts, buf, dev) = (&mut self.acts, self.params.gradients_mut(), &model.dev);
        let (inputs, first) = (acts.current, out == Out::Assign);
        let kind = Repeated { batch: tuples.len(), inputs, scale: scale.to_bits(), first };
        if self.graphs.len() >= MAX_GRAPHS && !self.graphs.contains_key(&kind) {
            self.graphs.clear();
        }
        let new = || Passes { forward: D::Graph::default(), backward: D::Graph::default() };
        let passes = self.graphs.entry(kind).or_insert_with(new);
        dev.capture_or_launch(&mut passes.forward, &mut || {
            model.forward(acts, true)?;
            model.losses(acts, scale)
        })?;
        model.release_losses(acts)?;
        match on_ready {
            Some(on_ready) => model.backward(acts, true, &mut Grads::new(dev, buf, out, on_ready))?,
            None => dev.capture_or_launch(&mut passes.backward, &mut || {
                model.backward(acts, true, &mut Grads::new(dev, buf, out, &mut |_, _| Ok(())))
            })?,
        }
        // The device is at the backward pass meanwhile.
        Ok(model.sum_of_losses(acts)?.to_f64())
    }

    /// Sum of squares of the gradients of the own ranges.
    pub fn sum_squares(&mut self, dev: &D) -> Result<f64> {
        self.optimizer.sum_squares(dev, self.params.gradients().all())
    }

    /// One AdamW step on the own ranges with the gradients there, which are clipped by the norm
    /// of the whole gradient; `sum_squares` is the sum of squares of all of it. Returns that norm.
    ///
    /// # Errors
    /// When the norm is not finite; then nothing is changed.
    pub fn apply(
        &mut self,
        model: &mut GradTransformer<D, X>,
        step: AdamWStep,
        max_norm: Option<f64>,
        sum_squares: f64,
    ) -> Result<f64> {
        let (dev, optimizer) = (&model.dev, &mut self.optimizer);
        let Trained { params, values, grads } = self.params.trained(&mut model.values);
        match values {
            None => optimizer.step_with(dev, params, grads, step, max_norm, sum_squares),
            Some(values) => {
                optimizer.step_with_values(dev, params, values, grads, step, max_norm, sum_squares)
            }
        }
    }

    /// Whether these tuples alone, with the dropout of their keys, give a finite loss and finite
    /// gradients. The gradients summed so far are lost.
    pub fn is_finite<'t>(
        &mut self,
        model: &GradTransformer<D, X>,
        tuples: impl Into<Batch<'t, D, X>>,
        scale: f64,
    ) -> Result<bool> {
        let dev = &model.dev;
        let sum = self.gradients_alone(model, tuples, scale)?;
        let mut squares = dev.zeros::<X::Acc>(1)?;
        let grads = self.params.gradients();
        dev.sum_squares(squares.all_mut(), grads.all(), 1, grads.len())?;
        Ok(sum.is_finite() && dev.to_host(squares.all())?[0].to_f64().is_finite())
    }

    /// A whole step on one rank.
    pub fn train_step<'t>(
        &mut self,
        model: &mut GradTransformer<D, X>,
        tuples: impl Into<Batch<'t, D, X>>,
        step: AdamWStep,
        max_norm: Option<f64>,
    ) -> Result<StepReport> {
        let tuples = tuples.into();
        let scale = 1.0 / (tuples.len() * model.config.teacher_len()) as f64;
        let sum = self.gradients_alone(model, tuples, scale)?;
        let sum_squares = self.sum_squares(&model.dev)?;
        let grad_norm = self.apply(model, step, max_norm, sum_squares)?;
        Ok(StepReport { loss: sum * scale, grad_norm })
    }

    /// Mean squared error with known blocks before each predicted one, without dropout.
    pub fn evaluate<'t>(
        &mut self,
        model: &GradTransformer<D, X>,
        tuples: impl Into<Batch<'t, D, X>>,
    ) -> Result<f64> {
        let tuples = tuples.into();
        tuples.check(&model.config)?;
        // Keys say nothing about tuples where there is no dropout.
        self.acts.forget_ahead();
        let mut sum = 0.0;
        for from in (0..tuples.len()).step_by(self.acts.capacity()) {
            let to = (from + self.acts.capacity()).min(tuples.len());
            model.load_batch(&mut self.acts, tuples.part(&model.config, from, to))?;
            model.forward(&mut self.acts, false)?;
            sum += model.loss_sum(&mut self.acts, 0.0)?.to_f64();
        }
        Ok(sum / (tuples.len() * model.config.teacher_len()) as f64)
    }
}
