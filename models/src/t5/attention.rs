//! The attention sublayer: projections, attention, output projection, residual. The sublayer before
//! has computed its layer norm, and it computes that of the next one.
//!
//! `out = x + dropout(W_o · attend(W_q n, W_kv m))` with `n = norm(x)`; `m` is n itself
//! (self-attention) or the encoder's output (cross-attention), which is not normed again.
//!
//! Shapes: B examples, T queries each, R = B·T rows; K keys each, M = B·K rows;
//! d model width, I = H·D width of all heads.

use super::T5Config;
use super::pass::{Grads, NormOut, Pass, weight_gradient};
use super::scratch::Scratch;
use gradtx_kernels::ops::{
    Backend, BucketMap, LinearBackwardInput, LinearDims, LinearForward, Out, T5AttentionBackward,
    T5AttentionDims, T5AttentionForward,
};
use gradtx_kernels::{Device, Real};
use gradtx_runtime::Result;
use gradtx_runtime::buffers::{Allocator, Rows};
use gradtx_runtime::params::ParamLayout;
use std::ops::Range;

/// Parameters of an attention sublayer and its place in the stack.
pub(super) struct Attention {
    /// `[d]`
    norm: Range<usize>,
    /// `[I, d]`
    q: Range<usize>,
    /// `[2I, d]`: rows of k, then rows of v.
    kv: Range<usize>,
    /// `[d, I]`
    o: Range<usize>,
    causal: bool,
    /// Dropout site of the probabilities; the next one is the output's.
    site: u32,
}

/// What its forward pass leaves for its backward pass.
pub(super) struct AttentionActs<D: Device, X: Real> {
    /// `[R]`
    inv_rms: Rows<D, X::Acc>,
    /// `[R, d]`: n
    normed: Rows<D, X>,
    /// `[R, I]`
    q: Rows<D, X>,
    /// `[M, 2I]`; empty where keys and values come from a cache.
    kv: Rows<D, X>,
    /// `[B, H·T·K]`, before dropout.
    probs: Rows<D, X>,
    /// `[R, I]`
    o: Rows<D, X>,
}

/// Numbers of rows in one pass.
#[derive(Clone, Copy)]
pub(super) struct Lengths {
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
}

impl<D: Device, X: Real> AttentionActs<D, X> {
    /// Buffers for at most `lens`; `own_kv` unless keys and values come from a cache.
    pub(super) fn new(
        alloc: &mut Allocator<'_, D>,
        name: &str,
        config: &T5Config,
        lens: Lengths,
        own_kv: bool,
    ) -> Result<Self> {
        let Lengths { batch, queries, keys } = lens;
        let (rows, width, inner) = (batch * queries, config.d_model, config.inner());
        let kv_rows = if own_kv { batch * keys } else { 0 };
        Ok(Self {
            inv_rms: alloc.rows(format!("{name}.inv_rms"), rows, 1)?,
            normed: alloc.rows(format!("{name}.normed"), rows, width)?,
            q: alloc.rows(format!("{name}.q"), rows, inner)?,
            kv: alloc.rows(format!("{name}.kv"), kv_rows, 2 * inner)?,
            probs: alloc.rows(format!("{name}.probs"), batch, config.num_heads * queries * keys)?,
            o: alloc.rows(format!("{name}.o"), rows, inner)?,
        })
    }

    /// `[R, d]`: the normed input.
    pub(super) fn normed(&self, rows: usize) -> D::View<'_, X> {
        self.normed.view(rows)
    }

    /// `[R]`, of the norm.
    pub(super) fn inv_rms(&self, rows: usize) -> D::View<'_, X::Acc> {
        self.inv_rms.view(rows)
    }
}

impl Attention {
    /// Defines the parameters. `kind` is `SelfAttention` or `EncDecAttention`.
    pub(super) fn new(
        layout: &mut ParamLayout,
        prefix: &str,
        kind: &str,
        config: &T5Config,
        causal: bool,
        site: u32,
    ) -> Self {
        let (d, inner) = (config.d_model, config.inner());
        let name = |part: &str| format!("{prefix}{kind}.{part}.weight");
        Self {
            norm: layout.push([(format!("{prefix}layer_norm.weight"), vec![d])]),
            q: layout.push([(name("q"), vec![inner, d])]),
            kv: layout.push([(name("k"), vec![inner, d]), (name("v"), vec![inner, d])]),
            o: layout.push([(name("o"), vec![d, inner])]),
            causal,
            site,
        }
    }

    /// All its parameters.
    pub(super) fn range(&self) -> Range<usize> {
        self.norm.start..self.o.end
    }

    /// The weight of its norm.
    pub(super) fn norm(&self) -> &Range<usize> {
        &self.norm
    }

    /// Where its norm goes.
    pub(super) fn norm_out<'a, D: Device, X: Real>(
        &'a self,
        config: &T5Config,
        acts: &'a mut AttentionActs<D, X>,
        rows: usize,
    ) -> NormOut<'a, D, X> {
        let (normed, inv_rms) = (acts.normed.view_mut(rows), acts.inv_rms.view_mut(rows));
        NormOut { weight: &self.norm, normed, inv_rms, eps: config.layer_norm_epsilon }
    }

    /// Parameters of the fused key and value projection, `[2I, d]`.
    pub(super) fn kv_range(&self) -> &Range<usize> {
        &self.kv
    }

    fn dims(&self, config: &T5Config, lens: Lengths, dropout: f64) -> T5AttentionDims {
        T5AttentionDims {
            batch: lens.batch,
            queries: lens.queries,
            keys: lens.keys,
            kv_rows: lens.keys,
            heads: config.num_heads,
            head_dim: config.d_kv,
            causal: self.causal,
            dropout,
            site: self.site,
        }
    }

    /// Keys and values of the memory `[M, d]`, or of n where there is none, in a queue of the pass's
    /// device.
    pub(super) fn keys_values<D: Backend<X>, X: Real>(
        &self,
        queue: &D,
        pass: &Pass<'_, D, X>,
        config: &T5Config,
        kv_rows: usize,
        acts: &mut AttentionActs<D, X>,
        memory: Option<&Rows<D, X>>,
    ) -> Result<()> {
        let dims = LinearDims::new(kv_rows, config.d_model, 2 * config.inner());
        let (source, weight) = (memory.unwrap_or(&acts.normed).view(kv_rows), pass.weight(&self.kv));
        Ok(queue.linear_forward(LinearForward {
            y: acts.kv.view_mut(kv_rows),
            x: source,
            w: weight,
            bias: None,
            residual: None,
            dims,
        })?)
    }

    /// `out = x + …`; both `[R, d]`. [`Self::keys_values`] comes before. `next` is the norm of out.
    pub(super) fn forward<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        config: &T5Config,
        lens: Lengths,
        acts: &mut AttentionActs<D, X>,
        out: D::ViewMut<'_, X>,
        x: D::View<'_, X>,
        bias: Option<BucketMap<'_, D, X>>,
        next: NormOut<'_, D, X>,
    ) -> Result<()> {
        let (rows, kv_rows) = (lens.batch * lens.queries, lens.batch * lens.keys);
        self.query(pass, config, rows, acts)?;
        pass.dev.t5_attention_forward(T5AttentionForward {
            o: acts.o.view_mut(rows),
            probs: acts.probs.view_mut(lens.batch),
            q: acts.q.view(rows),
            kv: acts.kv.view(kv_rows),
            bias,
            keys: pass.keys,
            dims: self.dims(config, lens, pass.dropout),
        })?;
        self.output(pass, config, lens, acts, out, x, next)
    }

    /// One query per example on a cache of keys and values, `[B, kv_rows, 2I]`, of which the
    /// first `lens.keys` of each example are seen. [`Self::query`] comes before.
    pub(super) fn attend_cache<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        config: &T5Config,
        (lens, kv_rows): (Lengths, usize),
        acts: &mut AttentionActs<D, X>,
        out: D::ViewMut<'_, X>,
        x: D::View<'_, X>,
        kv: D::View<'_, X>,
        bias: Option<BucketMap<'_, D, X>>,
        next: NormOut<'_, D, X>,
    ) -> Result<()> {
        // The query is the last of the sequence, so it sees every key there is.
        let dims = T5AttentionDims { kv_rows, causal: false, ..self.dims(config, lens, pass.dropout) };
        let probs = lens.batch * config.num_heads * lens.keys;
        pass.dev.t5_attention_forward(T5AttentionForward {
            o: acts.o.view_mut(lens.batch),
            probs: acts.probs.part_mut(0, probs),
            q: acts.q.view(lens.batch),
            kv,
            bias,
            keys: pass.keys,
            dims,
        })?;
        self.output(pass, config, lens, acts, out, x, next)
    }

    /// Queries of the normed input.
    pub(super) fn query<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        config: &T5Config,
        rows: usize,
        acts: &mut AttentionActs<D, X>,
    ) -> Result<()> {
        let dims = LinearDims::new(rows, config.d_model, config.inner());
        let weight = pass.weight(&self.q);
        let normed = acts.normed.view(rows);
        Ok(pass.dev.linear_forward(LinearForward {
            y: acts.q.view_mut(rows),
            x: normed,
            w: weight,
            bias: None,
            residual: None,
            dims,
        })?)
    }

    fn output<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        config: &T5Config,
        lens: Lengths,
        acts: &AttentionActs<D, X>,
        out: D::ViewMut<'_, X>,
        x: D::View<'_, X>,
        next: NormOut<'_, D, X>,
    ) -> Result<()> {
        let rows = lens.batch * lens.queries;
        let dims = LinearDims::new(rows, config.inner(), config.d_model);
        pass.end_sublayer(out, x, acts.o.view(rows), &self.o, dims, (lens.queries, self.output_site()), next)
    }

    /// Dropout site of its output.
    pub(super) fn output_site(&self) -> u32 {
        self.site + 1
    }

    /// From the gradient of the branch, `d_branch` of a set of `scratch`, to that of n, `d_normed` of
    /// the same; the gradient of `memory` goes to `scratch.d_memory` by `memory_out`, in the queue of
    /// the weights' gradients.
    pub(super) fn backward<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        config: &T5Config,
        lens: Lengths,
        acts: &AttentionActs<D, X>,
        grads: &mut Grads<'_, D, X>,
        scratch: &mut Scratch<D, X>,
        set: usize,
        memory: Option<(&Rows<D, X>, Out)>,
        bias: Option<(BucketMap<'_, D, X>, &Range<usize>)>,
    ) -> Result<()> {
        let rows = lens.batch * lens.queries;
        let out_dims = LinearDims::new(rows, config.inner(), config.d_model);
        let Scratch { sets, d_o, d_scores, .. } = scratch;
        let own = &mut sets[set];
        let d_branch = own.d_branch.view(rows);
        let queue = grads.queue(pass.dev)?;
        weight_gradient(&queue, grads, &self.o, d_branch, acts.o.view(rows), out_dims)?;
        let weight = pass.weight(&self.o);
        pass.dev.linear_backward_input(LinearBackwardInput {
            dx: d_o.view_mut(rows),
            dy: d_branch,
            w: weight,
            dims: out_dims,
            out: Out::Assign,
        })?;
        pass.dev.t5_attention_backward(T5AttentionBackward {
            dq: own.dq.view_mut(rows),
            dkv: own.dkv.view_mut(lens.batch * lens.keys),
            d_table: bias.as_ref().map(|(_, table)| grads.at(table)),
            d_scores: d_scores.part_mut(0, lens.batch * config.num_heads * lens.queries * lens.keys),
            d_o: d_o.view(rows),
            probs: acts.probs.view(lens.batch),
            q: acts.q.view(rows),
            kv: acts.kv.view(lens.batch * lens.keys),
            bias: bias.as_ref().map(|(map, _)| *map),
            keys: pass.keys,
            dims: self.dims(config, lens, pass.dropout),
        })?;
        self.backward_projections(pass, config, lens, acts, grads, scratch, set, memory)
    }

    /// From dq and dkv to the gradients of n and of the memory.
    fn backward_projections<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        config: &T5Config,
        lens: Lengths,
        acts: &AttentionActs<D, X>,
        grads: &mut Grads<'_, D, X>,
        scratch: &mut Scratch<D, X>,
        set: usize,
        memory: Option<(&Rows<D, X>, Out)>,
    ) -> Result<()> {
        let (rows, kv_rows) = (lens.batch * lens.queries, lens.batch * lens.keys);
        let q_dims = LinearDims::new(rows, config.d_model, config.inner());
        let kv_dims = LinearDims::new(kv_rows, config.d_model, 2 * config.inner());
        let Scratch { sets, d_memory, .. } = scratch;
        let own = &mut sets[set];
        let (dq, dkv) = (own.dq.view(rows), own.dkv.view(kv_rows));
        let source = memory.map_or(&acts.normed, |(memory, _)| memory).view(kv_rows);
        let queue = grads.queue(pass.dev)?;
        weight_gradient(&queue, grads, &self.q, dq, acts.normed.view(rows), q_dims)?;
        weight_gradient(&queue, grads, &self.kv, dkv, source, kv_dims)?;
        let (w_q, w_kv) = (pass.weight(&self.q), pass.weight(&self.kv));
        pass.dev.linear_backward_input(LinearBackwardInput {
            dx: own.d_normed.view_mut(rows),
            dy: dq,
            w: w_q,
            dims: q_dims,
            out: Out::Assign,
        })?;
        match memory {
            None => {
                let d_normed = own.d_normed.view_mut(rows);
                pass.dev.linear_backward_input(LinearBackwardInput {
                    dx: d_normed,
                    dy: dkv,
                    w: w_kv,
                    dims: kv_dims,
                    out: Out::Add,
                })?;
            }
            Some((_, out)) => {
                queue.linear_backward_input(LinearBackwardInput {
                    dx: d_memory.view_mut(kv_rows),
                    dy: dkv,
                    w: w_kv,
                    dims: kv_dims,
                    out,
                })?;
            }
        }
        Ok(())
    }
}
