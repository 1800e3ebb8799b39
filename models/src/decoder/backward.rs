//! The backward pass: the mirror of the forward pass, from the loss to gradients of
//! adapters, of all parameters, or of those of some layers.
//!
//! The gradient of the residual stream, `d_x`, is carried in place from the last block
//! to the first.

use super::pass::{BlockBackward, Gradients, Pass};
use super::{Activations, AdapterView, Decoder, StatisticsOf};
use crate::lora::Projection;
use gradtx_kernels::ops::Embedding;
use gradtx_kernels::{Backend, Buffer, Real};
use gradtx_runtime::data::DeviceBatch;
use gradtx_runtime::{Error, Result};

impl<D: Backend<X>, X: Real> Activations<D, X> {
    /// Fails unless the mode of these buffers is the one that such gradients need.
    fn check_gradients(&self, grads: &Gradients<'_, D, X::Acc>, adapters: bool) -> Result<()> {
        let wants_adapters = matches!(grads, Gradients::Adapters(_));
        let (mut statistics, mut layers) = (None, &[][..]);
        match grads {
            Gradients::Statistics(sums) => statistics = Some(sums.of()),
            Gradients::Layers(_, params) => layers = params.layers(),
            Gradients::Adapters(_) | Gradients::All(_) => {}
        }
        if self.trains
            && self.statistics.as_ref() == statistics
            && self.layers == layers
            && wants_adapters == self.layout.is_some()
            && wants_adapters == adapters
        {
            return Ok(());
        }
        let why = "they need activations of the matching mode, and adapters exactly when the base is frozen";
        Err(Error::invalid("gradients", why))
    }
}

impl<D: Backend<X>, X: Real> Decoder<D, X> {
    /// Loss of every label of a packed stream, into [`Activations::losses`], and gradients
    /// of `Σ weight · loss`, or sums over products, added to `grads`.
    ///
    /// The activations must have been allocated in the matching [`super::Mode`].
    pub fn loss_and_gradient(
        &self,
        acts: &mut Activations<D, X>,
        batch: &DeviceBatch<D, X::Acc>,
        adapters: Option<AdapterView<'_, D, X::Acc>>,
        mut grads: Gradients<'_, D, X::Acc>,
    ) -> Result<()> {
        acts.check(batch.used(), adapters.as_ref())?;
        acts.check_gradients(&grads, adapters.is_some())?;
        let first = match &grads {
            Gradients::Adapters(_) => adapters.map_or(0, |adapters| adapters.layout.first_layer()),
            Gradients::All(_) => self.expect_trainable().map(|()| 0)?,
            Gradients::Layers(_, params) => self.expect_contiguous().map(|()| params.layers()[0])?,
            Gradients::Statistics(sums) => self.expect_statistics(sums.of()).map(|()| sums.first_layer())?,
        };
        let pass = Pass::new(batch, adapters);
        self.forward_blocks(acts, &pass, &mut None)?;
        self.final_norm(acts, pass.tokens)?;
        self.head_loss(acts, batch, true, grads.param(&self.places.head))?;
        self.final_norm_backward(acts, pass.tokens, &mut grads)?;
        for block in (first..self.config.layers).rev() {
            self.block_backward(acts, &pass, block, &mut grads)?;
        }
        let (hidden, d_x) = (self.config.hidden, acts.d.x.view(0..pass.tokens * self.config.hidden));
        let positions = self.places.positions.iter().map(|table| (table, batch.positions()));
        for (table, ids) in positions.chain([(&self.places.embedding, batch.tokens())]) {
            if let Some(d_table) = grads.param(table) {
                Embedding::<X>::embedding_backward(&self.device, d_table, d_x, ids, hidden)?;
            }
        }
        Ok(())
    }

    /// Fails where sums over products of these layers cannot be had: of matrices in factors.
    fn expect_statistics(&self, of: &StatisticsOf) -> Result<()> {
        let blocks = self.config.blocks();
        match of.layers.iter().find(|layer| blocks.get(**layer).is_none_or(|b| b.factor_columns() > 0)) {
            None => Ok(()),
            Some(layer) => {
                let why = format!("layer {layer} has matrices in factors, or is not there");
                Err(Error::invalid("layers of statistics", why))
            }
        }
    }

    fn final_norm_backward(
        &self,
        acts: &mut Activations<D, X>,
        tokens: usize,
        grads: &mut Gradients<'_, D, X::Acc>,
    ) -> Result<()> {
        let len = tokens * self.config.hidden;
        let (dx, dy) = (acts.d.x.view_mut(0..len), acts.d.proj.view(0..len));
        let stats = acts.last_norm_stats.view(0..self.norm_stats(tokens));
        let (x, dims) = (acts.x.get(self.config.layers, len), self.norm_dims(tokens));
        let on = (&self.device, &self.values);
        self.places.final_norm.last_backward(on, grads, dx, dy, stats, x, dims)
    }

    /// The parts of a block from the last to the first. In the first adapted block it ends at
    /// the first adapted product: nobody wants a gradient below that.
    fn block_backward(
        &self,
        acts: &mut Activations<D, X>,
        pass: &Pass<'_, D, X::Acc>,
        block: usize,
        grads: &mut Gradients<'_, D, X::Acc>,
    ) -> Result<()> {
        let Activations { x, x_mid, attention, mlp, d, rope, .. } = acts;
        let (at, parts) = (self.at(pass, rope, block), &self.places.blocks[block]);
        let mut ctx = BlockBackward { at, grads, d };
        parts.mlp.backward(&mut ctx, mlp, x_mid)?;
        if ctx.ends_at(Projection::Down) || ctx.ends_at(Projection::GateUp) {
            return Ok(());
        }
        parts.attention.backward(&mut ctx, attention, x)
    }
}
