//! [`MultiLora`]: several adapters trained at once beside one frozen base model.
//!
//! In: packed streams whose segments name their job. Out: every job's adapter, and its
//! change since the start (the update vector). Adapters, gradients and moments are
//! matrices `[jobs, L·d]`; clipping and AdamW work row by row. A job's bits do not
//! depend on which other jobs share the stream: products are independent by row, and
//! gradients are summed over a job's own segments in order.

use super::BlockLayout;
use crate::decoder::{Activations, AdapterView, Decoder, DecoderConfig, Gradients, Mode};
use gradtx_kernels::ops::AdamWStep;
use gradtx_kernels::{Backend, Buffer, Device, Real};
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, PackedBatch};
use gradtx_runtime::optim::FlatAdamW;
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use gradtx_runtime::{Error, Result};

/// Adapters in training: one row each for values, gradients and moments.
pub struct MultiLora<D: Device, X: Real> {
    device: D,
    layout: BlockLayout,
    jobs: usize,
    /// `[jobs, L·d]`
    adapters: D::Buf<X::Acc>,
    /// `[jobs, L·d]`
    grads: D::Buf<X::Acc>,
    /// `[L·d]`, the same for every job.
    initial: Vec<f32>,
    /// `[L·d]`, where some values are not trained.
    frozen: Option<Vec<bool>>,
    optimizer: FlatAdamW<D, X::Acc>,
    acts: Activations<D, X>,
    batch: DeviceBatch<D, X::Acc>,
}

impl<D: Backend<X>, X: Real> MultiLora<D, X> {
    /// `jobs` adapters that all start as `initial` `[L·d]`, and buffers for streams up to
    /// `capacity`.
    pub fn new(
        decoder: &Decoder<D, X>,
        layout: &BlockLayout,
        jobs: usize,
        initial: &[f32],
        capacity: BatchCapacity,
    ) -> Result<Self> {
        if jobs == 0 || initial.len() != layout.total() {
            let why =
                format!("{jobs} of them, {} initial values, layout of {}", initial.len(), layout.total());
            return Err(Error::invalid("adapters to be trained", why));
        }
        let device = decoder.device().clone();
        let one: Vec<X::Acc> = initial.iter().map(|&x| X::Acc::from_f64(x as f64)).collect();
        let total = layout.total();
        let mut adapters = device.zeros(jobs * total)?;
        for job in 0..jobs {
            device.upload(adapters.view_mut(job * total..(job + 1) * total), &one)?;
        }
        Ok(Self {
            adapters,
            grads: device.zeros(jobs * total)?,
            initial: initial.to_vec(),
            frozen: None,
            optimizer: FlatAdamW::new(&device, jobs, total)?,
            acts: Activations::new(decoder, capacity, Mode::Adapters(layout))?,
            batch: DeviceBatch::new(&device, capacity)?,
            layout: layout.clone(),
            device,
            jobs,
        })
    }

    /// The same, of which these values `[L·d]` stay as they are. They are kept so on the host, between the
    /// steps: for adapters that are trained for a few steps.
    pub fn with_frozen(self, frozen: Vec<bool>) -> Result<Self> {
        if frozen.len() != self.layout.total() {
            let why = format!("{} of a layout of {}", frozen.len(), self.layout.total());
            return Err(Error::invalid("values that are not trained", why));
        }
        Ok(Self { frozen: Some(frozen), ..self })
    }

    /// All buffers of these jobs, those of the passes included and the base model left out.
    pub fn plan(
        config: &DecoderConfig,
        layout: &BlockLayout,
        jobs: usize,
        capacity: BatchCapacity,
    ) -> MemoryPlan {
        let mut plan = MemoryPlan::new();
        let shape = [jobs, layout.blocks(), layout.width()];
        let size = size_of::<X::Acc>();
        plan.add(Purpose::Trained, "adapters", &shape, size);
        plan.add(Purpose::Gradients, "adapter gradients", &shape, size);
        plan.add(Purpose::Optimizer, "first moments", &shape, size);
        plan.add(Purpose::Optimizer, "second moments", &shape, size);
        plan.extend(Activations::<D, X>::plan(config, capacity, Mode::Adapters(layout)));
        plan
    }

    /// One optimizer step on one stream: loss of every job, gradients, clipping of every
    /// job to `max_norm`, AdamW.
    pub fn train_step(
        &mut self,
        decoder: &Decoder<D, X>,
        batch: &PackedBatch,
        step: AdamWStep,
        max_norm: Option<f64>,
    ) -> Result<JobsStep> {
        let losses = self.accumulate(decoder, batch)?;
        let norms = self.apply(step, max_norm)?;
        Ok(JobsStep { losses, norms })
    }

    /// Adds a stream's gradients to those of the step; returns its part of every job's loss.
    pub fn accumulate(&mut self, decoder: &Decoder<D, X>, batch: &PackedBatch) -> Result<Vec<f64>> {
        self.check(batch)?;
        self.batch.load(&self.device, batch)?;
        let dropout = self.layout.lora().dropout;
        let view = AdapterView { values: &self.adapters, layout: &self.layout, dropout };
        let grads = Gradients::Adapters(self.grads.all_mut());
        decoder.loss_and_gradient(&mut self.acts, &self.batch, Some(view), grads, &mut |_, _| Ok(()))?;
        self.job_losses(batch)
    }

    /// Applies the gradients of the step and forgets them; returns every job's gradient
    /// norm before clipping. A job without segments in the step has gradients of 0, yet its
    /// moments and weight decay continue. A norm that is not finite is an error that changes nothing.
    pub fn apply(&mut self, step: AdamWStep, max_norm: Option<f64>) -> Result<Vec<f64>> {
        let before = match &self.frozen {
            Some(frozen) => {
                let mut grads = self.device.to_host(self.grads.all())?;
                grads.iter_mut().zip(frozen.iter().cycle()).filter(|(_, is)| **is).for_each(|(g, _)| {
                    *g = X::Acc::zero();
                });
                self.device.upload(self.grads.all_mut(), &grads)?;
                Some(self.device.to_host(self.adapters.all())?)
            }
            None => None,
        };
        let params = self.adapters.all_mut();
        let norms = self.optimizer.step(&self.device, params, self.grads.all(), step, max_norm)?;
        self.device.fill(self.grads.all_mut(), X::Acc::zero())?;
        if let (Some(before), Some(frozen)) = (before, &self.frozen) {
            // Weight decay moves what has no gradient too.
            let mut after = self.device.to_host(self.adapters.all())?;
            for ((value, old), is_frozen) in after.iter_mut().zip(before).zip(frozen.iter().cycle()) {
                if *is_frozen {
                    *value = old;
                }
            }
            self.device.upload(self.adapters.all_mut(), &after)?;
        }
        Ok(norms)
    }

    /// Weighted loss of every job on a stream, without gradients and without dropout.
    pub fn evaluate(&mut self, decoder: &Decoder<D, X>, batch: &PackedBatch) -> Result<Vec<f64>> {
        self.check(batch)?;
        self.batch.load(&self.device, batch)?;
        let view = AdapterView { values: &self.adapters, layout: &self.layout, dropout: 0.0 };
        decoder.loss(&mut self.acts, &self.batch, Some(view))?;
        self.job_losses(batch)
    }

    fn check(&self, batch: &PackedBatch) -> Result<()> {
        let jobs = self.jobs as u32;
        match (0..batch.segments())
            .find(|&i| batch.adapter[i] >= jobs || batch.grad_row[i] != batch.adapter[i])
        {
            None => Ok(()),
            Some(i) => {
                let (adapter, row) = (batch.adapter[i], batch.grad_row[i]);
                let why = format!(
                    "adapter {adapter} and gradient row {row}; jobs are 0..{jobs}, each with its row"
                );
                Err(Error::invalid(format!("segment {i}"), why))
            }
        }
    }

    fn job_losses(&self, batch: &PackedBatch) -> Result<Vec<f64>> {
        let losses = self.device.to_host(self.acts.losses())?;
        let mut sums = vec![0.0; self.jobs];
        for (i, loss) in losses.iter().enumerate() {
            let job = batch.adapter[batch.label_segment[i] as usize] as usize;
            sums[job] += batch.weights[i] * loss.to_f64();
        }
        Ok(sums)
    }

    /// Number of adapters.
    pub fn jobs(&self) -> usize {
        self.jobs
    }

    /// Where an adapter's values lie.
    pub fn layout(&self) -> &BlockLayout {
        &self.layout
    }

    /// All adapters, `[jobs, L·d]`, as a pass uses them; no dropout.
    pub fn adapters(&self) -> AdapterView<'_, D, X::Acc> {
        AdapterView { values: &self.adapters, layout: &self.layout, dropout: 0.0 }
    }

    /// All adapters, `[jobs, L·d]`, to be filled from a checkpoint.
    pub fn adapters_mut(&mut self) -> &mut D::Buf<X::Acc> {
        &mut self.adapters
    }

    /// The optimizer, for checkpoints.
    pub fn optimizer(&mut self) -> &mut FlatAdamW<D, X::Acc> {
        &mut self.optimizer
    }

    /// One job's adapter, `[L, d]`.
    pub fn adapter(&self, job: usize) -> Result<Vec<f32>> {
        let total = self.layout.total();
        let values = self.device.to_host(self.adapters.view(job * total..(job + 1) * total))?;
        Ok(values.iter().map(|x| x.to_f64() as f32).collect())
    }

    /// One job's update vector, `[L, d]`: its adapter less the initial one.
    pub fn update(&self, job: usize) -> Result<Vec<f32>> {
        Ok(self.adapter(job)?.iter().zip(&self.initial).map(|(a, b)| a - b).collect())
    }
}

/// What a training step reports, by job.
#[derive(Clone, Debug, PartialEq)]
pub struct JobsStep {
    /// Weighted losses before the update.
    pub losses: Vec<f64>,
    /// Gradient norms before clipping.
    pub norms: Vec<f64>,
}
