//! The forward pass: from a packed token stream to the loss of every label, or to logits.

use super::pass::{BlockPass, Cache, Pass};
use super::rope::RopeTables;
use super::{Activations, AdapterView, Decoder};
use gradtx_kernels::ops::{
    Elementwise, Embedding, Gemm, GemmDims, LmHead, LmHeadDims, LmHeadLoss, LmHeadScratch, RmsNormDims,
};
use gradtx_kernels::{Backend, Buffer, Real, View, ViewMut};
use gradtx_runtime::Result;
use gradtx_runtime::data::DeviceBatch;

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
        let mut logits = Vec::with_capacity(rows.len() * self.config.vocab);
        self.each_logits(acts, batch, adapters, rows, &mut |_, chunk| logits.extend_from_slice(chunk))?;
        Ok(logits)
    }

    /// The same for more positions than fit into memory at once: `each` gets the number of the first position of a
    /// chunk, and the logits of all of its positions.
    pub fn each_logits(
        &self,
        acts: &mut Activations<D, X>,
        batch: &DeviceBatch<D, X::Acc>,
        adapters: Option<AdapterView<'_, D, X::Acc>>,
        rows: &[u32],
        each: &mut dyn FnMut(usize, &[X]),
    ) -> Result<()> {
        acts.check(batch.used(), adapters.as_ref())?;
        let pass = Pass::new(batch, adapters);
        self.forward_blocks(acts, &pass, &mut None)?;
        let mut first = 0;
        for chunk in rows.chunks(acts.chunk) {
            let on_device = self.device.buffer_from(chunk)?;
            self.row_logits(acts, pass.tokens, on_device.all())?;
            let len = chunk.len() * self.config.vocab;
            each(first, &self.device.to_host(acts.head_logits.view(0..len))?);
            first += chunk.len();
        }
        Ok(())
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
        if let Some(positions) = &self.places.positions {
            let (x, table) = (acts.x.get_mut(0, pass.tokens * hidden), self.weights(positions));
            Embedding::<X>::embedding_add(&self.device, x, table, pass.batch.positions(), hidden)?;
        }
        for block in 0..self.config.layers {
            self.block_forward(acts, pass, cache, block)?;
        }
        Ok(())
    }

    fn block_forward(
        &self,
        acts: &mut Activations<D, X>,
        pass: &Pass<'_, D, X::Acc>,
        cache: &mut Option<Cache<'_, D, X>>,
        block: usize,
    ) -> Result<()> {
        let Activations { x, x_mid, attention, mlp, rope, between, .. } = acts;
        let (at, parts) = (self.at(pass, rope, block), &self.places.blocks[block]);
        parts.attention.forward(&at, attention, (x, x_mid), between, cache)?;
        parts.mlp.forward(&at, mlp, (x_mid, x), between)
    }

    /// What the parts of a block share in a pass.
    pub(super) fn at<'a, 'p>(
        &'a self,
        pass: &'a Pass<'p, D, X::Acc>,
        rope: &'a RopeTables<D, X::Acc>,
        block: usize,
    ) -> BlockPass<'a, 'p, D, X> {
        let (norm, norm_stats) = (self.norm_dims(pass.tokens), self.norm_stats(pass.tokens));
        BlockPass { device: &self.device, values: &self.values, rope, pass, block, norm, norm_stats }
    }

    /// Numbers that a norm of the residual stream keeps of so many tokens.
    pub(super) fn norm_stats(&self, tokens: usize) -> usize {
        tokens * self.config.block().norm.statistics()
    }

    /// Shapes of a norm of the residual stream.
    pub(super) fn norm_dims(&self, tokens: usize) -> RmsNormDims {
        RmsNormDims::new(tokens, self.config.hidden, self.config.norm_eps)
    }

    /// The final norm of every token.
    pub(super) fn final_norm(&self, acts: &mut Activations<D, X>, tokens: usize) -> Result<()> {
        let len = tokens * self.config.hidden;
        let (y, stats) =
            (acts.last.view_mut(0..len), acts.last_norm_stats.view_mut(0..self.norm_stats(tokens)));
        let x = acts.x.get(self.config.layers, len);
        let weights = self.places.final_norm.weights::<D, X>(&self.values);
        weights.forward(&self.device, y, stats, x, self.norm_dims(tokens))
    }

    /// Loss of every label; with `gradient`, also its gradient in the head's input
    /// (`d.proj` `[T, H]` `=`), and in the head itself where `d_head` is given.
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
                dx: gradient.then(|| acts.d.proj.view_mut(0..tokens * hidden)),
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
        let stats = acts.last_norm_stats.view_mut(0..self.norm_stats(count));
        let (y, x) = (acts.last.view_mut(0..count * hidden), acts.head_rows.view(0..count * hidden));
        let weights = self.places.final_norm.weights::<D, X>(&self.values);
        weights.forward(device, y, stats, x, self.norm_dims(count))?;
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
