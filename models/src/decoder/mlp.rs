//! [`Mlp`]: the second part of a block, `x = x_mid + down(activation(gate) ⊙ up)` of `norm(x_mid)`; without a gate
//! `x = x_mid + down(relu(up))`.
//!
//! Shapes: T tokens of the stream; H hidden, F intermediate.

use super::norm::{Norm, norm_stats};
use super::pass::{BlockBackward, BlockPass};
use super::per_block::PerBlock;
use super::product::{Product, ProductInputs};
use super::{Activation, BlockConfig, MlpConfig};
use crate::lora::Projection;
use gradtx_kernels::ops::{GatedActivation, GatedDims, LoraDims, ReluDims};
use gradtx_kernels::{Backend, Buffer, Device, Real};
use gradtx_runtime::Result;
use gradtx_runtime::buffers::Allocator;

/// Its weights.
#[derive(Clone, Debug)]
pub(super) struct Mlp {
    pub(super) config: MlpConfig,
    pub(super) norm: Norm,
    /// `[2F, H]`, or `[F, H]` without a gate.
    pub(super) gate_up: Product,
    /// `[H, F]`
    pub(super) down: Product,
}

/// What its forward pass leaves for its backward pass, of all blocks.
pub(super) struct MlpActs<D: Device, X: Real> {
    /// `[T]` or `[2, T]` of the norm.
    norm_stats: PerBlock<D, X::Acc>,
    /// The input of gate and up.
    input: PerBlock<D, X>,
    /// `[T, 2F]` or `[T, F]`
    gate_up: PerBlock<D, X>,
    /// The input of down.
    down_input: PerBlock<D, X>,
}

impl<D: Backend<X>, X: Real> MlpActs<D, X> {
    /// For streams of up to `tokens` tokens. Products' inputs are kept where `inputs` says so.
    pub(super) fn allocate(
        alloc: &mut Allocator<'_, D>,
        blocks: &[BlockConfig],
        tokens: usize,
        inputs: &ProductInputs<'_>,
    ) -> Result<Self> {
        let keeps = |block| inputs.mode.keeps(block);
        Ok(Self {
            norm_stats: PerBlock::allocate(alloc, "mlp_inv_rms", keeps, norm_stats(blocks, tokens))?,
            input: inputs.allocate(alloc, "gate_up_input", blocks, Projection::GateUp, |_| false)?,
            gate_up: PerBlock::allocate(
                alloc,
                "gate_up",
                keeps,
                blocks.iter().map(|b| vec![tokens, b.mlp.first_dim()]),
            )?,
            down_input: inputs.allocate(alloc, "down_input", blocks, Projection::Down, |_| false)?,
        })
    }
}

impl Mlp {
    /// `h` = what the first product has left, activated: rows of the input of down.
    fn activate<D: Backend<X>, X: Real>(
        &self,
        device: &D,
        h: D::ViewMut<'_, X>,
        first: D::View<'_, X>,
        tokens: usize,
        down: &LoraDims<'_>,
    ) -> Result<()> {
        let (rows, cols, h_stride) = (tokens, self.config.intermediate, D::lora_row_stride(down));
        match self.config.activation {
            Activation::Gated(kind) => {
                let dims = GatedDims { rows, cols, h_stride, kind };
                GatedActivation::<X>::gated_forward(device, h, first, dims)?;
            }
            Activation::Relu => device.relu_forward(h, first, ReluDims { rows, cols, h_stride })?,
        }
        Ok(())
    }

    /// The gradient of what the first product has left, `=`, from `dh`.
    fn activate_backward<D: Backend<X>, X: Real>(
        &self,
        device: &D,
        d_first: D::ViewMut<'_, X>,
        dh: D::View<'_, X>,
        first: D::View<'_, X>,
        tokens: usize,
        down: &LoraDims<'_>,
    ) -> Result<()> {
        let (rows, cols, h_stride) = (tokens, self.config.intermediate, D::lora_row_stride(down));
        match self.config.activation {
            Activation::Gated(kind) => {
                let dims = GatedDims { rows, cols, h_stride, kind };
                GatedActivation::<X>::gated_backward(device, d_first, dh, first, dims)?;
            }
            Activation::Relu => {
                device.relu_backward(d_first, dh, first, ReluDims { rows, cols, h_stride })?;
            }
        }
        Ok(())
    }

    /// From the residual stream before it, `x_mid`, to the next block's `x`.
    pub(super) fn forward<D: Backend<X>, X: Real>(
        &self,
        at: &BlockPass<'_, '_, D, X>,
        own: &mut MlpActs<D, X>,
        (x_mid, x): (&PerBlock<D, X>, &mut PerBlock<D, X>),
        between: &mut D::Buf<X>,
    ) -> Result<()> {
        let (block, tokens, len) = (at.block, at.pass.tokens, at.stream_len());
        let dims = self.gate_up.dims(at);
        let (input_len, wide) = (D::lora_input_len(&dims), tokens * dims.out_dim);
        self.norm.forward(
            at,
            &self.gate_up,
            own.input.get_mut(block, input_len),
            own.norm_stats.get_mut(block, at.norm_stats),
            x_mid.get(block, len),
        )?;
        let input = own.input.get(block, input_len);
        self.gate_up.forward(at, own.gate_up.get_mut(block, wide), input, None, between)?;
        let dims = self.down.dims(at);
        let input_len = D::lora_input_len(&dims);
        let rows = D::lora_rows_mut(own.down_input.get_mut(block, input_len), &dims);
        self.activate(at.device, rows, own.gate_up.get(block, wide), tokens, &dims)?;
        let input = own.down_input.get_mut(block, input_len);
        at.device.lora_down_forward(input, at.adapters(), at.pass.segments, dims)?;
        let (after, residual) = (x.get_mut(block + 1, len), x_mid.get(block, len));
        self.down.forward(at, after, own.down_input.get(block, input_len), Some(residual), between)
    }

    /// From `d_x` after it to `d_x` before it, or to the last gradient that is wanted.
    pub(super) fn backward<D: Backend<X>, X: Real>(
        &self,
        ctx: &mut BlockBackward<'_, '_, '_, D, X>,
        own: &MlpActs<D, X>,
        x_mid: &PerBlock<D, X>,
    ) -> Result<()> {
        self.down.backward_from_stream(ctx, &own.down_input)?;
        if ctx.ends_at(Projection::Down) {
            return Ok(());
        }
        let BlockBackward { at, grads, d, .. } = &mut *ctx;
        let (block, tokens, down, dims) =
            (at.block, at.pass.tokens, self.down.dims(at), self.gate_up.dims(at));
        let (input_len, wide) = (D::lora_input_len(&dims), tokens * dims.out_dim);
        self.activate_backward(
            at.device,
            d.proj.view_mut(0..wide),
            D::lora_rows(d.input.view(0..D::lora_input_len(&down)), &down),
            own.gate_up.get(block, wide),
            tokens,
            &down,
        )?;
        let input = own.input.get(block, input_len);
        let (d_input, dy) = (d.input.view_mut(0..input_len), d.proj.view(0..wide));
        self.gate_up.backward(at, grads, d_input, dy, input, &mut d.between)?;
        let (x, stats) = (x_mid.get(block, at.stream_len()), own.norm_stats.get(block, at.norm_stats));
        self.norm.backward(ctx, &self.gate_up, input, stats, x)
    }
}
