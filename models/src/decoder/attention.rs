//! [`Attention`]: the first part of a block, `x_mid = x + o(attention([rope]([norm](qkv(norm(x)) + b))))`.
//!
//! Shapes: T tokens of the stream; H hidden, Q = heads · D, R = Q + 2 · kv_heads · D (a fused q, k, v row).

use super::norm::{Norm, norm_stats};
use super::pass::{BlockBackward, BlockPass, Cache, CacheAction};
use super::per_block::PerBlock;
use super::product::{Product, ProductInputs};
use super::{AttentionConfig, BlockConfig};
use crate::lora::Projection;
use gradtx_kernels::ops::{
    AttentionBackward, AttentionDecode, AttentionDims, AttentionForward, CacheStore, DecodeDims, LoraDims,
    QkNormBackward, QkNormForward, RopeBackward, RopeForward,
};
use gradtx_kernels::{Backend, Buffer, Device, Real};
use gradtx_runtime::Result;
use gradtx_runtime::buffers::Allocator;
use std::ops::Range;

/// Its weights.
#[derive(Clone, Debug)]
pub(super) struct Attention {
    pub(super) config: AttentionConfig,
    pub(super) norm: Norm,
    /// `[R]`, where q, k and v have biases that are added with the rotation.
    pub(super) rotated_bias: Option<Range<usize>>,
    /// `[D]` of queries and of keys, where their heads are normalised.
    pub(super) qk_norm: Option<[Range<usize>; 2]>,
    /// `[R, H]`
    pub(super) qkv: Product,
    /// `[H, Q]`
    pub(super) o: Product,
}

/// What its forward pass leaves for its backward pass, of all blocks.
pub(super) struct AttentionActs<D: Device, X: Real> {
    /// `[T]` or `[2, T]` of the norm.
    norm_stats: PerBlock<D, X::Acc>,
    /// The input of q, k, v.
    input: PerBlock<D, X>,
    /// `[T, R]`; rotated in place, or before the q/k norm where there is one.
    qkv: PerBlock<D, X>,
    /// `[T, R]` normalised and rotated, where there is a q/k norm.
    qkv_normed: PerBlock<D, X>,
    /// `[T, heads + kv_heads]`
    qk_inv_rms: PerBlock<D, X::Acc>,
    /// `[heads, T]`
    lse: PerBlock<D, X::Acc>,
    /// The input of o.
    o_input: PerBlock<D, X>,
}

impl<D: Backend<X>, X: Real> AttentionActs<D, X> {
    /// For streams of up to `tokens` tokens. Products' inputs are kept where `inputs` says so.
    pub(super) fn allocate(
        alloc: &mut Allocator<'_, D>,
        blocks: &[BlockConfig],
        tokens: usize,
        inputs: &ProductInputs<'_>,
    ) -> Result<Self> {
        let keeps = |block| inputs.mode.keeps(block);
        let row = |block: &BlockConfig| block.attention.qkv_dim();
        let heads = |block: &BlockConfig| block.attention.heads + block.attention.kv_heads;
        let if_normed = |block: &BlockConfig, cols| if block.attention.qk_norm { cols } else { 0 };
        let rows = |cols: &dyn Fn(&BlockConfig) -> usize| -> Vec<_> {
            blocks.iter().map(|block| vec![tokens, cols(block)]).collect()
        };
        let lse = blocks.iter().map(|b| vec![b.attention.heads, tokens]);
        let (normed, norms) = (rows(&|b| if_normed(b, row(b))), rows(&|b| if_normed(b, heads(b))));
        Ok(Self {
            norm_stats: PerBlock::allocate(alloc, "attention_inv_rms", keeps, norm_stats(blocks, tokens))?,
            input: inputs.allocate(alloc, "qkv_input", blocks, Projection::Qkv, |_| false)?,
            qkv: PerBlock::allocate(alloc, "qkv", keeps, rows(&row))?,
            qkv_normed: PerBlock::allocate(alloc, "qkv_normed", keeps, normed)?,
            qk_inv_rms: PerBlock::allocate(alloc, "qk_inv_rms", keeps, norms)?,
            lse: PerBlock::allocate(alloc, "lse", keeps, lse)?,
            // Attention's own backward reads it, whether o_proj is adapted or not.
            o_input: inputs.allocate(alloc, "o_input", blocks, Projection::O, keeps)?,
        })
    }
}

impl Attention {
    /// From the residual stream before it, `x`, to the one after it, `x_mid`.
    pub(super) fn forward<D: Backend<X>, X: Real>(
        &self,
        at: &BlockPass<'_, '_, D, X>,
        own: &mut AttentionActs<D, X>,
        (x, x_mid): (&PerBlock<D, X>, &mut PerBlock<D, X>),
        between: &mut D::Buf<X>,
        cache: &mut Option<Cache<'_, D, X>>,
    ) -> Result<()> {
        self.project(at, own, x, between)?;
        self.attend(at, own, cache)?;
        let dims = self.o.dims(at);
        let (block, len) = (at.block, D::lora_input_len(&dims));
        at.device.lora_down_forward(
            own.o_input.get_mut(block, len),
            at.adapters(),
            at.pass.segments,
            dims,
        )?;
        let (after, residual) = (x_mid.get_mut(block, at.stream_len()), x.get(block, at.stream_len()));
        self.o.forward(at, after, own.o_input.get(block, len), Some(residual), between)
    }

    /// x → normalised, projected, rotated q, k, v.
    fn project<D: Backend<X>, X: Real>(
        &self,
        at: &BlockPass<'_, '_, D, X>,
        own: &mut AttentionActs<D, X>,
        x: &PerBlock<D, X>,
        between: &mut D::Buf<X>,
    ) -> Result<()> {
        let (block, tokens) = (at.block, at.pass.tokens);
        let input_len = D::lora_input_len(&self.qkv.dims(at));
        self.norm.forward(
            at,
            &self.qkv,
            own.input.get_mut(block, input_len),
            own.norm_stats.get_mut(block, at.norm_stats),
            x.get(block, at.stream_len()),
        )?;
        let dims = self.config.dims(tokens);
        let len = tokens * dims.row();
        let input = own.input.get(block, input_len);
        self.qkv.forward(at, own.qkv.get_mut(block, len), input, None, between)?;
        let rotated = match &self.qk_norm {
            None => &mut own.qkv,
            Some([w_q, w_k]) => {
                at.device.qk_norm_forward(QkNormForward {
                    y: own.qkv_normed.get_mut(block, len),
                    inv_rms: own.qk_inv_rms.get_mut(block, tokens * (dims.heads + dims.kv_heads)),
                    qkv: own.qkv.get(block, len),
                    w_q: at.weight(w_q),
                    w_k: at.weight(w_k),
                    dims,
                    eps: at.norm.eps,
                })?;
                &mut own.qkv_normed
            }
        };
        if !self.config.is_rotary {
            return Ok(());
        }
        at.device.rope_forward(RopeForward {
            qkv: rotated.get_mut(block, len),
            bias: self.rotated_bias.as_ref().map(|bias| at.weight(bias)),
            cos: at.rope.cos.all(),
            sin: at.rope.sin.all(),
            positions: at.pass.batch.positions(),
            dims,
        })?;
        Ok(())
    }

    /// q, k, v → o, as rows of the input of `o_proj`.
    fn attend<D: Backend<X>, X: Real>(
        &self,
        at: &BlockPass<'_, '_, D, X>,
        own: &mut AttentionActs<D, X>,
        cache: &mut Option<Cache<'_, D, X>>,
    ) -> Result<()> {
        let (block, segments, scale) = (at.block, at.pass.segments, self.config.scale());
        let (qkv, dims) = (self.config.dims(at.pass.tokens), self.o.dims(at));
        let rotated = if self.qk_norm.is_some() { &own.qkv_normed } else { &own.qkv };
        let rotated = rotated.get(block, qkv.tokens * qkv.row());
        let o = D::lora_rows_mut(own.o_input.get_mut(block, D::lora_input_len(&dims)), &dims);
        let cached = cache.as_mut().map(|cache| {
            let (capacity, slots) = (cache.capacity, cache.slots);
            let len = slots * capacity * self.config.kv_dim();
            let part = block * len..(block + 1) * len;
            let (k, v) = (cache.k.view_mut(part.clone()), cache.v.view_mut(part));
            (k, v, cache.slot, DecodeDims { qkv, capacity, slots, scale }, cache.action)
        });
        if let Some((k_cache, v_cache, slot, dims, CacheAction::Decode)) = cached {
            let position = at.pass.batch.positions();
            let decode = AttentionDecode { o, k_cache, v_cache, qkv: rotated, slot, position, dims };
            at.device.attention_decode(decode)?;
            return Ok(());
        }
        at.device.attention_forward(AttentionForward {
            o,
            lse: own.lse.get_mut(block, qkv.tokens * qkv.heads),
            qkv: rotated,
            offsets: segments.offsets,
            dims: self.attention_dims::<D, X>(at, &dims),
        })?;
        if let Some((k_cache, v_cache, slot, dims, CacheAction::Fill)) = cached {
            let offsets = segments.offsets;
            at.device.cache_store(CacheStore { k_cache, v_cache, qkv: rotated, offsets, slot, dims })?;
        }
        Ok(())
    }

    fn attention_dims<D: Backend<X>, X: Real>(
        &self,
        at: &BlockPass<'_, '_, D, X>,
        o: &LoraDims<'_>,
    ) -> AttentionDims {
        AttentionDims {
            qkv: self.config.dims(at.pass.tokens),
            segments: at.pass.segments.count,
            scale: self.config.scale(),
            o_stride: D::lora_row_stride(o),
        }
    }

    /// From `d_x` after it to `d_x` before it, or to the last gradient that is wanted.
    pub(super) fn backward<D: Backend<X>, X: Real>(
        &self,
        ctx: &mut BlockBackward<'_, '_, '_, D, X>,
        own: &AttentionActs<D, X>,
        x: &PerBlock<D, X>,
    ) -> Result<()> {
        self.o.backward_from_stream(ctx, &own.o_input)?;
        if ctx.ends_at(Projection::O) {
            return Ok(());
        }
        self.attend_backward(ctx, own)?;
        self.project_backward(ctx, own, x)
    }

    /// `d_input` of o_proj → gradient of the q, k, v products' outputs.
    fn attend_backward<D: Backend<X>, X: Real>(
        &self,
        ctx: &mut BlockBackward<'_, '_, '_, D, X>,
        own: &AttentionActs<D, X>,
    ) -> Result<()> {
        let BlockBackward { at, grads, d, .. } = ctx;
        let (block, dims) = (at.block, self.o.dims(at));
        let (qkv, input_len) = (self.config.dims(at.pass.tokens), D::lora_input_len(&dims));
        let len = qkv.tokens * qkv.row();
        let rotated = if self.qk_norm.is_some() { &own.qkv_normed } else { &own.qkv };
        at.device.attention_backward(AttentionBackward {
            dqkv: d.qkv.view_mut(0..len),
            delta: d.delta.view_mut(0..qkv.tokens * qkv.heads),
            d_o: D::lora_rows(d.input.view(0..input_len), &dims),
            o: D::lora_rows(own.o_input.get(block, input_len), &dims),
            lse: own.lse.get(block, qkv.tokens * qkv.heads),
            qkv: rotated.get(block, len),
            offsets: at.pass.segments.offsets,
            dims: self.attention_dims::<D, X>(at, &dims),
        })?;
        if self.config.is_rotary {
            at.device.rope_backward(RopeBackward {
                dqkv: d.qkv.view_mut(0..len),
                dbias: self.rotated_bias.as_ref().and_then(|bias| grads.param(bias)),
                cos: at.rope.cos.all(),
                sin: at.rope.sin.all(),
                positions: at.pass.batch.positions(),
                dims: qkv,
            })?;
        }
        let Some([w_q, w_k]) = &self.qk_norm else { return Ok(()) };
        let dw = grads.params([w_q, w_k]).map(|[q, k]| (q, k));
        at.device.qk_norm_backward(QkNormBackward {
            dqkv: d.proj.view_mut(0..len),
            dw,
            dy: d.qkv.view(0..len),
            qkv: own.qkv.get(block, len),
            inv_rms: own.qk_inv_rms.get(block, qkv.tokens * (qkv.heads + qkv.kv_heads)),
            w_q: at.weight(w_q),
            w_k: at.weight(w_k),
            dims: qkv,
        })?;
        Ok(())
    }

    /// Gradient of the q, k, v products' outputs → through products and norm → `d_x` before the block.
    fn project_backward<D: Backend<X>, X: Real>(
        &self,
        ctx: &mut BlockBackward<'_, '_, '_, D, X>,
        own: &AttentionActs<D, X>,
        x: &PerBlock<D, X>,
    ) -> Result<()> {
        let BlockBackward { at, grads, d, .. } = &mut *ctx;
        let (block, dims) = (at.block, self.qkv.dims(at));
        let (tokens, input_len) = (at.pass.tokens, D::lora_input_len(&dims));
        let dy = if self.qk_norm.is_some() { &d.proj } else { &d.qkv };
        let (dy, input) = (dy.view(0..tokens * dims.out_dim), own.input.get(block, input_len));
        self.qkv.backward(at, grads, d.input.view_mut(0..input_len), dy, input, &mut d.between)?;
        let (x, stats) = (x.get(block, at.stream_len()), own.norm_stats.get(block, at.norm_stats));
        self.norm.backward(ctx, &self.qkv, input, stats, x)
    }
}
