//! The backward pass: the mirror of the forward pass, from the loss to gradients of
//! adapters or of all parameters.
//!
//! The gradient of the residual stream, `d_x`, is carried in place from the last block
//! to the first. As soon as the gradients of a block are final, `on_ready` hears of it,
//! so that whoever communicates can begin while earlier blocks are computed.

use super::forward::Pass;
use super::{Activations, AdapterView, Decoder};
use crate::lora::{BlockLayout, Projection};
use gradtx_kernels::ops::{
    AttentionBackward, AttentionDims, Embedding, GatedActivation, Linear, LinearBackwardWeight, LinearDims,
    LoraDims, LoraDownBackward, LoraLinearBackward, Out, QkNormBackward, RmsNormBackward, RmsNormDims,
    RmsNormLoraBackward, RopeBackward,
};
use gradtx_kernels::{Backend, Buffer, Device, Real, ViewMut};
use gradtx_runtime::data::DeviceBatch;
use gradtx_runtime::{Error, Result};
use std::ops::Range;

/// Which gradients are wanted; they are added to what the buffer holds.
pub enum Gradients<'a, D: Device, A: Real> {
    /// Of adapters, `[rows, L·d]`; a segment names its row.
    Adapters(D::ViewMut<'a, A>),
    /// Of all parameters, in the order of [`Decoder::layout`].
    All(D::ViewMut<'a, A>),
}

/// Views of one product's backward.
struct Product<'a, D: Device, X: Real> {
    d_input: D::ViewMut<'a, X>,
    dy: D::View<'a, X>,
    input: D::View<'a, X>,
    adapters: D::View<'a, X::Acc>,
}

impl<D: Device, A: Real> Gradients<'_, D, A> {
    fn all(&mut self) -> D::ViewMut<'_, A> {
        match self {
            Self::Adapters(grads) | Self::All(grads) => grads.reborrow(),
        }
    }

    /// Rows of adapter gradients; empty where there are none.
    fn adapter_rows(&mut self) -> D::ViewMut<'_, A> {
        match self {
            Self::Adapters(grads) => grads.reborrow(),
            Self::All(grads) => grads.reborrow().slice(0..0),
        }
    }

    /// The gradient of a parameter, where parameters are trained.
    fn param(&mut self, range: &Range<usize>) -> Option<D::ViewMut<'_, A>> {
        match self {
            Self::Adapters(_) => None,
            Self::All(grads) => Some(grads.reborrow().slice(range.clone())),
        }
    }
}

impl<D: Backend<X>, X: Real> Activations<D, X> {
    /// Fails unless the mode of these buffers is the one that such gradients need.
    fn check_gradients(&self, grads: &Gradients<'_, D, X::Acc>, adapters: bool) -> Result<()> {
        let wants_adapters = matches!(grads, Gradients::Adapters(_));
        if self.trains && wants_adapters == self.layout.is_some() && wants_adapters == adapters {
            return Ok(());
        }
        let why = "they need activations of the matching mode, and adapters exactly when the base is frozen";
        Err(Error::invalid("gradients", why))
    }
}

/// Called with ranges whose gradients are final, last block first: of every row of
/// adapters, or of the flat parameters; with the gradient buffer.
pub type OnReady<'f, D, A> = &'f mut dyn FnMut(Range<usize>, <D as Device>::ViewMut<'_, A>) -> Result<()>;

impl<D: Backend<X>, X: Real> Decoder<D, X> {
    /// Loss of every label of a packed stream, into [`Activations::losses`], and gradients
    /// of `Σ weight · loss`, added to `grads`.
    ///
    /// The activations must have been allocated in the matching [`super::Mode`].
    pub fn loss_and_gradient(
        &self,
        acts: &mut Activations<D, X>,
        batch: &DeviceBatch<D, X::Acc>,
        adapters: Option<AdapterView<'_, D, X::Acc>>,
        mut grads: Gradients<'_, D, X::Acc>,
        on_ready: OnReady<'_, D, X::Acc>,
    ) -> Result<()> {
        acts.check(batch.used(), adapters.as_ref())?;
        acts.check_gradients(&grads, adapters.is_some())?;
        if matches!(grads, Gradients::All(_)) {
            self.expect_trainable()?;
        }
        let pass = Pass::new(batch, adapters);
        self.forward_blocks(acts, &pass, &mut None)?;
        self.final_norm(acts, pass.tokens)?;
        self.head_loss(acts, batch, true, grads.param(&self.places.head))?;
        self.final_norm_backward(acts, pass.tokens, grads.param(&self.places.final_norm))?;
        match adapters {
            Some(view) => {
                let width = view.layout.width();
                for block in (0..self.config.layers).rev() {
                    self.block_backward(acts, &pass, block, &mut grads)?;
                    on_ready(block * width..(block + 1) * width, grads.all())?;
                }
            }
            None => {
                on_ready(self.places.final_norm.start..self.layout.total(), grads.all())?;
                for block in (0..self.config.layers).rev() {
                    self.block_backward(acts, &pass, block, &mut grads)?;
                    on_ready(self.places.blocks[block].all(), grads.all())?;
                }
                if let Some(d_table) = grads.param(&self.places.embedding) {
                    let hidden = self.config.hidden;
                    let d_x = acts.d_x.view(0..pass.tokens * hidden);
                    Embedding::<X>::embedding_backward(&self.device, d_table, d_x, batch.tokens(), hidden)?;
                }
                on_ready(self.places.embedding.clone(), grads.all())?;
            }
        }
        Ok(())
    }

    fn final_norm_backward(
        &self,
        acts: &mut Activations<D, X>,
        tokens: usize,
        d_weight: Option<D::ViewMut<'_, X::Acc>>,
    ) -> Result<()> {
        let len = tokens * self.config.hidden;
        self.device.rmsnorm_backward(RmsNormBackward {
            dx: acts.d_x.view_mut(0..len),
            dw: d_weight,
            dy: acts.d_proj.view(0..len),
            x: acts.x.get(self.config.layers, len),
            inv_rms: acts.last_inv_rms.view(0..tokens),
            w: self.weights(&self.places.final_norm),
            dims: self.norm_dims(tokens),
            out: Out::Assign,
        })?;
        Ok(())
    }

    /// The products of a block from the last to the first. In the first block it ends at
    /// the first adapted product: nobody wants a gradient below that.
    fn block_backward(
        &self,
        acts: &mut Activations<D, X>,
        pass: &Pass<'_, D, X::Acc>,
        block: usize,
        grads: &mut Gradients<'_, D, X::Acc>,
    ) -> Result<()> {
        let adapted =
            |layout: &BlockLayout| Projection::ALL.into_iter().find(|&f| !layout.targets(0, f).is_empty());
        let first =
            pass.adapters.filter(|_| block == 0).and_then(|a| adapted(a.layout)).unwrap_or(Projection::Qkv);
        self.residual_product_backward(acts, pass, block, Projection::Down, grads)?;
        if first == Projection::Down {
            return Ok(());
        }
        self.gate_up_backward(acts, pass, block, grads)?;
        if first == Projection::GateUp {
            return Ok(());
        }
        self.residual_product_backward(acts, pass, block, Projection::O, grads)?;
        if first == Projection::O {
            return Ok(());
        }
        self.attention_backward(acts, pass, block, grads)?;
        self.qkv_backward(acts, pass, block, grads)
    }

    /// `d_input` from `dy`, and the gradients of the product's adapters or weights.
    fn product_backward(
        &self,
        parts: Product<'_, D, X>,
        pass: &Pass<'_, D, X::Acc>,
        weight: &Range<usize>,
        dims: LoraDims<'_>,
        grads: &mut Gradients<'_, D, X::Acc>,
    ) -> Result<()> {
        self.device.lora_linear_backward(LoraLinearBackward {
            d_input: parts.d_input,
            grads: grads.adapter_rows(),
            dy: parts.dy,
            input: parts.input,
            w: self.weights(weight),
            adapters: parts.adapters,
            segments: pass.segments,
            dims,
        })?;
        if let Some(dw) = grads.param(weight) {
            let x_stride = D::lora_row_stride(&dims);
            let linear = LinearDims { x_stride, ..LinearDims::new(dims.tokens, dims.in_dim, dims.out_dim) };
            let x = D::lora_rows(parts.input, &dims);
            Linear::<X>::linear_backward_weight(
                &self.device,
                LinearBackwardWeight { dw, dbias: None, dy: parts.dy, x, dims: linear, out: Out::Add },
            )?;
        }
        Ok(())
    }

    /// A product that writes into the residual stream: o_proj or down_proj;
    /// `d_x` after it → `d_input`.
    fn residual_product_backward(
        &self,
        acts: &mut Activations<D, X>,
        pass: &Pass<'_, D, X::Acc>,
        block: usize,
        fused: Projection,
        grads: &mut Gradients<'_, D, X::Acc>,
    ) -> Result<()> {
        let dims = pass.lora(self, block, fused);
        let input_len = D::lora_input_len(&dims);
        let parts = Product {
            d_input: acts.d_input.view_mut(0..input_len),
            dy: acts.d_x.view(0..pass.tokens * self.config.hidden),
            input: acts.inputs[fused as usize].get(block, input_len),
            adapters: pass.values(&acts.nothing),
        };
        self.product_backward(parts, pass, self.places.blocks[block].matrix(fused), dims, grads)?;
        self.device.lora_down_backward(LoraDownBackward {
            d_input: acts.d_input.view_mut(0..input_len),
            grads: grads.adapter_rows(),
            input: acts.inputs[fused as usize].get(block, input_len),
            adapters: pass.values(&acts.nothing),
            segments: pass.segments,
            dims,
        })?;
        Ok(())
    }

    /// `d_input` of down_proj → through the gated activation, the products and the norm
    /// → `d_x` between attention and MLP.
    fn gate_up_backward(
        &self,
        acts: &mut Activations<D, X>,
        pass: &Pass<'_, D, X::Acc>,
        block: usize,
        grads: &mut Gradients<'_, D, X::Acc>,
    ) -> Result<()> {
        let down = pass.lora(self, block, Projection::Down);
        let dims = pass.lora(self, block, Projection::GateUp);
        let wide = pass.tokens * dims.out_dim;
        GatedActivation::<X>::gated_backward(
            &self.device,
            acts.d_proj.view_mut(0..wide),
            D::lora_rows(acts.d_input.view(0..D::lora_input_len(&down)), &down),
            acts.gate_up.get(block, wide),
            self.gated_dims(pass.tokens, &down),
        )?;
        let input_len = D::lora_input_len(&dims);
        let parts = Product {
            d_input: acts.d_input.view_mut(0..input_len),
            dy: acts.d_proj.view(0..wide),
            input: acts.inputs[Projection::GateUp as usize].get(block, input_len),
            adapters: pass.values(&acts.nothing),
        };
        let places = &self.places.blocks[block];
        self.product_backward(parts, pass, places.matrix(Projection::GateUp), dims, grads)?;
        self.norm_backward(acts, pass, block, Projection::GateUp, grads)
    }

    /// `d_input` of o_proj → `d_qkv` before bias, norm and rotation; with a q/k norm in `d_proj`.
    fn attention_backward(
        &self,
        acts: &mut Activations<D, X>,
        pass: &Pass<'_, D, X::Acc>,
        block: usize,
        grads: &mut Gradients<'_, D, X::Acc>,
    ) -> Result<()> {
        let (device, places, tokens) = (&self.device, &self.places.blocks[block], pass.tokens);
        let dims = pass.lora(self, block, Projection::O);
        let input_len = D::lora_input_len(&dims);
        let qkv = self.qkv_dims(tokens);
        let len = tokens * qkv.row();
        let rotated = if places.qk_norm.is_some() { &acts.qkv_normed } else { &acts.qkv };
        device.attention_backward(AttentionBackward {
            dqkv: acts.d_qkv.view_mut(0..len),
            delta: acts.delta.view_mut(0..tokens * qkv.heads),
            d_o: D::lora_rows(acts.d_input.view(0..input_len), &dims),
            o: D::lora_rows(acts.inputs[Projection::O as usize].get(block, input_len), &dims),
            lse: acts.lse.get(block, tokens * qkv.heads),
            qkv: rotated.get(block, len),
            offsets: pass.segments.offsets,
            dims: AttentionDims {
                qkv,
                segments: pass.segments.count,
                scale: self.scale(),
                o_stride: D::lora_row_stride(&dims),
            },
        })?;
        device.rope_backward(RopeBackward {
            dqkv: acts.d_qkv.view_mut(0..len),
            dbias: places.qkv_bias.as_ref().and_then(|bias| grads.param(bias)),
            cos: acts.rope.cos.all(),
            sin: acts.rope.sin.all(),
            positions: pass.batch.positions(),
            dims: qkv,
        })?;
        let Some([w_q, w_k]) = &places.qk_norm else { return Ok(()) };
        // The two weights are neighbours in the layout, up to alignment.
        let offset = w_k.start - w_q.start;
        let dw = grads.param(&(w_q.start..w_k.end)).map(|both| {
            let (q, k) = both.split_at_mut(offset);
            (q.slice(0..w_q.len()), k)
        });
        device.qk_norm_backward(QkNormBackward {
            dqkv: acts.d_proj.view_mut(0..len),
            dw,
            dy: acts.d_qkv.view(0..len),
            qkv: acts.qkv.get(block, len),
            inv_rms: acts.qk_inv_rms.get(block, tokens * (qkv.heads + qkv.kv_heads)),
            w_q: self.weights(w_q),
            w_k: self.weights(w_k),
            dims: qkv,
        })?;
        Ok(())
    }

    /// Gradient of the q, k, v products' outputs → through products and norm → `d_x` before the block.
    fn qkv_backward(
        &self,
        acts: &mut Activations<D, X>,
        pass: &Pass<'_, D, X::Acc>,
        block: usize,
        grads: &mut Gradients<'_, D, X::Acc>,
    ) -> Result<()> {
        let places = &self.places.blocks[block];
        let dims = pass.lora(self, block, Projection::Qkv);
        let input_len = D::lora_input_len(&dims);
        let dy = if places.qk_norm.is_some() { &acts.d_proj } else { &acts.d_qkv };
        let parts = Product {
            d_input: acts.d_input.view_mut(0..input_len),
            dy: dy.view(0..pass.tokens * dims.out_dim),
            input: acts.inputs[Projection::Qkv as usize].get(block, input_len),
            adapters: pass.values(&acts.nothing),
        };
        self.product_backward(parts, pass, places.matrix(Projection::Qkv), dims, grads)?;
        self.norm_backward(acts, pass, block, Projection::Qkv, grads)
    }

    /// The norm before q, k, v or before gate and up: `d_x +=`, from `d_input`.
    fn norm_backward(
        &self,
        acts: &mut Activations<D, X>,
        pass: &Pass<'_, D, X::Acc>,
        block: usize,
        fused: Projection,
        grads: &mut Gradients<'_, D, X::Acc>,
    ) -> Result<()> {
        let (device, places, tokens) = (&self.device, &self.places.blocks[block], pass.tokens);
        let (x, inv_rms, weight) = match fused {
            Projection::Qkv => (&acts.x, &acts.inv_rms[0], &places.attention_norm),
            _ => (&acts.x_mid, &acts.inv_rms[1], &places.mlp_norm),
        };
        let dims = pass.lora(self, block, fused);
        let (len, input_len) = (tokens * self.config.hidden, D::lora_input_len(&dims));
        let norm = self.norm_dims(tokens);
        let (x, inv_rms) = (x.get(block, len), inv_rms.get(block, tokens));
        let d_x = acts.d_x.view_mut(0..len);
        if let Some(dw) = grads.param(weight) {
            let dy = D::lora_rows(acts.d_input.view(0..input_len), &dims);
            let norm = RmsNormDims { y_stride: D::lora_row_stride(&dims), ..norm };
            let w = self.weights(weight);
            device.rmsnorm_backward(RmsNormBackward {
                dx: d_x,
                dw: Some(dw),
                dy,
                x,
                inv_rms,
                w,
                dims: norm,
                out: Out::Add,
            })?;
            return Ok(());
        }
        device.rmsnorm_lora_backward(RmsNormLoraBackward {
            dx: d_x,
            d_input: acts.d_input.view_mut(0..input_len),
            grads: grads.adapter_rows(),
            x,
            input: acts.inputs[fused as usize].get(block, input_len),
            inv_rms,
            w_norm: self.weights(weight),
            adapters: pass.values(&acts.nothing),
            segments: pass.segments,
            norm,
            dims,
        })?;
        Ok(())
    }
}
