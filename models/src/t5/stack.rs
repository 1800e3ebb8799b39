//! [`Stack`]: the encoder or the decoder of a T5, forward and backward.
//!
//! A stack is a list of sublayers along a residual stream: self-attention, in the
//! decoder cross-attention, feed-forward, and so on through the blocks. Sublayer s
//! reads `stream[s]` and writes `stream[s + 1]`; a layer norm ends the stack. All
//! blocks share the relative-position bias that block 0 owns.
//!
//! Flow: the caller writes embeddings to [`StackActs::input_mut`], [`Stack::forward`]
//! leaves [`StackActs::output`]; the caller writes the output's gradient to
//! [`StackActs::d_output_mut`], [`Stack::backward`] adds the parameters' gradients and
//! leaves [`StackActs::d_input`], and in the decoder [`StackActs::d_memory`].
//!
//! Shapes: B examples, T positions each, R = B·T rows; K positions of the memory (the
//! encoder's output); d model width, I = H·D width of all heads, F hidden width.

use super::T5Config;
use super::acts::{Scratch, StackActs, nothing_kept, pair_mut};
use super::attention::{Attention, Lengths};
use super::feed_forward::FeedForward;
use super::pass::{Grads, Pass};
use gradtx_kernels::Real;
use gradtx_kernels::ops::{Backend, BucketMap, Out, RmsNormDims};
use gradtx_runtime::params::ParamLayout;
use gradtx_runtime::{Error, Result};
use std::ops::Range;

/// Encoder or decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Self-attention in both directions.
    Encoder,
    /// Causal self-attention, and attention to the encoder's output.
    Decoder,
}

/// One block's sublayers.
pub(super) struct Block {
    pub(super) self_attention: Attention,
    pub(super) cross_attention: Option<Attention>,
    feed_forward: FeedForward,
}

/// The parameters of a stack, and its computation.
pub struct Stack {
    pub(super) config: T5Config,
    pub(super) side: Side,
    /// `[buckets, H]`
    bias_table: Range<usize>,
    pub(super) blocks: Vec<Block>,
    /// `[d]`
    final_norm: Range<usize>,
    /// Dropout site of the input; the next one is the output's.
    site: u32,
}

impl Side {
    /// Its name in parameters' names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Encoder => "encoder",
            Self::Decoder => "decoder",
        }
    }
}

impl Stack {
    /// Defines a stack's parameters, named `{prefix}{encoder|decoder}.block.0…` and laid out
    /// in the order of the forward pass.
    pub fn new(config: &T5Config, side: Side, layout: &mut ParamLayout, prefix: &str) -> Self {
        let prefix = format!("{prefix}{}.", side.name());
        let decoder = side == Side::Decoder;
        let blocks = if decoder { config.num_decoder_layers } else { config.num_layers };
        // Every dropout of the model has a site of its own: the decoder's start far behind.
        let site = if decoder { 1 << 16 } else { 0 };
        let buckets = config.relative_attention_num_buckets;
        let table = format!("{prefix}block.0.layer.0.SelfAttention.relative_attention_bias.weight");
        let bias_table = layout.push([(table, vec![buckets, config.num_heads])]);
        let mut next = site + 2;
        let mut sites = || {
            next += 2;
            next - 2
        };
        let blocks = (0..blocks)
            .map(|b| {
                let layer = |i: usize| format!("{prefix}block.{b}.layer.{i}.");
                Block {
                    self_attention: Attention::new(
                        layout,
                        &layer(0),
                        "SelfAttention",
                        config,
                        decoder,
                        sites(),
                    ),
                    cross_attention: decoder.then(|| {
                        Attention::new(layout, &layer(1), "EncDecAttention", config, false, sites())
                    }),
                    feed_forward: FeedForward::new(
                        layout,
                        &layer(if decoder { 2 } else { 1 }),
                        config,
                        sites(),
                    ),
                }
            })
            .collect();
        let final_norm = layout.push([(format!("{prefix}final_layer_norm.weight"), vec![config.d_model])]);
        Self { config: config.clone(), side, bias_table, blocks, final_norm, site }
    }

    pub(super) fn sublayers(&self) -> usize {
        self.blocks.len() * self.per_block()
    }

    fn per_block(&self) -> usize {
        if self.side == Side::Decoder { 3 } else { 2 }
    }

    /// The relative-position bias, with the buckets of `pairs` of the map.
    pub(super) fn bias<'a, D: Backend<X>, X: Real>(
        &self,
        pass: &'a Pass<'_, D, X>,
        map: D::View<'a, u32>,
    ) -> BucketMap<'a, D, X> {
        let buckets = self.config.relative_attention_num_buckets;
        BucketMap { table: pass.weight(&self.bias_table), map, buckets }
    }

    fn check<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        acts: &StackActs<D, X>,
        memory: Option<&StackActs<D, X>>,
    ) -> Result<()> {
        let what = format!("a pass of the T5 {}", self.side.name());
        if pass.batch == 0 || pass.batch > acts.shape.batch {
            let why = format!("{} examples, where 1 to {} have room", pass.batch, acts.shape.batch);
            return Err(Error::invalid(what, why));
        }
        match (self.side, memory) {
            (Side::Encoder, None) => {}
            (Side::Decoder, Some(m)) if m.shape.tokens == acts.shape.memory => {}
            _ => {
                let why =
                    "the decoder, and only it, attends to an encoder's output, of the length it was made for";
                return Err(Error::invalid(what, why));
            }
        }
        Ok(())
    }

    /// From embeddings to output. For the decoder, `memory` is the encoder's activations after
    /// its own forward pass over the same examples.
    pub fn forward<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        acts: &mut StackActs<D, X>,
        memory: Option<&StackActs<D, X>>,
    ) -> Result<()> {
        self.check(pass, acts, memory)?;
        let (config, tokens, lens) = (&self.config, acts.shape.tokens, acts.lengths(pass.batch));
        let cross_lens = Lengths { keys: acts.shape.memory, ..lens };
        let rows = pass.batch * tokens;
        self.drop_input(pass, acts)?;
        let (streams, kept) = (acts.stream.len(), acts.feed_forward.len());
        let mut s = 0;
        for (b, block) in self.blocks.iter().enumerate() {
            let (x, out) = pair_mut(&mut acts.stream, s % streams, (s + 1) % streams);
            let (x, out) = (x.view(rows), out.view_mut(rows));
            let bias = Some(self.bias(pass, acts.map.view(tokens)));
            let own = &mut acts.self_attention[b % kept];
            block.self_attention.forward(pass, config, lens, own, out, x, None, bias)?;
            s += 1;
            if let Some(cross) = &block.cross_attention {
                let (x, out) = pair_mut(&mut acts.stream, s % streams, (s + 1) % streams);
                let (x, out) = (x.view(rows), out.view_mut(rows));
                let own = &mut acts.cross_attention[b % kept];
                let memory = memory.map(|m| &m.output);
                cross.forward(pass, config, cross_lens, own, out, x, memory, None)?;
                s += 1;
            }
            self.feed_forward(pass, acts, b, s)?;
            s += 1;
        }
        self.finish(pass, acts)
    }

    /// The embeddings' dropout.
    pub(super) fn drop_input<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        acts: &mut StackActs<D, X>,
    ) -> Result<()> {
        let tokens = acts.shape.tokens;
        let size = (pass.batch * tokens, self.config.d_model);
        pass.drop(acts.input_mut(pass.batch), size, tokens, self.site)
    }

    /// The feed-forward of block b, which is sublayer s.
    pub(super) fn feed_forward<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        acts: &mut StackActs<D, X>,
        b: usize,
        s: usize,
    ) -> Result<()> {
        let tokens = acts.shape.tokens;
        let (streams, kept) = (acts.stream.len(), acts.feed_forward.len());
        let (x, out) = pair_mut(&mut acts.stream, s % streams, (s + 1) % streams);
        let (x, out) = (x.view(pass.batch * tokens), out.view_mut(pass.batch * tokens));
        let own = &mut acts.feed_forward[b % kept];
        self.blocks[b].feed_forward.forward(pass, &self.config, tokens, own, out, x)
    }

    /// The final norm and its dropout.
    pub(super) fn finish<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        acts: &mut StackActs<D, X>,
    ) -> Result<()> {
        let (tokens, d) = (acts.shape.tokens, self.config.d_model);
        let rows = pass.batch * tokens;
        pass.dev.rmsnorm_forward(
            acts.output.view_mut(rows),
            acts.inv_rms.view_mut(rows),
            acts.stream[self.sublayers() % acts.stream.len()].view(rows),
            pass.weight(&self.final_norm),
            RmsNormDims::new(rows, d, self.config.layer_norm_epsilon),
        )?;
        pass.drop(acts.output.view_mut(rows), (rows, d), tokens, self.site + 1)
    }

    /// The mirror of [`Self::forward`] with the same pass and memory. Gradients are added;
    /// the output's gradient is used up.
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
        let cross_lens = Lengths { keys: acts.shape.memory, ..lens };
        let rows = pass.batch * tokens;
        self.backward_final(pass, acts, grads, scratch)?;
        pass.dev.fill(scratch.d_memory.view_mut(pass.batch * acts.shape.memory), X::zero())?;
        let mut s = self.sublayers();
        for (b, block) in self.blocks.iter().enumerate().rev() {
            s -= 1;
            let (x, own) = (acts.stream[s].view(rows), &acts.feed_forward[b]);
            block.feed_forward.backward(pass, config, tokens, own, grads, scratch, x)?;
            grads.ready(&block.feed_forward.range())?;
            if let Some(cross) = &block.cross_attention {
                s -= 1;
                let (x, own) = (acts.stream[s].view(rows), &acts.cross_attention[b]);
                let memory = memory.map(|m| &m.output);
                cross.backward(pass, config, cross_lens, own, grads, scratch, x, memory, None)?;
                grads.ready(&cross.range())?;
            }
            s -= 1;
            let (x, own) = (acts.stream[s].view(rows), &acts.self_attention[b]);
            let bias = Some((self.bias(pass, acts.map.view(tokens)), &self.bias_table));
            block.self_attention.backward(pass, config, lens, own, grads, scratch, x, None, bias)?;
            grads.ready(&block.self_attention.range())?;
        }
        grads.ready(&self.bias_table)?;
        pass.drop(scratch.dx.view_mut(rows), (rows, config.d_model), tokens, self.site)
    }

    fn backward_final<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        acts: &StackActs<D, X>,
        grads: &mut Grads<'_, D, X>,
        scratch: &mut Scratch<D, X>,
    ) -> Result<()> {
        let (tokens, d) = (acts.shape.tokens, self.config.d_model);
        let rows = pass.batch * tokens;
        pass.drop(scratch.d_branch.view_mut(rows), (rows, d), tokens, self.site + 1)?;
        pass.dev.rmsnorm_backward(
            scratch.dx.view_mut(rows),
            Some(grads.at(&self.final_norm)),
            scratch.d_branch.view(rows),
            acts.stream[self.sublayers()].view(rows),
            acts.inv_rms.view(rows),
            pass.weight(&self.final_norm),
            RmsNormDims::new(rows, d, self.config.layer_norm_epsilon),
            Out::Assign,
        )?;
        grads.ready(&self.final_norm)
    }
}
