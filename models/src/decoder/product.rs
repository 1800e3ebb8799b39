//! [`Product`]: a (fused) linear layer of a block, perhaps with adapters.

use super::factored::Factored;
use super::names::LayerNames;
use super::pass::{BlockBackward, BlockPass, Gradients};
use super::per_block::PerBlock;
use super::{BlockConfig, Mode};
use crate::lora::{BlockLayout, Module, Projection};
use gradtx_kernels::ops::{
    Linear, LinearBackwardWeight, LinearDims, LoraDims, LoraDownBackward, LoraLinearBackward,
    LoraLinearForward, Out,
};
use gradtx_kernels::{Backend, Buffer, Device, Real, View};
use gradtx_runtime::Result;
use gradtx_runtime::buffers::Allocator;
use gradtx_runtime::params::ParamLayout;
use std::ops::Range;

/// A linear layer `y = x Wᵀ` of a block.
#[derive(Clone, Debug)]
pub(super) struct Product {
    projection: Projection,
    in_dim: usize,
    out_dim: usize,
    pub(super) weight: Weight,
    /// `[out]`, where it has a bias of its own.
    bias: Option<Range<usize>>,
}

/// The matrix of a layer.
#[derive(Clone, Debug)]
pub(super) enum Weight {
    /// `[out, in]`, perhaps with room behind each row.
    Whole(Range<usize>),
    /// Frozen, and without adapters.
    Factored(Factored),
}

/// Shapes of an adapted product of one block.
fn lora_dims<'a>(
    (in_dim, out_dim): (usize, usize),
    layout: Option<&'a BlockLayout>,
    dropout: f64,
    block: usize,
    projection: Projection,
    tokens: usize,
) -> LoraDims<'a> {
    let none: &[_] = &[];
    LoraDims {
        tokens,
        in_dim,
        out_dim,
        rank: layout.map_or(1, |l| l.lora().rank),
        scale: layout.map_or(0.0, |l| l.lora().scale()),
        dropout,
        adapter_stride: layout.map_or(0, BlockLayout::total),
        targets: layout.map_or(none, |l| l.targets(block, projection)),
    }
}

/// The inputs of products in a pass: how long they are, and which of them backward reads.
pub(super) struct ProductInputs<'a> {
    pub(super) mode: Mode<'a>,
    /// Tokens of a stream at most.
    pub(super) tokens: usize,
}

impl ProductInputs<'_> {
    /// Elements of the input of a product of a block, adapters' part included.
    pub(super) fn len_of<D: Backend<X>, X: Real>(
        &self,
        block: (usize, &BlockConfig),
        projection: Projection,
    ) -> usize {
        D::lora_input_len(&self.dims(block, projection))
    }

    /// Bytes that a product's backward pass takes of the device for streams of so many segments.
    pub(super) fn scratch<D: Backend<X>, X: Real>(
        &self,
        block: (usize, &BlockConfig),
        projection: Projection,
        segments: usize,
    ) -> usize {
        D::lora_scratch(&self.dims(block, projection), segments)
    }

    fn dims(&self, (block, config): (usize, &BlockConfig), projection: Projection) -> LoraDims<'_> {
        lora_dims(projection.dims(config), self.mode.adapters(), 0.0, block, projection, self.tokens)
    }

    /// The input of a product of every block; kept for those whose weights or adapters are trained, or that
    /// `is_read` names.
    pub(super) fn allocate<D: Backend<X>, X: Real>(
        &self,
        alloc: &mut Allocator<'_, D>,
        name: &str,
        blocks: &[BlockConfig],
        projection: Projection,
        is_read: impl Fn(usize) -> bool,
    ) -> Result<PerBlock<D, X>> {
        PerBlock::allocate(
            alloc,
            name,
            |block| is_read(block) || self.mode.keeps_input(block, projection),
            blocks.iter().enumerate().map(|block| vec![self.len_of::<D, X>(block, projection)]),
        )
    }
}

impl Product {
    /// Defines its matrices, behind its bias: those that are fused follow each other. `stride` are the elements from
    /// one of their rows to the next.
    pub(super) fn new(
        layout: &mut ParamLayout,
        config: &BlockConfig,
        projection: Projection,
        bias: Option<Range<usize>>,
        names: LayerNames,
        stride: fn(usize) -> usize,
    ) -> Self {
        let (in_dim, out_dim) = projection.dims(config);
        let matrix = |module: Module| {
            let rows = module.outputs(config).len();
            (names.of(module, ".weight"), vec![rows, stride(in_dim)])
        };
        let weight = match Factored::is_of(config, projection) {
            true => Weight::Factored(Factored::new(layout, config, projection, names)),
            false => Weight::Whole(layout.push(projection.modules(config).map(matrix))),
        };
        Self { projection, in_dim, out_dim, weight, bias }
    }

    /// Shapes in a pass over one block.
    pub(super) fn dims<'a, D: Device, X: Real>(&self, at: &BlockPass<'_, 'a, D, X>) -> LoraDims<'a> {
        let (layout, dropout) = at.pass.adapters.map_or((None, 0.0), |a| (Some(a.layout), a.dropout));
        lora_dims((self.in_dim, self.out_dim), layout, dropout, at.block, self.projection, at.pass.tokens)
    }

    /// `y = input Wᵀ`, adapters included, plus its bias and the residual if there are such; `between` is for what goes
    /// between factors.
    pub(super) fn forward<D: Backend<X>, X: Real>(
        &self,
        at: &BlockPass<'_, '_, D, X>,
        y: D::ViewMut<'_, X>,
        input: D::View<'_, X>,
        residual: Option<D::View<'_, X>>,
        between: &mut D::Buf<X>,
    ) -> Result<()> {
        let dims = self.dims(at);
        let bias = self.bias.as_ref().map(|bias| at.weight(bias));
        let weight = match &self.weight {
            Weight::Whole(weight) => weight,
            Weight::Factored(factored) => {
                return factored.forward(at, y, input, (residual, bias), between.all_mut(), &dims);
            }
        };
        let (w, adapters, segments) = (at.weight(weight), at.adapters(), at.pass.segments);
        Ok(at.device.lora_linear_forward(LoraLinearForward {
            y,
            input,
            w,
            bias,
            residual,
            adapters,
            segments,
            dims,
        })?)
    }

    /// `d_input` from `dy`, and the gradients of adapters or weights.
    pub(super) fn backward<D: Backend<X>, X: Real>(
        &self,
        at: &BlockPass<'_, '_, D, X>,
        grads: &mut Gradients<'_, D, X::Acc>,
        d_input: D::ViewMut<'_, X>,
        dy: D::View<'_, X>,
        input: D::View<'_, X>,
        between: &mut D::Buf<X>,
    ) -> Result<()> {
        let dims = self.dims(at);
        let weight = match &self.weight {
            Weight::Whole(weight) => weight,
            Weight::Factored(factored) => {
                return factored.backward(at, d_input, dy, between.all_mut(), &dims);
            }
        };
        let (w, adapters, segments) = (at.weight(weight), at.adapters(), at.pass.segments);
        at.device.lora_linear_backward(LoraLinearBackward {
            d_input,
            grads: grads.adapter_rows(),
            dy,
            input,
            w,
            adapters,
            segments,
            dims,
        })?;
        if let Gradients::Statistics(sums) = grads {
            let x = D::lora_rows(input, &dims);
            return sums.add::<X>(at.device, (at.block, self.projection), &dims, x, dy);
        }
        let (dbias, dw) = match &self.bias {
            None => (None, grads.param(weight)),
            Some(bias) => grads.params([bias, weight]).map_or((None, None), |[b, w]| (Some(b), Some(w))),
        };
        if let Some(dw) = dw {
            let x_stride = D::lora_row_stride(&dims);
            let linear = LinearDims { x_stride, ..LinearDims::new(dims.tokens, dims.in_dim, dims.out_dim) };
            let x = D::lora_rows(input, &dims);
            let gradient = LinearBackwardWeight { dw, dbias, dy, x, dims: linear, out: Out::Add };
            Linear::<X>::linear_backward_weight(at.device, gradient)?;
        }
        Ok(())
    }

    /// The backward pass of one that writes into the residual stream, o_proj or down_proj: `d_input` from `d_x`
    /// after it, with what goes through its adapters.
    pub(super) fn backward_from_stream<D: Backend<X>, X: Real>(
        &self,
        ctx: &mut BlockBackward<'_, '_, '_, D, X>,
        input: &PerBlock<D, X>,
    ) -> Result<()> {
        let BlockBackward { at, grads, d, .. } = ctx;
        let dims = self.dims(at);
        let input = input.get(at.block, D::lora_input_len(&dims));
        let d_input = d.input.view_mut(0..input.len());
        self.backward(at, grads, d_input, d.x.view(0..at.stream_len()), input, &mut d.between)?;
        at.device.lora_down_backward(LoraDownBackward {
            d_input: d.input.view_mut(0..input.len()),
            grads: grads.rows_of_a(at.pass),
            input,
            adapters: at.adapters(),
            segments: at.pass.segments,
            dims,
        })?;
        Ok(())
    }
}
