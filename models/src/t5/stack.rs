//! [`Stack`]: the encoder or the decoder of a T5, forward and backward.
//!
//! A stack is a list of sublayers along a residual stream: self-attention, in the
//! decoder cross-attention, feed-forward, and so on through the blocks. Sublayer s
//! reads `stream[s]` and its norm, and writes `stream[s + 1]` and the norm of that, which
//! is the next sublayer's or the stack's own at its end. All blocks share the
//! relative-position bias that block 0 owns.
//!
//! Flow: the caller writes embeddings to [`StackActs::input_mut`], [`Stack::forward`]
//! leaves [`StackActs::output`]; the caller writes the output's gradient to
//! [`StackActs::d_output_mut`], [`Stack::backward`] computes the parameters' gradients and
//! leaves [`StackActs::d_input`], and in the decoder [`StackActs::d_memory`].
//!
//! Shapes: B examples, T positions each, R = B·T rows; K positions of the memory (the
//! encoder's output); d model width, I = H·D width of all heads, F hidden width.

use super::T5Config;
use super::acts::{StackActs, pair_mut};
use super::attention::{Attention, AttentionActs, Lengths};
use super::feed_forward::{FeedForward, FeedForwardActs};
use super::pass::{NormOut, Pass};
use gradtx_kernels::ops::{Backend, BucketMap};
use gradtx_kernels::{Device, Real};
use gradtx_runtime::buffers::Rows;
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
    pub(super) feed_forward: FeedForward,
}

/// The parameters of a stack, and its computation.
pub struct Stack {
    pub(super) config: T5Config,
    pub(super) side: Side,
    /// `[buckets, H]`
    pub(super) bias_table: Range<usize>,
    pub(super) blocks: Vec<Block>,
    /// `[d]`
    pub(super) final_norm: Range<usize>,
    /// Dropout site of the input; the next one is the output's.
    pub(super) site: u32,
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

    pub(super) fn check<D: Backend<X>, X: Real>(
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
        let size = (pass.batch * acts.shape.tokens, self.config.d_model);
        let tokens = acts.shape.tokens;
        pass.drop(acts.input_mut(pass.batch), size, tokens, self.site)?;
        let memory = memory.map(|m| &m.output);
        let ahead = self.read_memory(pass, acts, memory)?;
        self.first_norm(pass, acts)?;
        let mut s = 0;
        for b in 0..self.blocks.len() {
            self.self_attention(pass, acts, b, s)?;
            s += 1;
            if self.blocks[b].cross_attention.is_some() {
                self.cross_attention(pass, acts, memory, ahead.get(b), (b, s))?;
                s += 1;
            }
            self.feed_forward(pass, acts, b, s)?;
            s += 1;
        }
        pass.drop(acts.output.view_mut(size.0), size, tokens, self.site + 1)
    }

    /// Where every block has keys and values of its own: those of the memory for all cross-attentions,
    /// in the device's second queue, with a mark for each block.
    fn read_memory<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        acts: &mut StackActs<D, X>,
        memory: Option<&Rows<D, X>>,
    ) -> Result<Vec<D::Event>> {
        if memory.is_none() || acts.cross_attention.len() < self.blocks.len() {
            return Ok(Vec::new());
        }
        let (queue, mut start) = (pass.dev.second_queue(), D::Event::default());
        pass.dev.record(&mut start)?;
        queue.wait_for(&start)?;
        let kv_rows = pass.batch * acts.shape.memory;
        let mut marks = Vec::with_capacity(self.blocks.len());
        for (block, own) in self.blocks.iter().zip(&mut acts.cross_attention) {
            let mut mark = D::Event::default();
            if let Some(cross) = &block.cross_attention {
                cross.keys_values(&queue, pass, &self.config, kv_rows, own, memory)?;
            }
            queue.record(&mut mark)?;
            marks.push(mark);
        }
        Ok(marks)
    }

    /// Where the norm goes that block b begins with, or behind the last one the stack's own.
    fn block_norm<'a, D: Device, X: Real>(
        &'a self,
        b: usize,
        acts: &'a mut [AttentionActs<D, X>],
        (output, inv_rms): (&'a mut Rows<D, X>, &'a mut Rows<D, X::Acc>),
        rows: usize,
    ) -> NormOut<'a, D, X> {
        match self.blocks.get(b) {
            Some(block) => {
                let kept = acts.len();
                block.self_attention.norm_out(&self.config, &mut acts[b % kept], rows)
            }
            None => NormOut {
                weight: &self.final_norm,
                normed: output.view_mut(rows),
                inv_rms: inv_rms.view_mut(rows),
                eps: self.config.layer_norm_epsilon,
            },
        }
    }

    /// Where the norm goes that follows the self-attention of block b.
    pub(super) fn norm_after_self_attention<'a, D: Device, X: Real>(
        &'a self,
        b: usize,
        cross: &'a mut [AttentionActs<D, X>],
        feed_forward: &'a mut [FeedForwardActs<D, X>],
        rows: usize,
    ) -> NormOut<'a, D, X> {
        let (block, kept) = (&self.blocks[b], feed_forward.len());
        match &block.cross_attention {
            Some(next) => next.norm_out(&self.config, &mut cross[b % kept], rows),
            None => block.feed_forward.norm_out(&self.config, &mut feed_forward[b % kept], rows),
        }
    }

    /// The norm of the embeddings, which the first block begins with.
    pub(super) fn first_norm<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        acts: &mut StackActs<D, X>,
    ) -> Result<()> {
        let rows = pass.batch * acts.shape.tokens;
        let StackActs { stream, self_attention, output, inv_rms, .. } = acts;
        let to = self.block_norm(0, self_attention, (output, inv_rms), rows);
        pass.norm(to, stream[0].view(rows), (rows, self.config.d_model))
    }

    /// The self-attention of block b, which is sublayer s.
    fn self_attention<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        acts: &mut StackActs<D, X>,
        b: usize,
        s: usize,
    ) -> Result<()> {
        let lens = acts.lengths(pass.batch);
        let rows = pass.batch * lens.queries;
        let StackActs { stream, self_attention, cross_attention, feed_forward, map, .. } = acts;
        let (streams, kept) = (stream.len(), feed_forward.len());
        let (x, out) = pair_mut(stream, s % streams, (s + 1) % streams);
        let (x, out) = (x.view(rows), out.view_mut(rows));
        let next = self.norm_after_self_attention(b, cross_attention, feed_forward, rows);
        let bias = Some(self.bias(pass, map.view(lens.keys)));
        let (attention, own) = (&self.blocks[b].self_attention, &mut self_attention[b % kept]);
        attention.keys_values(pass.dev, pass, &self.config, rows, own, None)?;
        attention.forward(pass, &self.config, lens, own, out, x, bias, next)
    }

    /// The cross-attention of block b, which is sublayer s. Its keys and values are there at the mark, or
    /// not yet computed.
    fn cross_attention<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        acts: &mut StackActs<D, X>,
        memory: Option<&Rows<D, X>>,
        ahead: Option<&D::Event>,
        (b, s): (usize, usize),
    ) -> Result<()> {
        let lens = Lengths { keys: acts.shape.memory, ..acts.lengths(pass.batch) };
        let rows = pass.batch * lens.queries;
        let block = &self.blocks[b];
        let Some(cross) = &block.cross_attention else { return Ok(()) };
        let StackActs { stream, cross_attention, feed_forward, .. } = acts;
        let (streams, kept) = (stream.len(), feed_forward.len());
        let (x, out) = pair_mut(stream, s % streams, (s + 1) % streams);
        let (x, out) = (x.view(rows), out.view_mut(rows));
        let next = block.feed_forward.norm_out(&self.config, &mut feed_forward[b % kept], rows);
        let own = &mut cross_attention[b % kept];
        match ahead {
            Some(mark) => pass.dev.wait_for(mark)?,
            None => cross.keys_values(pass.dev, pass, &self.config, lens.batch * lens.keys, own, memory)?,
        }
        cross.forward(pass, &self.config, lens, own, out, x, None, next)
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
        let rows = pass.batch * tokens;
        let StackActs { stream, self_attention, feed_forward, output, inv_rms, .. } = acts;
        let (streams, kept) = (stream.len(), feed_forward.len());
        let (x, out) = pair_mut(stream, s % streams, (s + 1) % streams);
        let (x, out) = (x.view(rows), out.view_mut(rows));
        let next = self.block_norm(b + 1, self_attention, (output, inv_rms), rows);
        let own = &mut feed_forward[b % kept];
        self.blocks[b].feed_forward.forward(pass, &self.config, tokens, own, out, x, next)
    }
}
