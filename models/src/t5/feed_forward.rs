//! The feed-forward sublayer: `out = x + dropout(W_o · dropout(gelu(W_0 n) ⊙ (W_1 n)))`, `n = norm(x)`.
//!
//! Shapes: R = B·T rows, d model width, F hidden width.

use super::T5Config;
use super::acts::Scratch;
use super::buffers::{Allocator, Rows};
use super::pass::{Grads, Pass, weight_gradient};
use gradtx_kernels::ops::{Backend, GatedDims, GatedKind, LinearDims, Out, RmsNormDims};
use gradtx_kernels::{Device, Real};
use gradtx_runtime::Result;
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

    /// `out = x + …`; both `[R, d]`.
    pub(super) fn forward<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        config: &T5Config,
        tokens: usize,
        acts: &mut FeedForwardActs<D, X>,
        out: D::ViewMut<'_, X>,
        x: D::View<'_, X>,
    ) -> Result<()> {
        let rows = pass.batch * tokens;
        let (d, f) = (config.d_model, config.d_ff);
        pass.dev.rmsnorm_forward(
            acts.normed.view_mut(rows),
            acts.inv_rms.view_mut(rows),
            x,
            pass.weight(&self.norm),
            RmsNormDims::new(rows, d, config.layer_norm_epsilon),
        )?;
        let normed = acts.normed.view(rows);
        let dims = LinearDims::new(rows, d, 2 * f);
        let weight = pass.weight(&self.wi);
        pass.dev.linear_forward(acts.gate_up.view_mut(rows), normed, weight, None, None, dims)?;
        let gate_up = acts.gate_up.view(rows);
        pass.dev.gated_forward(acts.hidden.view_mut(rows), gate_up, gated_dims(rows, f))?;
        pass.drop(acts.hidden.view_mut(rows), (rows, f), tokens, self.site)?;
        let dims = LinearDims::new(rows, f, d);
        pass.linear_onto_residual(out, x, acts.hidden.view(rows), &self.wo, dims, (tokens, self.site + 1))
    }

    /// Turns `scratch.dx` from the gradient of `out` into that of `x`.
    pub(super) fn backward<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        config: &T5Config,
        tokens: usize,
        acts: &FeedForwardActs<D, X>,
        grads: &mut Grads<'_, D, X>,
        scratch: &mut Scratch<D, X>,
        x: D::View<'_, X>,
    ) -> Result<()> {
        let rows = pass.batch * tokens;
        let (d, f) = (config.d_model, config.d_ff);
        let out_dims = LinearDims::new(rows, f, d);
        scratch.begin_branch(pass, (rows, d), tokens, self.site + 1)?;
        let d_branch = scratch.d_branch.view(rows);
        weight_gradient(pass.dev, grads, &self.wo, d_branch, acts.hidden.view(rows), out_dims)?;
        let d_hidden = scratch.d_hidden.view_mut(rows);
        pass.dev.linear_backward_input(d_hidden, d_branch, pass.weight(&self.wo), out_dims, Out::Assign)?;
        pass.drop(scratch.d_hidden.view_mut(rows), (rows, f), tokens, self.site)?;
        let (d_hidden, gate_up) = (scratch.d_hidden.view(rows), acts.gate_up.view(rows));
        pass.dev.gated_backward(scratch.d_gate_up.view_mut(rows), d_hidden, gate_up, gated_dims(rows, f))?;
        let in_dims = LinearDims::new(rows, d, 2 * f);
        let d_gate_up = scratch.d_gate_up.view(rows);
        weight_gradient(pass.dev, grads, &self.wi, d_gate_up, acts.normed.view(rows), in_dims)?;
        let d_normed = scratch.d_normed.view_mut(rows);
        pass.dev.linear_backward_input(d_normed, d_gate_up, pass.weight(&self.wi), in_dims, Out::Assign)?;
        pass.dev.rmsnorm_backward(
            scratch.dx.view_mut(rows),
            Some(grads.at(&self.norm)),
            scratch.d_normed.view(rows),
            x,
            acts.inv_rms.view(rows),
            pass.weight(&self.norm),
            RmsNormDims::new(rows, d, config.layer_norm_epsilon),
            Out::Add,
        )?;
        Ok(())
    }
}

/// T5 v1.1's gated GELU on contiguous rows.
fn gated_dims(rows: usize, cols: usize) -> GatedDims {
    GatedDims { rows, cols, h_stride: cols, kind: GatedKind::GeluTanh }
}
