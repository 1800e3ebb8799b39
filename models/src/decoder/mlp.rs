//! [`Mlp`]: the second part of a block, `x = x_mid + down(activation(gate) ⊙ up)` of `norm(x_mid)`.
//!
//! Shapes: T tokens of the stream; H hidden, F intermediate.

use super::norm::Norm;
use super::pass::{BlockBackward, BlockPass};
use super::per_block::PerBlock;
use super::product::{Product, ProductInputs};
use super::{BlockConfig, MlpConfig};
use crate::lora::Projection;
use gradtx_kernels::ops::{GatedActivation, GatedDims, LoraDims};
use gradtx_kernels::{Backend, Buffer, Device, Real};
use gradtx_runtime::Result;
use gradtx_runtime::buffers::Allocator;

/// Its weights.
#[derive(Clone, Debug)]
pub(super) struct Mlp {
    pub(super) config: MlpConfig,
    pub(super) norm: Norm,
    /// `[2F, H]`
    pub(super) gate_up: Product,
    /// `[H, F]`
    pub(super) down: Product,
}

/// What its forward pass leaves for its backward pass, of all blocks.
pub(super) struct MlpActs<D: Device, X: Real> {
    /// `[T]` of the norm.
    inv_rms: PerBlock<D, X::Acc>,
    /// The input of gate and up.
    input: PerBlock<D, X>,
    /// `[T, 2F]`
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
            inv_rms: PerBlock::allocate(alloc, "mlp_inv_rms", keeps, blocks.iter().map(|_| vec![tokens]))?,
            input: inputs.allocate(alloc, "gate_up_input", blocks, Projection::GateUp, |_| false)?,
            gate_up: PerBlock::allocate(
                alloc,
                "gate_up",
                keeps,
                blocks.iter().map(|b| vec![tokens, 2 * b.mlp.intermediate]),
            )?,
            down_input: inputs.allocate(alloc, "down_input", blocks, Projection::Down, |_| false)?,
        })
    }
}

impl Mlp {
    fn gated<D: Backend<X>, X: Real>(&self, tokens: usize, down: &LoraDims<'_>) -> GatedDims {
        let (cols, h_stride) = (self.config.intermediate, D::lora_row_stride(down));
        GatedDims { rows: tokens, cols, h_stride, kind: self.config.activation }
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
            own.inv_rms.get_mut(block, tokens),
            x_mid.get(block, len),
        )?;
        let input = own.input.get(block, input_len);
        self.gate_up.forward(at, own.gate_up.get_mut(block, wide), input, None, between)?;
        let dims = self.down.dims(at);
        let input_len = D::lora_input_len(&dims);
        let rows = D::lora_rows_mut(own.down_input.get_mut(block, input_len), &dims);
        let gated = self.gated::<D, X>(tokens, &dims);
        GatedActivation::<X>::gated_forward(at.device, rows, own.gate_up.get(block, wide), gated)?;
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
        GatedActivation::<X>::gated_backward(
            at.device,
            d.proj.view_mut(0..wide),
            D::lora_rows(d.input.view(0..D::lora_input_len(&down)), &down),
            own.gate_up.get(block, wide),
            self.gated::<D, X>(tokens, &down),
        )?;
        let input = own.input.get(block, input_len);
        let (d_input, dy) = (d.input.view_mut(0..input_len), d.proj.view(0..wide));
        self.gate_up.backward(at, grads, d_input, dy, input, &mut d.between)?;
        let (x, inv_rms) = (x_mid.get(block, at.stream_len()), own.inv_rms.get(block, tokens));
        self.norm.backward(ctx, &self.gate_up, input, inv_rms, x)
    }
}
