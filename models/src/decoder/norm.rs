//! [`Norm`]: the RMS norm before a part of a block, which leaves its result as the input of a product.

use super::pass::{BlockBackward, BlockPass};
use super::product::Product;
use gradtx_kernels::ops::{Out, RmsNormBackward, RmsNormDims, RmsNormLoraBackward, RmsNormLoraForward};
use gradtx_kernels::{Backend, Buffer, Real, View};
use gradtx_runtime::Result;
use gradtx_runtime::params::ParamLayout;
use std::ops::Range;

/// The RMS norm of the residual stream before a part.
#[derive(Clone, Debug)]
pub(super) struct Norm {
    /// `[H]`
    pub(super) weight: Range<usize>,
}

impl Norm {
    /// Defines its weight.
    pub(super) fn new(layout: &mut ParamLayout, name: String, hidden: usize) -> Self {
        Self { weight: layout.push([(name, vec![hidden])]) }
    }

    /// `input = norm(x)`, as the product `next` reads it.
    pub(super) fn forward<D: Backend<X>, X: Real>(
        &self,
        at: &BlockPass<'_, '_, D, X>,
        next: &Product,
        input: D::ViewMut<'_, X>,
        inv_rms: D::ViewMut<'_, X::Acc>,
        x: D::View<'_, X>,
    ) -> Result<()> {
        at.device.rmsnorm_lora_forward(RmsNormLoraForward {
            input,
            inv_rms,
            x,
            w_norm: at.weight(&self.weight),
            adapters: at.adapters(),
            segments: at.pass.segments,
            norm: at.norm,
            dims: next.dims(at),
        })?;
        Ok(())
    }

    /// `d_x +=` from `d_input` of the product `next`, with what goes through its adapters.
    pub(super) fn backward<D: Backend<X>, X: Real>(
        &self,
        ctx: &mut BlockBackward<'_, '_, '_, D, X>,
        next: &Product,
        input: D::View<'_, X>,
        inv_rms: D::View<'_, X::Acc>,
        x: D::View<'_, X>,
    ) -> Result<()> {
        let BlockBackward { at, grads, d, .. } = ctx;
        let (w, dims, len) = (at.weight(&self.weight), next.dims(at), input.len());
        let dx = d.x.view_mut(0..at.stream_len());
        if let Some(dw) = grads.param(&self.weight) {
            let norm = RmsNormDims { y_stride: D::lora_row_stride(&dims), ..at.norm };
            let dy = D::lora_rows(d.input.view(0..len), &dims);
            let out = Out::Add;
            at.device.rmsnorm_backward(RmsNormBackward {
                dx,
                dw: Some(dw),
                dy,
                x,
                inv_rms,
                w,
                dims: norm,
                out,
            })?;
            return Ok(());
        }
        at.device.rmsnorm_lora_backward(RmsNormLoraBackward {
            dx,
            d_input: d.input.view_mut(0..len),
            grads: grads.rows_of_a(at.pass),
            x,
            input,
            inv_rms,
            w_norm: w,
            adapters: at.adapters(),
            segments: at.pass.segments,
            norm: at.norm,
            dims,
        })?;
        Ok(())
    }
}
