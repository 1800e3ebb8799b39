//! The backward pass of a [`Stack`], sublayer by sublayer from its end.
//!
//! `scratch.dx` is the gradient of the residual stream where the pass has arrived. A sublayer turns
//! the gradient of its branch into that of its norm; then one operation takes dx through the norm and
//! prepares the branch of the sublayer before. Sublayers use the two sets of `scratch` in turns (see
//! [`Grads`]).

use super::acts::{StackActs, nothing_kept, pair_mut};
use super::attention::Lengths;
use super::pass::{Grads, Pass};
use super::scratch::Scratch;
use super::stack::Stack;
use gradtx_kernels::ops::{
    Backend, Out, ResidualNorm, ResidualNormBackward, ResidualNormDims, RmsNorm, RmsNormBackward,
    RmsNormBackwardWeight, RmsNormDims,
};
use gradtx_kernels::{Device, Real};
use gradtx_runtime::Result;
use std::ops::Range;

/// A norm on the way back.
struct NormIn<'a, D: Device, X: Real> {
    weight: &'a Range<usize>,
    /// `[R, d]`: what was normed.
    x: D::View<'a, X>,
    /// `[R]`
    inv_rms: D::View<'a, X::Acc>,
    /// Dropout site of the branch before it; none if there is no sublayer before.
    branch: Option<u32>,
    /// Of dx.
    out: Out,
    /// All parameters of the sublayer that begins with it.
    range: Range<usize>,
}

impl Stack {
    /// The mirror of [`Self::forward`] with the same pass and memory. The output's gradient is used up.
    pub fn backward<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        acts: &mut StackActs<D, X>,
        memory: Option<&StackActs<D, X>>,
        grads: &mut Grads<'_, D, X>,
    ) -> Result<()> {
        self.check(pass, acts, memory)?;
        let mut scratch = acts.scratch.take().ok_or_else(nothing_kept)?;
        let done = self.backward_sublayers(pass, acts, memory, grads, &mut scratch);
        acts.scratch = Some(scratch);
        done
    }

    fn backward_sublayers<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        acts: &StackActs<D, X>,
        memory: Option<&StackActs<D, X>>,
        grads: &mut Grads<'_, D, X>,
        scratch: &mut Scratch<D, X>,
    ) -> Result<()> {
        let (config, tokens, lens) = (&self.config, acts.shape.tokens, acts.lengths(pass.batch));
        let (rows, size) = (pass.batch * tokens, (pass.batch * tokens, config.d_model));
        if grads.out == Out::Assign {
            // Every block adds to it.
            pass.dev.fill(grads.at(&self.bias_table), X::Acc::zero())?;
        }
        self.backward_final(pass, acts, grads, scratch)?;
        let (mut s, mut set) = (self.sublayers(), 1);
        for (b, block) in self.blocks.iter().enumerate().rev() {
            s -= 1;
            let (attention, own) = (&block.self_attention, &acts.feed_forward[b]);
            block.feed_forward.backward(pass, config, tokens, own, grads, scratch, set)?;
            let before = block.cross_attention.as_ref().unwrap_or(attention).output_site();
            let norm = NormIn {
                weight: block.feed_forward.norm(),
                x: acts.stream[s].view(rows),
                inv_rms: own.inv_rms(rows),
                branch: Some(before),
                out: Out::Add,
                range: block.feed_forward.range(),
            };
            self.backward_norm(pass, tokens, grads, scratch, set, norm)?;
            set = 1 - set;
            if block.cross_attention.is_some() {
                s -= 1;
                self.backward_cross(pass, acts, memory, grads, scratch, (b, s, set))?;
                set = 1 - set;
            }
            s -= 1;
            let own = &acts.self_attention[b];
            let bias = Some((self.bias(pass, acts.map.view(tokens)), &self.bias_table));
            attention.backward(pass, config, lens, own, grads, scratch, set, None, bias)?;
            let norm = NormIn {
                weight: attention.norm(),
                x: acts.stream[s].view(rows),
                inv_rms: own.inv_rms(rows),
                branch: b.checked_sub(1).map(|b| self.blocks[b].feed_forward.output_site()),
                out: Out::Add,
                range: attention.range(),
            };
            self.backward_norm(pass, tokens, grads, scratch, set, norm)?;
            set = 1 - set;
        }
        pass.drop(scratch.dx.view_mut(rows), size, tokens, self.site)?;
        grads.asked(&self.bias_table);
        grads.finish(pass.dev)
    }

    /// The cross-attention of block b, which is sublayer s, with a set of `scratch`.
    fn backward_cross<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        acts: &StackActs<D, X>,
        memory: Option<&StackActs<D, X>>,
        grads: &mut Grads<'_, D, X>,
        scratch: &mut Scratch<D, X>,
        (b, s, set): (usize, usize, usize),
    ) -> Result<()> {
        let block = &self.blocks[b];
        let Some(cross) = &block.cross_attention else { return Ok(()) };
        let (tokens, own) = (acts.shape.tokens, &acts.cross_attention[b]);
        let lens = Lengths { keys: acts.shape.memory, ..acts.lengths(pass.batch) };
        // The last block comes first.
        let out = if b + 1 == self.blocks.len() { Out::Assign } else { Out::Add };
        let memory = memory.map(|m| (&m.output, out));
        cross.backward(pass, &self.config, lens, own, grads, scratch, set, memory, None)?;
        let rows = pass.batch * tokens;
        let norm = NormIn {
            weight: cross.norm(),
            x: acts.stream[s].view(rows),
            inv_rms: own.inv_rms(rows),
            branch: Some(block.self_attention.output_site()),
            out: Out::Add,
            range: cross.range(),
        };
        self.backward_norm(pass, tokens, grads, scratch, set, norm)
    }

    /// The output's dropout and the final norm.
    fn backward_final<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        acts: &StackActs<D, X>,
        grads: &mut Grads<'_, D, X>,
        scratch: &mut Scratch<D, X>,
    ) -> Result<()> {
        let tokens = acts.shape.tokens;
        let size = (pass.batch * tokens, self.config.d_model);
        pass.drop(scratch.sets[0].d_normed.view_mut(size.0), size, tokens, self.site + 1)?;
        let norm = NormIn {
            weight: &self.final_norm,
            x: acts.stream[self.sublayers()].view(size.0),
            inv_rms: acts.inv_rms.view(size.0),
            branch: self.blocks.last().map(|block| block.feed_forward.output_site()),
            out: Out::Assign,
            range: self.final_norm.clone(),
        };
        self.backward_norm(pass, tokens, grads, scratch, 0, norm)
    }

    /// From `d_normed` of a set of `scratch` to dx, and to `d_branch` of the other set.
    fn backward_norm<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        tokens: usize,
        grads: &mut Grads<'_, D, X>,
        scratch: &mut Scratch<D, X>,
        set: usize,
        norm: NormIn<'_, D, X>,
    ) -> Result<()> {
        let size @ (rows, cols) = (pass.batch * tokens, self.config.d_model);
        let NormIn { weight, x, inv_rms, branch, out, range } = norm;
        let Scratch { dx, sets, .. } = scratch;
        let (own, other) = pair_mut(sets, set, 1 - set);
        let (dx, dy, w) = (dx.view_mut(rows), own.d_normed.view(rows), pass.weight(weight));
        let (dims, of_weight) = (RmsNormDims::new(rows, cols, self.config.layer_norm_epsilon), grads.out);
        let queue = grads.queue(pass.dev)?;
        RmsNorm::<X>::rmsnorm_backward_weight(
            &queue,
            RmsNormBackwardWeight { dw: grads.at(weight), dy, x, inv_rms, dims, out: of_weight },
        )?;
        grads.asked(&range);
        grads.end(set)?;
        let Some(site) = branch else {
            return Ok(pass.dev.rmsnorm_backward(RmsNormBackward {
                dx,
                dw: None,
                dy,
                x,
                inv_rms,
                w,
                dims,
                out,
            })?);
        };
        grads.wait(pass.dev, 1 - set)?;
        let dims = ResidualNormDims { drop: pass.drop_dims(size, (tokens, site)), eps: dims.eps };
        let d_branch = other.d_branch.view_mut(rows);
        Ok(ResidualNorm::<X>::residual_norm_backward(
            pass.dev,
            ResidualNormBackward { dx, d_branch, dy, x, inv_rms, w, keys: pass.keys, dims, out },
        )?)
    }
}
