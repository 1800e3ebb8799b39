//! [`FullTrainer`]: training of all parameters of a decoder, for small models made from
//! nothing and for full fine-tuning.
//!
//! In: packed streams. The decoder's own values are updated in place; where they are
//! narrower than an accumulator, masters in the accumulator's type are kept and the
//! values are their nearest ones. AdamW on everything, or Muon on the matrices inside
//! the blocks and AdamW on embedding, head, norms and biases.

use super::weights::is_hidden_matrix;
use super::{Activations, Decoder, DecoderConfig, Gradients, Mode};
use gradtx_kernels::ops::{AdamWStep, Cast};
use gradtx_kernels::{Backend, Buffer, Device, Real};
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, PackedBatch};
use gradtx_runtime::optim::{FlatAdamW, Matrix, Muon, MuonStep};
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use gradtx_runtime::{Error, Result};
use std::any::{Any, TypeId};
use std::ops::Range;

/// Numbers of one step of pretraining.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PretrainStep {
    /// AdamW's, for all parameters or those that Muon leaves.
    pub adamw: AdamWStep,
    /// Norm to which AdamW's gradient is clipped.
    pub max_norm: Option<f64>,
    /// Muon's; given exactly when the pretrainer was made with Muon.
    pub muon: Option<MuonStep>,
}

/// State of training all parameters.
pub struct FullTrainer<D: Device, X: Real> {
    device: D,
    acts: Activations<D, X>,
    batch: DeviceBatch<D, X::Acc>,
    /// As the decoder's values.
    grads: D::Buf<X::Acc>,
    /// As the decoder's values, unless those are accumulators themselves.
    masters: Option<D::Buf<X::Acc>>,
    adamw: FlatAdamW<D, X::Acc>,
    muon: Option<Muon<D, X::Acc>>,
}

impl<D: Backend<X>, X: Real> FullTrainer<D, X> {
    /// For this decoder, which must be trainable, with room for streams up to `capacity`.
    pub fn new(decoder: &Decoder<D, X>, muon: bool, capacity: BatchCapacity) -> Result<Self> {
        decoder.expect_trainable()?;
        let device = decoder.device().clone();
        let total = decoder.layout().total();
        let masters = if TypeId::of::<X>() == TypeId::of::<X::Acc>() {
            None
        } else {
            let mut masters = device.zeros(total)?;
            Cast::<X, X::Acc>::cast(&device, masters.all_mut(), decoder.values().all())?;
            Some(masters)
        };
        let matrices: Vec<Matrix> = decoder
            .hidden_matrices()
            .map(|p| Matrix { name: p.name.clone(), offset: p.offset, rows: p.shape[0], cols: p.shape[1] })
            .collect();
        let (adamw, muon) = if muon {
            let rest = complement(&matrices, total);
            (FlatAdamW::over_ranges(&device, total, rest)?, Some(Muon::new(&device, matrices)?))
        } else {
            (FlatAdamW::new(&device, 1, total)?, None)
        };
        Ok(Self {
            acts: Activations::new(decoder, capacity, Mode::AllParameters)?,
            batch: DeviceBatch::new(&device, capacity)?,
            grads: device.zeros(total)?,
            masters,
            adamw,
            muon,
            device,
        })
    }

    /// All buffers of training, those of the passes included and the values left out.
    pub fn plan(config: &DecoderConfig, muon: bool, capacity: BatchCapacity) -> MemoryPlan {
        let mut plan = MemoryPlan::new();
        let layout = Decoder::<D, X>::layout_of(config);
        let size = size_of::<X::Acc>();
        plan.add(Purpose::Gradients, "gradients", &[layout.total()], size);
        if TypeId::of::<X>() != TypeId::of::<X::Acc>() {
            plan.add(Purpose::Trained, "masters", &[layout.total()], size);
        }
        if muon {
            let matrices: Vec<_> = layout.params().iter().filter(|p| is_hidden_matrix(p)).collect();
            let held: usize = matrices.iter().map(|p| p.len()).sum();
            let largest = matrices.iter().map(|p| p.len()).max().unwrap_or(0);
            plan.add(Purpose::Optimizer, "Muon's momentum", &[held], size);
            plan.add(Purpose::Optimizer, "AdamW's moments", &[2, layout.total() - held], size);
            plan.add(Purpose::Scratch, "Muon's largest matrix", &[2, largest], size);
        } else {
            plan.add(Purpose::Optimizer, "AdamW's moments", &[2, layout.total()], size);
        }
        plan.extend(Activations::<D, X>::plan(config, capacity, Mode::AllParameters));
        plan
    }

    /// One optimizer step on one stream: weighted loss and gradient norm before the update.
    pub fn train_step(
        &mut self,
        decoder: &mut Decoder<D, X>,
        batch: &PackedBatch,
        step: PretrainStep,
    ) -> Result<(f64, f64)> {
        let loss = self.accumulate(decoder, batch)?;
        Ok((loss, self.apply(decoder, step)?))
    }

    /// Adds a stream's gradients to those of the step; returns its weighted loss.
    pub fn accumulate(&mut self, decoder: &Decoder<D, X>, batch: &PackedBatch) -> Result<f64> {
        self.batch.load(&self.device, batch)?;
        let grads = Gradients::All(self.grads.all_mut());
        decoder.loss_and_gradient(&mut self.acts, &self.batch, None, grads, &mut |_, _| Ok(()))?;
        self.weighted_loss(batch)
    }

    /// Weighted loss of a stream, without gradients.
    pub fn evaluate(&mut self, decoder: &Decoder<D, X>, batch: &PackedBatch) -> Result<f64> {
        self.batch.load(&self.device, batch)?;
        decoder.loss(&mut self.acts, &self.batch, None)?;
        self.weighted_loss(batch)
    }

    /// Applies the gradients of the step and forgets them; returns their norm.
    pub fn apply(&mut self, decoder: &mut Decoder<D, X>, step: PretrainStep) -> Result<f64> {
        let (device, grads) = (&self.device, self.grads.all());
        let params = match &mut self.masters {
            Some(masters) => masters,
            None => (decoder.values_mut() as &mut dyn Any)
                .downcast_mut::<D::Buf<X::Acc>>()
                .expect("without masters, values are accumulators"),
        };
        let mut norms = self.adamw.step(device, params.all_mut(), grads, step.adamw, step.max_norm)?;
        match (&mut self.muon, step.muon) {
            (None, None) => {}
            (Some(muon), Some(numbers)) => {
                norms.extend(muon.step(device, params.all_mut(), grads, numbers)?);
            }
            _ => {
                return Err(Error::invalid(
                    "step of pretraining",
                    "Muon's numbers are given exactly with Muon",
                ));
            }
        }
        if let Some(masters) = &self.masters {
            Cast::<X::Acc, X>::cast(device, decoder.values_mut().all_mut(), masters.all())?;
        }
        device.fill(self.grads.all_mut(), X::Acc::zero())?;
        Ok(norms.iter().map(|n| n * n).sum::<f64>().sqrt())
    }

    fn weighted_loss(&self, batch: &PackedBatch) -> Result<f64> {
        let losses = self.device.to_host(self.acts.losses())?;
        Ok(losses.iter().zip(&batch.weights).map(|(loss, w)| w * loss.to_f64()).sum())
    }

    /// Gradients that were accumulated, in the order of the decoder's layout.
    pub fn gradients(&self) -> &D::Buf<X::Acc> {
        &self.grads
    }

    /// The optimizers' state and the masters, for checkpoints.
    pub fn state(
        &mut self,
    ) -> (&mut FlatAdamW<D, X::Acc>, Option<&mut Muon<D, X::Acc>>, Option<&mut D::Buf<X::Acc>>) {
        (&mut self.adamw, self.muon.as_mut(), self.masters.as_mut())
    }
}

/// Everything of `0..total` between these matrices.
fn complement(matrices: &[Matrix], total: usize) -> Vec<Range<usize>> {
    let starts = std::iter::once(0).chain(matrices.iter().map(|m| m.range().end));
    let ends = matrices.iter().map(|m| m.offset).chain(std::iter::once(total));
    starts.zip(ends).map(|(start, end)| start..end).collect()
}
