//! The forward pass: from a packed token stream to the loss of every label, or to logits.

use super::adapters::lora_dims;
use super::{Activations, AdapterView, Decoder};
use crate::lora::Projection;
use gradtx_kernels::ops::{
    AttentionDecode, AttentionDims, AttentionForward, CacheStore, DecodeDims, Elementwise, Embedding,
    GatedActivation, GatedDims, GatedKind, Gemm, GemmDims, LmHead, LmHeadDims, LmHeadLoss, LmHeadScratch,
    LoraDims, LoraLinearForward, QkNormForward, QkvDims, RmsNormDims, RmsNormForward, RmsNormLoraForward,
    RopeForward, Segments,
};
use gradtx_kernels::{Backend, Buffer, Device, Real, View, ViewMut};
use gradtx_runtime::Result;
use gradtx_runtime::data::DeviceBatch;

/// Keys and values of earlier tokens, and what a pass does with them.
pub(super) struct Cache<'a, D: Device, X: Real> {
    /// `[L, slots, capacity, kv_heads · D]`
    pub(super) k: &'a mut D::Buf<X>,
    /// As `k`.
    pub(super) v: &'a mut D::Buf<X>,
    /// `[S]` slot of each segment.
    pub(super) slot: D::View<'a, u32>,
    /// Tokens of a slot.
    pub(super) capacity: usize,
    pub(super) slots: usize,
    pub(super) action: CacheAction,
}

/// What a pass does with a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CacheAction {
    /// Segments are whole sequences; their keys and values are stored.
    Fill,
    /// Segments are one token each, after what their slots hold.
    Decode,
}

/// What all steps of one pass share.
pub(super) struct Pass<'a, D: Device, A: Real> {
    pub(super) batch: &'a DeviceBatch<D, A>,
    pub(super) adapters: Option<AdapterView<'a, D, A>>,
    pub(super) segments: Segments<'a, D>,
    /// T
    pub(super) tokens: usize,
}

impl<'a, D: Device, A: Real> Pass<'a, D, A> {
    pub(super) fn new(batch: &'a DeviceBatch<D, A>, adapters: Option<AdapterView<'a, D, A>>) -> Self {
        Self { batch, adapters, segments: batch.segments(), tokens: batch.used().tokens }
    }

    /// Shapes and targets of a product of a block.
    pub(super) fn lora<X: Real<Acc = A>>(
        &self,
        decoder: &Decoder<D, X>,
        block: usize,
        fused: Projection,
    ) -> LoraDims<'a> {
        let (layout, dropout) = self.adapters.map_or((None, 0.0), |a| (Some(a.layout), a.dropout));
        lora_dims(&decoder.config, layout, dropout, block, fused, self.tokens)
    }

    /// The adapters' values, or `nothing`.
    pub(super) fn values<'b>(&self, nothing: &'b D::Buf<A>) -> D::View<'b, A>
    where
        'a: 'b,
    {
        self.adapters.map_or(nothing.all(), |a| a.values.all())
    }
}

impl<D: Backend<X>, X: Real> Decoder<D, X> {
    /// Loss of every label of a packed stream, into [`Activations::losses`].
    pub fn loss(
        &self,
        acts: &mut Activations<D, X>,
        batch: &DeviceBatch<D, X::Acc>,
        adapters: Option<AdapterView<'_, D, X::Acc>>,
    ) -> Result<()> {
        acts.check(batch.used(), adapters.as_ref())?;
        let pass = Pass::new(batch, adapters);
        self.forward_blocks(acts, &pass, &mut None)?;
        self.final_norm(acts, pass.tokens)?;
        self.head_loss(acts, batch, false, None)
    }

    /// Logits `[rows, V]` at these positions of a packed stream, on the host.
    pub fn logits(
        &self,
        acts: &mut Activations<D, X>,
        batch: &DeviceBatch<D, X::Acc>,
        adapters: Option<AdapterView<'_, D, X::Acc>>,
        rows: &[u32],
    ) -> Result<Vec<X>> {
        acts.check(batch.used(), adapters.as_ref())?;
        let pass = Pass::new(batch, adapters);
        self.forward_blocks(acts, &pass, &mut None)?;
        let mut logits = Vec::with_capacity(rows.len() * self.config.vocab);
        for chunk in rows.chunks(acts.chunk) {
            let on_device = self.device.buffer_from(chunk)?;
            self.row_logits(acts, pass.tokens, on_device.all())?;
            let len = chunk.len() * self.config.vocab;
            logits.extend(self.device.to_host(acts.head_logits.view(0..len))?);
        }
        Ok(logits)
    }

    /// Residual stream after the last block, in the last part of `acts.x`.
    pub(super) fn forward_blocks(
        &self,
        acts: &mut Activations<D, X>,
        pass: &Pass<'_, D, X::Acc>,
        cache: &mut Option<Cache<'_, D, X>>,
    ) -> Result<()> {
        let hidden = self.config.hidden;
        let x = acts.x.get_mut(0, pass.tokens * hidden);
        let table = self.weights(&self.places.embedding);
        Embedding::<X>::embedding_forward(&self.device, x, table, pass.batch.tokens(), hidden)?;
        for block in 0..self.config.layers {
            self.attention_in(acts, pass, block)?;
            self.attend(acts, pass, block, cache)?;
            self.attention_out(acts, pass, block)?;
            self.mlp(acts, pass, block)?;
        }
        Ok(())
    }

    pub(super) fn norm_dims(&self, tokens: usize) -> RmsNormDims {
        RmsNormDims::new(tokens, self.config.hidden, self.config.norm_eps)
    }

    pub(super) fn qkv_dims(&self, tokens: usize) -> QkvDims {
        let c = &self.config;
        QkvDims { tokens, heads: c.heads, kv_heads: c.kv_heads, head_dim: c.head_dim }
    }

    pub(super) fn scale(&self) -> f64 {
        1.0 / (self.config.head_dim as f64).sqrt()
    }

    /// x → normalised, projected, rotated q, k, v.
    fn attention_in(
        &self,
        acts: &mut Activations<D, X>,
        pass: &Pass<'_, D, X::Acc>,
        block: usize,
    ) -> Result<()> {
        let (device, places, tokens) = (&self.device, &self.places.blocks[block], pass.tokens);
        let dims = pass.lora(self, block, Projection::Qkv);
        let input_len = D::lora_input_len(&dims);
        device.rmsnorm_lora_forward(RmsNormLoraForward {
            input: acts.inputs[Projection::Qkv as usize].get_mut(block, input_len),
            inv_rms: acts.inv_rms[0].get_mut(block, tokens),
            x: acts.x.get(block, tokens * self.config.hidden),
            w_norm: self.weights(&places.attention_norm),
            adapters: pass.values(&acts.nothing),
            segments: pass.segments,
            norm: self.norm_dims(tokens),
            dims,
        })?;
        let qkv = self.qkv_dims(tokens);
        let len = tokens * qkv.row();
        device.lora_linear_forward(LoraLinearForward {
            y: acts.qkv.get_mut(block, len),
            input: acts.inputs[Projection::Qkv as usize].get(block, input_len),
            w: self.weights(places.matrix(Projection::Qkv)),
            residual: None,
            adapters: pass.values(&acts.nothing),
            segments: pass.segments,
            dims,
        })?;
        let rotated = match &places.qk_norm {
            None => &mut acts.qkv,
            Some([w_q, w_k]) => {
                let heads = tokens * (qkv.heads + qkv.kv_heads);
                device.qk_norm_forward(QkNormForward {
                    y: acts.qkv_normed.get_mut(block, len),
                    inv_rms: acts.qk_inv_rms.get_mut(block, heads),
                    qkv: acts.qkv.get(block, len),
                    w_q: self.weights(w_q),
                    w_k: self.weights(w_k),
                    dims: qkv,
                    eps: self.config.norm_eps,
                })?;
                &mut acts.qkv_normed
            }
        };
        device.rope_forward(RopeForward {
            qkv: rotated.get_mut(block, len),
            bias: places.qkv_bias.as_ref().map(|bias| self.weights(bias)),
            cos: acts.rope.cos.all(),
            sin: acts.rope.sin.all(),
            positions: pass.batch.positions(),
            dims: qkv,
        })?;
        Ok(())
    }

    /// q, k, v → o, as rows of the input of `o_proj`.
    fn attend(
        &self,
        acts: &mut Activations<D, X>,
        pass: &Pass<'_, D, X::Acc>,
        block: usize,
        cache: &mut Option<Cache<'_, D, X>>,
    ) -> Result<()> {
        let (device, tokens) = (&self.device, pass.tokens);
        let dims = pass.lora(self, block, Projection::O);
        let qkv = self.qkv_dims(tokens);
        let rotated = if self.config.family.qk_norm() { &acts.qkv_normed } else { &acts.qkv };
        let rotated = rotated.get(block, tokens * qkv.row());
        let o_input = acts.inputs[Projection::O as usize].get_mut(block, D::lora_input_len(&dims));
        let o = D::lora_rows_mut(o_input, &dims);
        let cached = cache.as_mut().map(|cache| {
            let len = cache.slots * cache.capacity * self.config.kv_dim();
            let part = block * len..(block + 1) * len;
            let (k, v) = (cache.k.view_mut(part.clone()), cache.v.view_mut(part));
            let (capacity, slots) = (cache.capacity, cache.slots);
            (k, v, cache.slot, DecodeDims { qkv, capacity, slots, scale: self.scale() }, cache.action)
        });
        if let Some((k, v, slot, dims, CacheAction::Decode)) = cached {
            device.attention_decode(AttentionDecode {
                o,
                k_cache: k,
                v_cache: v,
                qkv: rotated,
                slot,
                position: pass.batch.positions(),
                dims,
            })?;
            return Ok(());
        }
        let attention = AttentionDims {
            qkv,
            segments: pass.segments.count,
            scale: self.scale(),
            o_stride: D::lora_row_stride(&dims),
        };
        let lse = acts.lse.get_mut(block, tokens * qkv.heads);
        device.attention_forward(AttentionForward {
            o,
            lse,
            qkv: rotated,
            offsets: pass.segments.offsets,
            dims: attention,
        })?;
        if let Some((k, v, slot, dims, CacheAction::Fill)) = cached {
            device.cache_store(CacheStore {
                k_cache: k,
                v_cache: v,
                qkv: rotated,
                offsets: pass.segments.offsets,
                slot,
                dims,
            })?;
        }
        Ok(())
    }

    /// `x_mid = x + o Woᵀ`
    fn attention_out(
        &self,
        acts: &mut Activations<D, X>,
        pass: &Pass<'_, D, X::Acc>,
        block: usize,
    ) -> Result<()> {
        let (device, len) = (&self.device, pass.tokens * self.config.hidden);
        let dims = pass.lora(self, block, Projection::O);
        let input = &mut acts.inputs[Projection::O as usize];
        let input_len = D::lora_input_len(&dims);
        let values = pass.values(&acts.nothing);
        device.lora_down_forward(input.get_mut(block, input_len), values, pass.segments, dims)?;
        device.lora_linear_forward(LoraLinearForward {
            y: acts.x_mid.get_mut(block, len),
            input: input.get(block, input_len),
            w: self.weights(self.places.blocks[block].matrix(Projection::O)),
            residual: Some(acts.x.get(block, len)),
            adapters: values,
            segments: pass.segments,
            dims,
        })?;
        Ok(())
    }

    /// `x = x_mid + mlp(rmsnorm(x_mid))`, into the next block's x.
    fn mlp(&self, acts: &mut Activations<D, X>, pass: &Pass<'_, D, X::Acc>, block: usize) -> Result<()> {
        let (device, places, tokens) = (&self.device, &self.places.blocks[block], pass.tokens);
        let len = tokens * self.config.hidden;
        let values = pass.values(&acts.nothing);
        let [_, _, up_input, down_input] = &mut acts.inputs;
        let dims = pass.lora(self, block, Projection::GateUp);
        let input_len = D::lora_input_len(&dims);
        device.rmsnorm_lora_forward(RmsNormLoraForward {
            input: up_input.get_mut(block, input_len),
            inv_rms: acts.inv_rms[1].get_mut(block, tokens),
            x: acts.x_mid.get(block, len),
            w_norm: self.weights(&places.mlp_norm),
            adapters: values,
            segments: pass.segments,
            norm: self.norm_dims(tokens),
            dims,
        })?;
        device.lora_linear_forward(LoraLinearForward {
            y: acts.gate_up.get_mut(block, tokens * dims.out_dim),
            input: up_input.get(block, input_len),
            w: self.weights(places.matrix(Projection::GateUp)),
            residual: None,
            adapters: values,
            segments: pass.segments,
            dims,
        })?;
        let gate_up = acts.gate_up.get(block, tokens * dims.out_dim);
        let dims = pass.lora(self, block, Projection::Down);
        let input_len = D::lora_input_len(&dims);
        let rows = D::lora_rows_mut(down_input.get_mut(block, input_len), &dims);
        let gated = self.gated_dims(tokens, &dims);
        GatedActivation::<X>::gated_forward(device, rows, gate_up, gated)?;
        device.lora_down_forward(down_input.get_mut(block, input_len), values, pass.segments, dims)?;
        device.lora_linear_forward(LoraLinearForward {
            y: acts.x.get_mut(block + 1, len),
            input: down_input.get(block, input_len),
            w: self.weights(places.matrix(Projection::Down)),
            residual: Some(acts.x_mid.get(block, len)),
            adapters: values,
            segments: pass.segments,
            dims,
        })?;
        Ok(())
    }

    pub(super) fn gated_dims(&self, tokens: usize, down: &LoraDims<'_>) -> GatedDims {
        let (cols, h_stride) = (self.config.intermediate, D::lora_row_stride(down));
        GatedDims { rows: tokens, cols, h_stride, kind: GatedKind::Silu }
    }

    /// The final norm of every token.
    pub(super) fn final_norm(&self, acts: &mut Activations<D, X>, tokens: usize) -> Result<()> {
        let len = tokens * self.config.hidden;
        self.device.rmsnorm_forward(RmsNormForward {
            y: acts.last.view_mut(0..len),
            inv_rms: acts.last_inv_rms.view_mut(0..tokens),
            x: acts.x.get(self.config.layers, len),
            w: self.weights(&self.places.final_norm),
            dims: self.norm_dims(tokens),
        })?;
        Ok(())
    }

    /// Loss of every label; with `gradient`, also its gradient in the head's input
    /// (`d_proj` `[T, H]` `=`), and in the head itself where `d_head` is given.
    pub(super) fn head_loss(
        &self,
        acts: &mut Activations<D, X>,
        batch: &DeviceBatch<D, X::Acc>,
        gradient: bool,
        d_head: Option<D::ViewMut<'_, X::Acc>>,
    ) -> Result<()> {
        let (tokens, labels, hidden) = (batch.used().tokens, batch.used().labels, self.config.hidden);
        acts.labels = labels;
        let (rows, d_rows) = acts.head_rows.all_mut().split_at_mut(acts.chunk * hidden);
        let scratch = LmHeadScratch { logits: acts.head_logits.all_mut(), rows, d_rows };
        let dims = LmHeadDims { tokens, labels, hidden, vocab: self.config.vocab, chunk: acts.chunk };
        LmHead::<X>::lm_head_loss(
            &self.device,
            LmHeadLoss {
                loss: acts.losses.view_mut(0..labels),
                dx: gradient.then(|| acts.d_proj.view_mut(0..tokens * hidden)),
                dw: d_head,
                scratch,
                x: acts.last.view(0..tokens * hidden),
                w: self.weights(&self.places.head),
                rows: batch.label_rows(),
                targets: batch.targets(),
                weights: batch.weights(),
                dims,
            },
        )?;
        Ok(())
    }

    /// Logits of some positions, the first rows of `acts.head_logits`; at most `acts.chunk` rows.
    pub(super) fn row_logits(
        &self,
        acts: &mut Activations<D, X>,
        tokens: usize,
        rows: D::View<'_, u32>,
    ) -> Result<()> {
        let (device, hidden, vocab) = (&self.device, self.config.hidden, self.config.vocab);
        let count = rows.len();
        let x = acts.x.get(self.config.layers, tokens * hidden);
        let gathered = acts.head_rows.view_mut(0..count * hidden);
        Elementwise::<X>::gather_rows(device, gathered, x, rows, hidden)?;
        device.rmsnorm_forward(RmsNormForward {
            y: acts.last.view_mut(0..count * hidden),
            inv_rms: acts.last_inv_rms.view_mut(0..count),
            x: acts.head_rows.view(0..count * hidden),
            w: self.weights(&self.places.final_norm),
            dims: self.norm_dims(count),
        })?;
        Gemm::<X>::gemm(
            device,
            acts.head_logits.view_mut(0..count * vocab),
            acts.last.view(0..count * hidden),
            self.weights(&self.places.head),
            GemmDims::new(count, vocab, hidden, false, true),
        )?;
        Ok(())
    }
}
