//! [`MultiLora`]: several adapters trained at once beside one frozen base model.
//!
//! In: packed streams whose segments name their job. Out: every job's adapter, and its
//! change since the start (the update vector). Adapters, gradients and moments are
//! matrices `[jobs, L·d]`; clipping and AdamW work row by row. A job's bits do not
//! depend on which other jobs share the stream: products are independent by row, and
//! gradients are summed over a job's own segments in order. Where the layout freezes A, its gradient is not
//! computed, and moments are of B alone.

use super::BlockLayout;
use crate::decoder::{Activations, AdapterView, Decoder, DecoderConfig, Gradients, Mode};
use gradtx_kernels::ops::AdamWStep;
use gradtx_kernels::{Backend, Buffer, Device, Real};
use gradtx_runtime::buffers::Allocator;
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, PackedBatch};
use gradtx_runtime::optim::FlatAdamW;
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use gradtx_runtime::{Error, Result};

/// Adapters in training: one row each for values, gradients and moments.
pub struct MultiLora<D: Device, X: Real> {
    device: D,
    layout: BlockLayout,
    jobs: usize,
    /// `[L·d]`, the same for every job.
    initial: Vec<f32>,
    /// `[L·d]`, where some values are not trained.
    frozen: Option<Vec<bool>>,
    buffers: Buffers<D, X>,
}

/// What training takes of the device.
struct Buffers<D: Device, X: Real> {
    /// `[jobs, L·d]`
    adapters: D::Buf<X::Acc>,
    /// `[jobs, L·d]`
    grads: D::Buf<X::Acc>,
    optimizer: FlatAdamW<D, X::Acc>,
    acts: Activations<D, X>,
    batch: DeviceBatch<D, X::Acc>,
}

impl<D: Backend<X>, X: Real> Buffers<D, X> {
    fn allocate(
        alloc: &mut Allocator<'_, D>,
        config: &DecoderConfig,
        layout: &BlockLayout,
        jobs: usize,
        capacity: BatchCapacity,
    ) -> Result<Self> {
        let shape = layout.rows(jobs);
        alloc.set_purpose(Purpose::Trained);
        let adapters = alloc.buffer("adapters", &shape)?;
        alloc.set_purpose(Purpose::Gradients);
        let grads = alloc.buffer("adapter gradients", &shape)?;
        let optimizer = FlatAdamW::allocate_in_rows(alloc, jobs, layout.total(), layout.trained())?;
        alloc.set_purpose(Purpose::Activations);
        let mode = Mode::Adapters(layout);
        let acts = Activations::allocate(alloc, config, capacity, mode, capacity.tokens)?;
        Ok(Self { adapters, grads, optimizer, acts, batch: DeviceBatch::allocate(alloc, capacity)? })
    }
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
        let mut alloc = Allocator::new(&device, Purpose::Trained);
        let mut buffers = Buffers::<D, X>::allocate(&mut alloc, decoder.config(), layout, jobs, capacity)?;
        let one: Vec<X::Acc> = initial.iter().map(|&x| X::Acc::from_f64(x as f64)).collect();
        let total = layout.total();
        for job in 0..jobs {
            let adapter = buffers.adapters.view_mut(job * total..(job + 1) * total);
            device.upload(adapter, &one)?;
        }
        let (initial, layout) = (initial.to_vec(), layout.clone());
        Ok(Self { device, layout, jobs, initial, frozen: None, buffers })
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
        Allocator::plan_sizes(Purpose::Trained, |alloc| {
            Buffers::<D, X>::allocate(alloc, config, layout, jobs, capacity)
        })
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
        self.buffers.batch.load(&self.device, batch)?;
        let dropout = self.layout.lora().dropout;
        let view = AdapterView { values: &self.buffers.adapters, layout: &self.layout, dropout };
        let grads = Gradients::Adapters(self.buffers.grads.all_mut());
        decoder.loss_and_gradient(&mut self.buffers.acts, &self.buffers.batch, Some(view), grads)?;
        self.job_losses(batch)
    }

    /// Applies the gradients of the step and forgets them; returns every job's gradient
    /// norm before clipping. A job without segments in the step has gradients of 0, yet its
    /// moments and weight decay continue. A norm that is not finite is an error that changes nothing.
    pub fn apply(&mut self, step: AdamWStep, max_norm: Option<f64>) -> Result<Vec<f64>> {
        let before = match &self.frozen {
            Some(frozen) => {
                let mut grads = self.device.to_host(self.buffers.grads.all())?;
                grads.iter_mut().zip(frozen.iter().cycle()).filter(|(_, is)| **is).for_each(|(g, _)| {
                    *g = X::Acc::zero();
                });
                self.device.upload(self.buffers.grads.all_mut(), &grads)?;
                Some(self.device.to_host(self.buffers.adapters.all())?)
            }
            None => None,
        };
        let params = self.buffers.adapters.all_mut();
        let norms =
            self.buffers.optimizer.step(&self.device, params, self.buffers.grads.all(), step, max_norm)?;
        self.device.fill(self.buffers.grads.all_mut(), X::Acc::zero())?;
        if let (Some(before), Some(frozen)) = (before, &self.frozen) {
            // Weight decay moves what has no gradient too.
            let mut after = self.device.to_host(self.buffers.adapters.all())?;
            for ((value, old), is_frozen) in after.iter_mut().zip(before).zip(frozen.iter().cycle()) {
                if *is_frozen {
                    *value = old;
                }
            }
            self.device.upload(self.buffers.adapters.all_mut(), &after)?;
        }
        Ok(norms)
    }

    /// Losses of a stream's labels, whose gradients are added to these rows.
    pub(super) fn pass(
        &mut self,
        decoder: &Decoder<D, X>,
        batch: &PackedBatch,
        rows: D::ViewMut<'_, X::Acc>,
    ) -> Result<Vec<f64>> {
        let Buffers { adapters, acts, batch: on_device, .. } = &mut self.buffers;
        on_device.load(&self.device, batch)?;
        let view =
            AdapterView { values: &*adapters, layout: &self.layout, dropout: self.layout.lora().dropout };
        decoder.loss_and_gradient(acts, on_device, Some(view), Gradients::Adapters(rows))?;
        Ok(self.device.to_host(acts.losses())?.iter().map(|loss| loss.to_f64()).collect())
    }

    /// Puts a gradient `[jobs, L·d]` in the place of what was summed.
    pub(super) fn set_gradient(&mut self, gradient: &[f32]) -> Result<()> {
        let values: Vec<X::Acc> = gradient.iter().map(|&x| X::Acc::from_f64(x as f64)).collect();
        Ok(self.device.upload(self.buffers.grads.all_mut(), &values)?)
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
        let losses = self.device.to_host(self.buffers.acts.losses())?;
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
        AdapterView { values: &self.buffers.adapters, layout: &self.layout, dropout: 0.0 }
    }

    /// All adapters, `[jobs, L·d]`, to be filled from a checkpoint.
    pub fn adapters_mut(&mut self) -> &mut D::Buf<X::Acc> {
        &mut self.buffers.adapters
    }

    /// The optimizer, for checkpoints.
    pub fn optimizer(&mut self) -> &mut FlatAdamW<D, X::Acc> {
        &mut self.buffers.optimizer
    }

    /// One job's adapter, `[L, d]`.
    pub fn adapter(&self, job: usize) -> Result<Vec<f32>> {
        let total = self.layout.total();
        let values = self.device.to_host(self.buffers.adapters.view(job * total..(job + 1) * total))?;
        Ok(values.iter().map(|x| x.to_f64() as f32).collect())
    }

    /// One job's update vector, `[L, d]`: what is trained of its adapter less what it started from.
    pub fn update(&self, job: usize) -> Result<Vec<f32>> {
        let (adapter, trained) = (self.adapter(job)?, self.layout.trained());
        Ok(adapter[trained.clone()].iter().zip(&self.initial[trained]).map(|(a, b)| a - b).collect())
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
