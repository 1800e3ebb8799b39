//! [`Norm`]: a norm of the residual stream, which before a part leaves its result as the input of a product.

use super::pass::{BlockBackward, BlockPass, Gradients};
use super::product::Product;
use super::{BlockConfig, NormKind};
use gradtx_kernels::ops::{
    LayerNormBackward, LayerNormForward, LoraDownBackward, Out, RmsNormBackward, RmsNormDims, RmsNormForward,
    RmsNormLoraBackward, RmsNormLoraForward,
};
use gradtx_kernels::{Backend, Buffer, Device, Real, View, ViewMut};
use gradtx_runtime::Result;
use gradtx_runtime::params::ParamLayout;
use std::ops::Range;

/// A norm of the residual stream.
#[derive(Clone, Debug)]
pub(super) struct Norm {
    /// `[H]`
    pub(super) weight: Range<usize>,
    /// `[H]` of a layer norm; an RMS norm has none.
    bias: Option<Range<usize>>,
}

/// Shapes of what the norms before a part of each block keep.
pub(super) fn norm_stats(blocks: &[BlockConfig], tokens: usize) -> impl Iterator<Item = Vec<usize>> {
    blocks.iter().map(move |block| match block.norm.statistics() {
        1 => vec![tokens],
        several => vec![several, tokens],
    })
}

/// Weights of a norm on a device.
pub(super) struct NormWeights<'a, D: Device, X: Real> {
    w: D::View<'a, X>,
    b: Option<D::View<'a, X>>,
}

impl Norm {
    /// Defines its weights; `name` is what stands before `.weight`.
    pub(super) fn new(layout: &mut ParamLayout, name: &str, config: &BlockConfig) -> Self {
        let mut vector = |what: &str| layout.push([(format!("{name}.{what}"), vec![config.hidden])]);
        let weight = vector("weight");
        let bias = match config.norm {
            NormKind::Rms => None,
            NormKind::Layer => Some(vector("bias")),
        };
        Self { weight, bias }
    }

    /// Its weights among those of a decoder.
    pub(super) fn weights<'a, D: Device, X: Real>(&self, values: &'a D::Buf<X>) -> NormWeights<'a, D, X> {
        let view = |range: &Range<usize>| values.view(range.clone());
        NormWeights { w: view(&self.weight), b: self.bias.as_ref().map(view) }
    }

    /// The gradients of weight and bias, where parameters are trained.
    fn gradients<'g, D: Device, A: Real>(
        &self,
        grads: &'g mut Gradients<'_, D, A>,
    ) -> Option<NormGradients<'g, D, A>> {
        match &self.bias {
            None => grads.param(&self.weight).map(NormGradients::Rms),
            Some(bias) => grads.params([&self.weight, bias]).map(NormGradients::Layer),
        }
    }

    /// `input = norm(x)`, as the product `next` reads it; `stats` are one or two numbers of every row.
    pub(super) fn forward<D: Backend<X>, X: Real>(
        &self,
        at: &BlockPass<'_, '_, D, X>,
        next: &Product,
        mut input: D::ViewMut<'_, X>,
        stats: D::ViewMut<'_, X::Acc>,
        x: D::View<'_, X>,
    ) -> Result<()> {
        let (dims, adapters, segments) = (next.dims(at), at.adapters(), at.pass.segments);
        let weights = self.weights::<D, X>(at.values);
        if weights.b.is_none() {
            let (w_norm, norm) = (weights.w, at.norm);
            let args =
                RmsNormLoraForward { input, inv_rms: stats, x, w_norm, adapters, segments, norm, dims };
            return Ok(at.device.rmsnorm_lora_forward(args)?);
        }
        let norm = RmsNormDims { y_stride: D::lora_row_stride(&dims), ..at.norm };
        let rows = D::lora_rows_mut(input.reborrow(), &dims);
        weights.forward(at.device, rows, stats, x, norm)?;
        Ok(at.device.lora_down_forward(input, adapters, segments, dims)?)
    }

    /// `d_x +=` from `d_input` of the product `next`, with what goes through its adapters.
    pub(super) fn backward<D: Backend<X>, X: Real>(
        &self,
        ctx: &mut BlockBackward<'_, '_, '_, D, X>,
        next: &Product,
        input: D::View<'_, X>,
        stats: D::View<'_, X::Acc>,
        x: D::View<'_, X>,
    ) -> Result<()> {
        let BlockBackward { at, grads, d, .. } = ctx;
        let (dims, len) = (next.dims(at), input.len());
        let norm = RmsNormDims { y_stride: D::lora_row_stride(&dims), ..at.norm };
        let weights = self.weights::<D, X>(at.values);
        let (adapters, segments) = (at.adapters(), at.pass.segments);
        let dx = d.x.view_mut(0..at.stream_len());
        let is_trained = grads.param(&self.weight).is_some();
        if !is_trained && weights.b.is_none() {
            at.device.rmsnorm_lora_backward(RmsNormLoraBackward {
                dx,
                d_input: d.input.view_mut(0..len),
                grads: grads.rows_of_a(at.pass),
                x,
                input,
                inv_rms: stats,
                w_norm: weights.w,
                adapters,
                segments,
                norm: at.norm,
                dims,
            })?;
            return Ok(());
        }
        if !is_trained {
            let (d_input, grads) = (d.input.view_mut(0..len), grads.rows_of_a(at.pass));
            let args = LoraDownBackward { d_input, grads, input, adapters, segments, dims };
            at.device.lora_down_backward(args)?;
        }
        let trained = self.gradients(grads);
        let dy = D::lora_rows(d.input.view(0..len), &dims);
        weights.backward(at.device, dx, trained, dy, stats, x, norm, Out::Add)
    }

    /// The gradient of the last norm: `dx` `=`, and those of weight and bias where parameters are trained.
    pub(super) fn last_backward<D: Backend<X>, X: Real>(
        &self,
        (device, values): (&D, &D::Buf<X>),
        grads: &mut Gradients<'_, D, X::Acc>,
        dx: D::ViewMut<'_, X>,
        dy: D::View<'_, X>,
        stats: D::View<'_, X::Acc>,
        x: D::View<'_, X>,
        dims: RmsNormDims,
    ) -> Result<()> {
        let trained = self.gradients(grads);
        self.weights(values).backward(device, dx, trained, dy, stats, x, dims, Out::Assign)
    }
}

/// Where the gradients of a norm's weights are added.
pub(super) enum NormGradients<'a, D: Device, A: Real> {
    /// Of the weight.
    Rms(D::ViewMut<'a, A>),
    /// Of weight and bias.
    Layer([D::ViewMut<'a, A>; 2]),
}

impl<D: Backend<X>, X: Real> NormWeights<'_, D, X> {
    /// `y = norm(x)`.
    pub(super) fn forward(
        &self,
        device: &D,
        y: D::ViewMut<'_, X>,
        stats: D::ViewMut<'_, X::Acc>,
        x: D::View<'_, X>,
        dims: RmsNormDims,
    ) -> Result<()> {
        match self.b {
            None => device.rmsnorm_forward(RmsNormForward { y, inv_rms: stats, x, w: self.w, dims })?,
            Some(b) => device.layernorm_forward(LayerNormForward { y, stats, x, w: self.w, b, dims })?,
        }
        Ok(())
    }

    fn backward(
        &self,
        device: &D,
        dx: D::ViewMut<'_, X>,
        trained: Option<NormGradients<'_, D, X::Acc>>,
        dy: D::View<'_, X>,
        stats: D::View<'_, X::Acc>,
        x: D::View<'_, X>,
        dims: RmsNormDims,
        out: Out,
    ) -> Result<()> {
        let w = self.w;
        let (dw, dw_db) = match trained {
            None => (None, None),
            Some(NormGradients::Rms(dw)) => (Some(dw), None),
            Some(NormGradients::Layer(both)) => (None, Some(both)),
        };
        match self.b {
            None => {
                device.rmsnorm_backward(RmsNormBackward { dx, dw, dy, x, inv_rms: stats, w, dims, out })?
            }
            Some(_) => {
                device.layernorm_backward(LayerNormBackward { dx, dw_db, dy, x, stats, w, dims, out })?
            }
        }
        Ok(())
    }
}
