//! [`Trainer`]: gradients over micro-batches, then one AdamW step.
//!
//! A step is [`Trainer::zero_gradients`], [`Trainer::accumulate`] for every micro-batch
//! and [`Trainer::update`]; [`Trainer::train_step`] is the three in a row. Between
//! accumulating and updating another program may sum gradients over ranks: they are
//! sums of gradients of `scale · Σ (pred − target)²`, so what is summed over ranks, with
//! the scale of the whole batch, is the gradient of the mean over all of it.
//!
//! Where the model computes in the accumulators' own type, its values are its master
//! values; otherwise masters are kept beside them and converted after each step.

use super::{Activations, GradTransformer, Tuples};
use crate::t5::{Grads, weights};
use gradtx_kernels::ops::{AdamWStep, Backend, Cast};
use gradtx_kernels::{Device, Elem, Real};
use gradtx_runtime::Result;
use gradtx_runtime::optim::FlatAdamW;
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use std::any::Any;
use std::ops::Range;

/// What a step tells.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean squared error over all elements, before the update.
    pub loss: f64,
    /// Norm of the whole gradient, before clipping.
    pub grad_norm: f64,
}

/// Everything that training needs beside the model.
pub struct Trainer<D: Device, X: Real> {
    acts: Activations<D, X>,
    /// As the model's values, in the same layout.
    grads: D::Buf<X::Acc>,
    /// As the gradients; none where the values are their own masters.
    masters: Option<D::Buf<X::Acc>>,
    optimizer: FlatAdamW<D, X::Acc>,
}

/// The values themselves as accumulators, where the two types are the same.
fn own_masters<D: Device, X: Real>(values: &mut D::Buf<X>) -> Option<&mut D::Buf<X::Acc>> {
    (values as &mut dyn Any).downcast_mut()
}

impl<D: Backend<X>, X: Real> Trainer<D, X> {
    /// Takes memory for micro-batches of at most `micro_batch` tuples. Masters start as the
    /// model's values.
    pub fn new(model: &mut GradTransformer<D, X>, micro_batch: usize) -> Result<Self> {
        let dev = model.dev.clone();
        let total = model.layout.total();
        let masters = match own_masters::<D, X>(&mut model.values) {
            Some(_) => None,
            None => {
                let mut masters = dev.zeros(total)?;
                <D as Cast<X, X::Acc>>::cast(&dev, D::all_mut(&mut masters), D::all(&model.values))?;
                Some(masters)
            }
        };
        Ok(Self {
            acts: Activations::new(model, micro_batch)?,
            grads: dev.zeros(total)?,
            masters,
            optimizer: FlatAdamW::new(&dev, 1, total)?,
        })
    }

    /// The buffers that training takes, the model's own values included, without taking them.
    pub fn plan(model: &GradTransformer<D, X>, micro_batch: usize) -> Result<MemoryPlan> {
        let (shape, acc) = ([model.layout.total()], X::Acc::DTYPE.size());
        let mut plan = MemoryPlan::new();
        plan.add(Purpose::Trained, "values", &shape, X::DTYPE.size());
        if X::DTYPE != X::Acc::DTYPE {
            plan.add(Purpose::Trained, "masters", &shape, acc);
        }
        plan.add(Purpose::Gradients, "gradients", &shape, acc);
        plan.add(Purpose::Optimizer, "first moments", &shape, acc);
        plan.add(Purpose::Optimizer, "second moments", &shape, acc);
        plan.extend(Activations::plan(model, micro_batch)?);
        Ok(plan)
    }

    /// The optimizer, for checkpoints.
    pub fn optimizer(&self) -> &FlatAdamW<D, X::Acc> {
        &self.optimizer
    }

    /// The optimizer, to be filled from a checkpoint.
    pub fn optimizer_mut(&mut self) -> &mut FlatAdamW<D, X::Acc> {
        &mut self.optimizer
    }

    /// Master values on the host: what a checkpoint and a translator's file hold.
    pub fn master_values(&self, model: &GradTransformer<D, X>) -> Result<Vec<f32>> {
        match &self.masters {
            Some(masters) => weights::to_f32(&model.dev, masters),
            None => weights::to_f32::<D, X>(&model.dev, &model.values),
        }
    }

    /// Sets master values, and the model's values with them.
    pub fn set_master_values(&mut self, model: &mut GradTransformer<D, X>, masters: &[f32]) -> Result<()> {
        let dev = model.dev.clone();
        if let Some(own) = &mut self.masters {
            weights::upload_f32::<D, X::Acc>(&dev, D::all_mut(own), masters, &mut Vec::new())?;
        }
        weights::upload_f32::<D, X>(&dev, D::all_mut(&mut model.values), masters, &mut Vec::new())
    }

    /// The gradients summed so far.
    pub fn gradients(&self) -> &D::Buf<X::Acc> {
        &self.grads
    }

    /// The gradients summed so far, for writing.
    pub fn gradients_mut(&mut self) -> &mut D::Buf<X::Acc> {
        &mut self.grads
    }

    /// Begins a step.
    pub fn zero_gradients(&mut self, dev: &D) -> Result<()> {
        Ok(dev.fill(D::all_mut(&mut self.grads), X::Acc::zero())?)
    }

    /// Adds the gradients of `scale · Σ (pred − target)²` over a micro-batch, with dropout;
    /// returns the sum of squares. In the step's last micro-batch `on_ready` learns which
    /// gradients are final.
    pub fn accumulate(
        &mut self,
        model: &GradTransformer<D, X>,
        tuples: Tuples<'_>,
        scale: f64,
        on_ready: &mut dyn FnMut(Range<usize>, D::ViewMut<'_, X::Acc>) -> Result<()>,
    ) -> Result<f64> {
        model.load_batch(&mut self.acts, tuples)?;
        model.forward(&mut self.acts, true)?;
        let sum = model.loss_sum(&mut self.acts, scale)?.to_f64();
        model.backward(&mut self.acts, true, &mut Grads { buf: &mut self.grads, on_ready })?;
        Ok(sum)
    }

    /// One AdamW step with the gradients summed; returns their norm.
    ///
    /// # Errors
    /// When the norm is not finite; then nothing is changed.
    pub fn update(
        &mut self,
        model: &mut GradTransformer<D, X>,
        step: AdamWStep,
        max_norm: Option<f64>,
    ) -> Result<f64> {
        let dev = model.dev.clone();
        let masters = match &mut self.masters {
            Some(masters) => masters,
            None => own_masters::<D, X>(&mut model.values).expect("masters are kept where types differ"),
        };
        let grads = D::all(&self.grads);
        let norms = self.optimizer.step(&dev, D::all_mut(masters), grads, step, max_norm)?;
        if let Some(masters) = &self.masters {
            <D as Cast<X::Acc, X>>::cast(&dev, D::all_mut(&mut model.values), D::all(masters))?;
        }
        Ok(norms[0])
    }

    /// A whole step on one rank: micro-batches as large as there is room for.
    pub fn train_step(
        &mut self,
        model: &mut GradTransformer<D, X>,
        tuples: Tuples<'_>,
        step: AdamWStep,
        max_norm: Option<f64>,
    ) -> Result<StepReport> {
        tuples.check(&model.config)?;
        let scale = 1.0 / (tuples.len() * model.config.teacher_len()) as f64;
        self.zero_gradients(&model.dev)?;
        let mut sum = 0.0;
        for from in (0..tuples.len()).step_by(self.acts.capacity()) {
            let to = (from + self.acts.capacity()).min(tuples.len());
            let part = tuples.part(&model.config, from, to);
            sum += self.accumulate(model, part, scale, &mut |_, _| Ok(()))?;
        }
        let grad_norm = self.update(model, step, max_norm)?;
        Ok(StepReport { loss: sum * scale, grad_norm })
    }

    /// Mean squared error with known blocks before each predicted one, without dropout.
    pub fn evaluate(&mut self, model: &GradTransformer<D, X>, tuples: Tuples<'_>) -> Result<f64> {
        tuples.check(&model.config)?;
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
