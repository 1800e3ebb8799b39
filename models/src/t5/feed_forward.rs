//! The feed-forward sublayer: `out = x + dropout(W_o · dropout(gelu(W_0 n) ⊙ (W_1 n)))`, `n = norm(x)`.
//! The sublayer before has computed n, and this one computes the norm of out.
//!
//! Shapes: R = B·T rows, d model width, F hidden width.

use super::T5Config;
use super::pass::{Grads, NormOut, Pass, weight_gradient};
use super::scratch::Scratch;
use gradtx_kernels::ops::{
    Backend, GatedDims, GatedDropoutBackward, GatedDropoutForward, GatedKind, LinearBackwardInput,
    LinearDims, LinearForward, Out,
};
use gradtx_kernels::{Device, Real};
use gradtx_runtime::Result;
use gradtx_runtime::buffers::{Allocator, Rows};
use gradtx_runtime::params::ParamLayout;
use std::ops::Range;

/// Parameters of a feed-forward sublayer and its place in the stack.
pub(super) struct FeedForward {
    /// `[d]`
    norm: Range<usize>,
    /// `[2F, d]`: rows of wi_0 (gate), then rows of wi_1 (up).
    wi: Range<usize>,
    /// `[d, F]`
    wo: Range<usize>,
    /// Dropout site of the hidden layer; the next one is the output's.
    site: u32,
}

/// What its forward pass leaves for its backward pass.
pub(super) struct FeedForwardActs<D: Device, X: Real> {
    /// `[R]`
    inv_rms: Rows<D, X::Acc>,
    /// `[R, d]`: n
    normed: Rows<D, X>,
    /// `[R, 2F]`
    gate_up: Rows<D, X>,
    /// `[R, F]`, after dropout.
    hidden: Rows<D, X>,
}

impl<D: Device, X: Real> FeedForwardActs<D, X> {
    /// Buffers for at most `rows` rows.
    pub(super) fn new(
        alloc: &mut Allocator<'_, D>,
        name: &str,
        config: &T5Config,
        rows: usize,
    ) -> Result<Self> {
        Ok(Self {
            inv_rms: alloc.rows(format!("{name}.inv_rms"), rows, 1)?,
            normed: alloc.rows(format!("{name}.normed"), rows, config.d_model)?,
            gate_up: alloc.rows(format!("{name}.gate_up"), rows, 2 * config.d_ff)?,
            hidden: alloc.rows(format!("{name}.hidden"), rows, config.d_ff)?,
        })
    }
}

impl<D: Device, X: Real> FeedForwardActs<D, X> {
    /// `[R]`, of the norm.
    pub(super) fn inv_rms(&self, rows: usize) -> D::View<'_, X::Acc> {
        self.inv_rms.view(rows)
    }
}

impl FeedForward {
    /// Defines the parameters.
    pub(super) fn new(layout: &mut ParamLayout, prefix: &str, config: &T5Config, site: u32) -> Self {
        let (d, f) = (config.d_model, config.d_ff);
        let name = |part: &str| format!("{prefix}DenseReluDense.{part}.weight");
        Self {
            norm: layout.push([(format!("{prefix}layer_norm.weight"), vec![d])]),
            wi: layout.push([(name("wi_0"), vec![f, d]), (name("wi_1"), vec![f, d])]),
            wo: layout.push([(name("wo"), vec![d, f])]),
            site,
        }
    }

    /// All its parameters.
    pub(super) fn range(&self) -> Range<usize> {
        self.norm.start..self.wo.end
    }

    /// The weight of its norm.
    pub(super) fn norm(&self) -> &Range<usize> {
        &self.norm
    }

    /// Where its norm goes.
    pub(super) fn norm_out<'a, D: Device, X: Real>(
        &'a self,
        config: &T5Config,
        acts: &'a mut FeedForwardActs<D, X>,
        rows: usize,
    ) -> NormOut<'a, D, X> {
        let (normed, inv_rms) = (acts.normed.view_mut(rows), acts.inv_rms.view_mut(rows));
        NormOut { weight: &self.norm, normed, inv_rms, eps: config.layer_norm_epsilon }
    }

    /// Dropout site of its output.
    pub(super) fn output_site(&self) -> u32 {
        self.site + 1
    }

    /// `out = x + …`; both `[R, d]`. `next` is the norm of out.
    pub(super) fn forward<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        config: &T5Config,
        tokens: usize,
        acts: &mut FeedForwardActs<D, X>,
        out: D::ViewMut<'_, X>,
        x: D::View<'_, X>,
        next: NormOut<'_, D, X>,
    ) -> Result<()> {
        let rows = pass.batch * tokens;
        let (d, f) = (config.d_model, config.d_ff);
        let normed = acts.normed.view(rows);
        let dims = LinearDims::new(rows, d, 2 * f);
        let weight = pass.weight(&self.wi);
        pass.dev.linear_forward(LinearForward {
            y: acts.gate_up.view_mut(rows),
            x: normed,
            w: weight,
            bias: None,
            residual: None,
            dims,
        })?;
        let (hidden, gate_up) = (acts.hidden.view_mut(rows), acts.gate_up.view(rows));
        if pass.dropout > 0.0 {
            let drop = pass.drop_dims((rows, f), (tokens, self.site));
            pass.dev.gated_dropout_forward(GatedDropoutForward {
                h: hidden,
                gate_up,
                keys: pass.keys,
                dims: gated_dims(rows, f),
                drop,
            })?;
        } else {
            pass.dev.gated_forward(hidden, gate_up, gated_dims(rows, f))?;
        }
        let dims = LinearDims::new(rows, f, d);
        pass.end_sublayer(out, x, acts.hidden.view(rows), &self.wo, dims, (tokens, self.output_site()), next)
    }

    /// From the gradient of the branch, `d_branch` of a set of `scratch`, to that of n, `d_normed` of
    /// the same.
    pub(super) fn backward<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        config: &T5Config,
        tokens: usize,
        acts: &FeedForwardActs<D, X>,
        grads: &mut Grads<'_, D, X>,
        scratch: &mut Scratch<D, X>,
        set: usize,
    ) -> Result<()> {
        let rows = pass.batch * tokens;
        let (d, f) = (config.d_model, config.d_ff);
        let (out_dims, in_dims) = (LinearDims::new(rows, f, d), LinearDims::new(rows, d, 2 * f));
        let Scratch { sets, d_hidden, .. } = scratch;
        let own = &mut sets[set];
        let d_branch = own.d_branch.view(rows);
        let queue = grads.queue(pass.dev)?;
        weight_gradient(&queue, grads, &self.wo, d_branch, acts.hidden.view(rows), out_dims)?;
        let weight = pass.weight(&self.wo);
        pass.dev.linear_backward_input(LinearBackwardInput {
            dx: d_hidden.view_mut(rows),
            dy: d_branch,
            w: weight,
            dims: out_dims,
            out: Out::Assign,
        })?;
        let (d_gate_up, gate_up) = (own.d_gate_up.view_mut(rows), acts.gate_up.view(rows));
        let (d_hidden, dims) = (d_hidden.view(rows), gated_dims(rows, f));
        if pass.dropout > 0.0 {
            let drop = pass.drop_dims((rows, f), (tokens, self.site));
            pass.dev.gated_dropout_backward(GatedDropoutBackward {
                d_gate_up,
                dh: d_hidden,
                gate_up,
                keys: pass.keys,
                dims,
                drop,
            })?;
        } else {
            pass.dev.gated_backward(d_gate_up, d_hidden, gate_up, dims)?;
        }
        let d_gate_up = own.d_gate_up.view(rows);
        let queue = grads.queue(pass.dev)?;
        weight_gradient(&queue, grads, &self.wi, d_gate_up, acts.normed.view(rows), in_dims)?;
        let (d_normed, weight) = (own.d_normed.view_mut(rows), pass.weight(&self.wi));
        Ok(pass.dev.linear_backward_input(LinearBackwardInput {
            dx: d_normed,
            dy: d_gate_up,
            w: weight,
            dims: in_dims,
            out: Out::Assign,
        })?)
    }
}

/// T5 v1.1's gated GELU on contiguous rows.
fn gated_dims(rows: usize, cols: usize) -> GatedDims {
    GatedDims { rows, cols, h_stride: cols, kind: GatedKind::GeluTanh }
}
