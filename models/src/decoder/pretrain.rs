//! [`FullTrainer`]: training of all parameters of a decoder, for small models made from
//! nothing and for full fine-tuning.
//!
//! In: packed streams. The decoder's own values are updated in place; where they are
//! narrower than an accumulator, masters in the accumulator's type are kept and the
//! values are their nearest ones. AdamW on everything, or Muon on the matrices inside
//! the blocks and AdamW on embedding, head, norms and biases.

use super::{Activations, Decoder, Gradients, Mode};
use gradtx_kernels::ops::{AdamWStep, Cast};
use gradtx_kernels::{Backend, Buffer, Device, Real, ViewMut};
use gradtx_runtime::buffers::Allocator;
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, PackedBatch};
use gradtx_runtime::optim::{FlatAdamW, Matrix, Muon, MuonStep, ParamStore, Trained};
use gradtx_runtime::plan::Purpose;
use gradtx_runtime::{Error, Result};
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
    params: ParamStore<D, X>,
    adamw: FlatAdamW<D, X::Acc>,
    muon: Option<Muon<D, X::Acc>>,
}

impl<D: Backend<X>, X: Real> FullTrainer<D, X> {
    /// For this decoder, which must be trainable, with room for streams up to `capacity`.
    pub fn new(decoder: &Decoder<D, X>, muon: bool, capacity: BatchCapacity) -> Result<Self> {
        decoder.expect_trainable()?;
        let device = decoder.device().clone();
        let total = decoder.layout().total();
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
        let all = 0..total;
        let mut params =
            ParamStore::allocate(&mut Allocator::new(&device, Purpose::Trained), total, vec![all])?;
        params.take_masters(&device, decoder.values())?;
        Ok(Self {
            acts: Activations::new(decoder, capacity, Mode::AllParameters)?,
            batch: DeviceBatch::new(&device, capacity)?,
            params,
            adamw,
            muon,
            device,
        })
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
        let grads = Gradients::All(self.params.gradients_mut().all_mut());
        decoder.loss_and_gradient(&mut self.acts, &self.batch, None, grads)?;
        self.weighted_loss(batch)
    }

    /// Applies the gradients of the step and forgets them; returns their norm.
    pub fn apply(&mut self, decoder: &mut Decoder<D, X>, step: PretrainStep) -> Result<f64> {
        if self.muon.is_some() != step.muon.is_some() {
            return Err(Error::invalid("step of pretraining", "Muon's numbers are given exactly with Muon"));
        }
        let norms = self.update(decoder, step)?;
        self.device.fill(self.params.gradients_mut().all_mut(), X::Acc::zero())?;
        Ok(norms.iter().map(|n| n * n).sum::<f64>().sqrt())
    }

    /// One step of the optimizers; returns the norms of their gradients.
    fn update(&mut self, decoder: &mut Decoder<D, X>, step: PretrainStep) -> Result<Vec<f64>> {
        let device = &self.device;
        let Trained { mut params, values, grads } = self.params.trained(decoder.values_mut());
        let mut norms = self.adamw.step(device, params.reborrow(), grads, step.adamw, step.max_norm)?;
        if let (Some(muon), Some(numbers)) = (&mut self.muon, step.muon) {
            norms.extend(muon.step(device, params.reborrow(), grads, numbers)?);
        }
        if let Some(values) = values {
            Cast::<X::Acc, X>::cast(device, values, params.freeze())?;
        }
        Ok(norms)
    }

    fn weighted_loss(&self, batch: &PackedBatch) -> Result<f64> {
        let losses = self.device.to_host(self.acts.losses())?;
        Ok(losses.iter().zip(&batch.weights).map(|(loss, w)| w * loss.to_f64()).sum())
    }

    /// Gradients that were accumulated, in the order of the decoder's layout.
    pub fn gradients(&self) -> &D::Buf<X::Acc> {
        self.params.gradients()
    }
}

/// Everything of `0..total` between these matrices.
fn complement(matrices: &[Matrix], total: usize) -> Vec<Range<usize>> {
    let starts = std::iter::once(0).chain(matrices.iter().map(|m| m.range().end));
    let ends = matrices.iter().map(|m| m.offset).chain(std::iter::once(total));
    starts.zip(ends).map(|(start, end)| start..end).collect()
}
