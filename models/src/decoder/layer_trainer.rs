//! [`LayerTrainer`]: training of the full weights of some layers; embedding, head and all other layers are frozen.
//!
//! In: packed streams. Masters of the layers' parameters are updated by AdamW in the accumulators' type, and the
//! decoder's values are the nearest ones of its own. Backward passes end at the lowest of the layers, and keep nothing
//! of those below it.

use super::{Activations, Decoder, DecoderConfig, Gradients, LayerParams, Mode};
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::ops::{AdamWStep, Cast};
use gradtx_kernels::{Backend, Buffer, Device, Real};
use gradtx_runtime::buffers::Allocator;
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, PackedBatch};
use gradtx_runtime::optim::FlatAdamW;
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use gradtx_runtime::{Error, Result};

impl LayerParams {
    /// Those of these layers, given in increasing order.
    ///
    /// # Errors
    /// If there are none, or one is not there, or has matrices in factors, which stay as they are.
    pub fn new(config: &DecoderConfig, layers: &[usize]) -> Result<Self> {
        let invalid = |why: String| Error::invalid("layers whose weights are to be trained", why);
        let blocks = config.blocks();
        if layers.is_empty() || !layers.is_sorted_by(|a, b| a < b) {
            return Err(invalid(format!("{layers:?}; expected some in increasing order, each once")));
        }
        for &layer in layers {
            match blocks.get(layer) {
                None => return Err(invalid(format!("there is no layer {layer} in {}", blocks.len()))),
                Some(block) if block.factor_columns() > 0 => {
                    return Err(invalid(format!("layer {layer} has matrices in factors")));
                }
                Some(_) => {}
            }
        }
        Ok(Self::of_layout(&Decoder::<Cpu, f32>::layout_of(config), layers))
    }
}

/// State of training some layers.
pub struct LayerTrainer<D: Device, X: Real> {
    device: D,
    params: LayerParams,
    buffers: Buffers<D, X>,
}

/// What training takes of the device.
struct Buffers<D: Device, X: Real> {
    /// `[params]`
    masters: D::Buf<X::Acc>,
    /// `[params]`
    grads: D::Buf<X::Acc>,
    adamw: FlatAdamW<D, X::Acc>,
    acts: Activations<D, X>,
    batch: DeviceBatch<D, X::Acc>,
}

impl<D: Backend<X>, X: Real> Buffers<D, X> {
    fn allocate(
        alloc: &mut Allocator<'_, D>,
        config: &DecoderConfig,
        params: &LayerParams,
        capacity: BatchCapacity,
    ) -> Result<Self> {
        let len = params.total();
        alloc.set_purpose(Purpose::Trained);
        let masters = alloc.buffer("masters of layers", &[len])?;
        alloc.set_purpose(Purpose::Gradients);
        let grads = alloc.buffer("gradients of layers", &[len])?;
        let adamw = FlatAdamW::allocate(alloc, 1, len)?;
        alloc.set_purpose(Purpose::Activations);
        let mode = Mode::Layers(params);
        let acts = Activations::allocate(alloc, config, capacity, mode, capacity.tokens)?;
        Ok(Self { masters, grads, adamw, acts, batch: DeviceBatch::allocate(alloc, capacity)? })
    }
}

/// Values and moments of a training, each `[params]`, as a checkpoint has them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerState {
    /// The parameters.
    pub masters: Vec<f32>,
    /// First moments.
    pub first: Vec<f32>,
    /// Second moments.
    pub second: Vec<f32>,
}

impl<D: Backend<X>, X: Real> LayerTrainer<D, X> {
    /// For this decoder, which must be trainable, with room for streams up to `capacity`. Training starts from
    /// `masters` `[params]`, of which the decoder's values may be rounded.
    pub fn new(
        decoder: &mut Decoder<D, X>,
        params: LayerParams,
        masters: &[f32],
        capacity: BatchCapacity,
    ) -> Result<Self> {
        decoder.expect_contiguous()?;
        let device = decoder.device().clone();
        let mut alloc = Allocator::new(&device, Purpose::Trained);
        let buffers = Buffers::allocate(&mut alloc, decoder.config(), &params, capacity)?;
        let mut trainer = Self { device, params, buffers };
        trainer.set_masters(decoder, masters)?;
        Ok(trainer)
    }

    /// All buffers, those of the passes included and the decoder left out.
    pub fn plan(config: &DecoderConfig, params: &LayerParams, capacity: BatchCapacity) -> MemoryPlan {
        Allocator::plan_sizes(Purpose::Trained, |alloc| {
            Buffers::<D, X>::allocate(alloc, config, params, capacity)
        })
    }

    /// Adds a stream's gradients to those of the step; returns its weighted loss.
    pub fn accumulate(&mut self, decoder: &Decoder<D, X>, batch: &PackedBatch) -> Result<f64> {
        let Buffers { grads, acts, batch: on_device, .. } = &mut self.buffers;
        on_device.load(&self.device, batch)?;
        let grads = Gradients::Layers(grads.all_mut(), &self.params);
        decoder.loss_and_gradient(acts, on_device, None, grads)?;
        let losses = self.device.to_host(acts.losses())?;
        Ok(losses.iter().zip(&batch.weights).map(|(loss, weight)| weight * loss.to_f64()).sum())
    }

    /// Applies the gradients of the step and forgets them; returns their norm before clipping. One that is not finite
    /// is an error that changes nothing.
    pub fn apply(
        &mut self,
        decoder: &mut Decoder<D, X>,
        step: AdamWStep,
        max_norm: Option<f64>,
    ) -> Result<f64> {
        let Buffers { masters, grads, adamw, .. } = &mut self.buffers;
        let norms = adamw.step(&self.device, masters.all_mut(), grads.all(), step, max_norm)?;
        self.device.fill(grads.all_mut(), X::Acc::zero())?;
        self.write_values(decoder)?;
        Ok(norms[0])
    }

    /// Gradients that were accumulated, `[params]`.
    pub fn gradients(&self) -> &D::Buf<X::Acc> {
        &self.buffers.grads
    }

    /// Which parameters are trained.
    pub fn params(&self) -> &LayerParams {
        &self.params
    }

    /// The parameters, `[params]`.
    pub fn masters(&self) -> Result<Vec<f32>> {
        self.host(&self.buffers.masters)
    }

    /// Parameters and moments, to be kept in a checkpoint.
    pub fn state(&self) -> Result<LayerState> {
        let (first, second) = self.buffers.adamw.moments();
        Ok(LayerState { masters: self.masters()?, first: self.host(first)?, second: self.host(second)? })
    }

    /// Continues from a state.
    ///
    /// # Errors
    /// If it is of other parameters.
    pub fn restore(&mut self, decoder: &mut Decoder<D, X>, state: &LayerState) -> Result<()> {
        for moments in [&state.first, &state.second] {
            self.expect_len(moments.len())?;
        }
        self.set_masters(decoder, &state.masters)?;
        let (first, second) = self.buffers.adamw.moments_mut();
        for (buffer, values) in [(first, &state.first), (second, &state.second)] {
            self.device.upload(buffer.all_mut(), &accumulators::<X>(values))?;
        }
        Ok(())
    }

    fn set_masters(&mut self, decoder: &mut Decoder<D, X>, values: &[f32]) -> Result<()> {
        self.expect_len(values.len())?;
        self.device.upload(self.buffers.masters.all_mut(), &accumulators::<X>(values))?;
        self.write_values(decoder)
    }

    /// The decoder's values become the nearest ones of the masters.
    fn write_values(&self, decoder: &mut Decoder<D, X>) -> Result<()> {
        for (of_decoder, own) in self.params.parts() {
            let values = decoder.values_mut().view_mut(of_decoder);
            Cast::<X::Acc, X>::cast(&self.device, values, self.buffers.masters.view(own))?;
        }
        Ok(())
    }

    fn expect_len(&self, found: usize) -> Result<()> {
        let want = self.params.total();
        match want == found {
            true => Ok(()),
            false => {
                Err(Error::invalid("parameters of layers", format!("expected {want} values, found {found}")))
            }
        }
    }

    fn host(&self, buffer: &D::Buf<X::Acc>) -> Result<Vec<f32>> {
        Ok(self.device.to_host(buffer.all())?.iter().map(|x| x.to_f64() as f32).collect())
    }
}

fn accumulators<X: Real>(values: &[f32]) -> Vec<X::Acc> {
    values.iter().map(|&x| X::Acc::from_f64(f64::from(x))).collect()
}
