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
use super::attention::{Attention, AttentionActs, Lengths};
use super::buckets::bucket_map;
use super::buffers::{Allocator, Rows};
use super::feed_forward::{FeedForward, FeedForwardActs};
use super::pass::{Grads, Pass};
use gradtx_kernels::ops::{Backend, BucketMap, Out, RmsNormDims};
use gradtx_kernels::{Device, Real};
use gradtx_runtime::params::ParamLayout;
use gradtx_runtime::plan::{MemoryPlan, Purpose};
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

/// What a forward pass keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Everything that backward needs.
    ForBackward,
    /// Nothing: sublayers of a kind share their buffers.
    Nothing,
}

/// Size of a stack's activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackShape {
    /// Examples at most.
    pub batch: usize,
    /// Positions, T.
    pub tokens: usize,
    /// Positions of the memory, K; 0 for the encoder.
    pub memory: usize,
}

/// Activations of a stack: named buffers, allocated once.
pub struct StackActs<D: Device, X: Real> {
    shape: StackShape,
    /// `[R, d]` before each sublayer, and after the last; two, in turns, where nothing is kept.
    pub(super) stream: Vec<Rows<D, X>>,
    pub(super) self_attention: Vec<AttentionActs<D, X>>,
    pub(super) cross_attention: Vec<AttentionActs<D, X>>,
    feed_forward: Vec<FeedForwardActs<D, X>>,
    /// `[R]`, of the final norm.
    inv_rms: Rows<D, X::Acc>,
    /// `[R, d]`
    output: Rows<D, X>,
    /// `[T, T]`: buckets of relative positions.
    pub(super) map: Rows<D, u32>,
    scratch: Option<Scratch<D, X>>,
}

/// Gradients of activations, shared by all sublayers.
pub(super) struct Scratch<D: Device, X: Real> {
    /// `[R, d]`, of the residual stream where backward has arrived.
    pub(super) dx: Rows<D, X>,
    /// `[R, d]`, of a branch's output before its dropout; also of the stack's output.
    pub(super) d_branch: Rows<D, X>,
    /// `[R, d]`
    pub(super) d_normed: Rows<D, X>,
    /// `[R, I]`
    pub(super) dq: Rows<D, X>,
    /// `[max(R, B·K), 2I]`
    pub(super) dkv: Rows<D, X>,
    /// `[R, I]`
    pub(super) d_o: Rows<D, X>,
    /// `[B, H·T·max(T, K)]`
    pub(super) d_scores: Rows<D, X>,
    /// `[R, F]`
    pub(super) d_hidden: Rows<D, X>,
    /// `[R, 2F]`
    pub(super) d_gate_up: Rows<D, X>,
    /// `[B·K, d]`
    pub(super) d_memory: Rows<D, X>,
}

impl<D: Device, X: Real> Scratch<D, X> {
    fn new(alloc: &mut Allocator<'_, D>, name: &str, config: &T5Config, shape: StackShape) -> Result<Self> {
        let (d, inner, f) = (config.d_model, config.inner(), config.d_ff);
        let StackShape { batch, tokens, memory } = shape;
        let (rows, widest) = (batch * tokens, tokens.max(memory));
        let mut rows_of = |part: &str, rows, cols| alloc.rows(format!("{name}.{part}"), rows, cols);
        Ok(Self {
            dx: rows_of("dx", rows, d)?,
            d_branch: rows_of("d_branch", rows, d)?,
            d_normed: rows_of("d_normed", rows, d)?,
            dq: rows_of("dq", rows, inner)?,
            dkv: rows_of("dkv", batch * widest, 2 * inner)?,
            d_o: rows_of("d_o", rows, inner)?,
            d_scores: rows_of("d_scores", batch, config.num_heads * tokens * widest)?,
            d_hidden: rows_of("d_hidden", rows, f)?,
            d_gate_up: rows_of("d_gate_up", rows, 2 * f)?,
            d_memory: rows_of("d_memory", batch * memory, d)?,
        })
    }

    /// Copies dx, the gradient of a sublayer's sum, to `d_branch` and takes it through the
    /// branch's dropout.
    pub(super) fn begin_branch(
        &mut self,
        pass: &Pass<'_, D, X>,
        (rows, cols): (usize, usize),
        tokens: usize,
        site: u32,
    ) -> Result<()>
    where
        D: Backend<X>,
    {
        pass.dev.copy(self.d_branch.view_mut(rows), self.dx.view(rows))?;
        pass.drop(self.d_branch.view_mut(rows), (rows, cols), tokens, site)
    }
}

impl<D: Device, X: Real> StackActs<D, X> {
    /// Takes memory for a stack.
    pub fn new(dev: &D, stack: &Stack, shape: StackShape, keep: Keep) -> Result<Self> {
        Self::allocate(&mut Allocator::new(dev, false, Purpose::Activations), stack, shape, keep)
    }

    /// The buffers that [`Self::new`] would take, without taking them.
    pub fn plan(dev: &D, stack: &Stack, shape: StackShape, keep: Keep) -> Result<MemoryPlan> {
        let mut alloc = Allocator::new(dev, true, Purpose::Activations);
        Self::allocate(&mut alloc, stack, shape, keep)?;
        Ok(alloc.into_plan())
    }

    pub(crate) fn allocate(
        alloc: &mut Allocator<'_, D>,
        stack: &Stack,
        shape: StackShape,
        keep: Keep,
    ) -> Result<Self> {
        Self::allocate_attending(alloc, stack, shape, keep, shape.tokens, false)
    }

    /// As [`Self::allocate`], with self-attention over `keys` positions. Own keys and values
    /// are kept unless they come from a cache.
    pub(super) fn allocate_attending(
        alloc: &mut Allocator<'_, D>,
        stack: &Stack,
        shape: StackShape,
        keep: Keep,
        keys: usize,
        cached: bool,
    ) -> Result<Self> {
        let StackShape { batch, tokens, memory } = shape;
        let (config, name) = (&stack.config, stack.side.name());
        let (rows, d) = (batch * tokens, config.d_model);
        let blocks = if keep == Keep::Nothing { 1 } else { stack.blocks.len() };
        let streams = if keep == Keep::Nothing { 2 } else { stack.sublayers() + 1 };
        let mut acts = Self {
            shape,
            stream: Vec::with_capacity(streams),
            self_attention: Vec::with_capacity(blocks),
            cross_attention: Vec::with_capacity(blocks),
            feed_forward: Vec::with_capacity(blocks),
            inv_rms: alloc.rows(format!("{name}.final.inv_rms"), rows, 1)?,
            output: alloc.rows(format!("{name}.output"), rows, d)?,
            map: alloc.filled(
                format!("{name}.buckets"),
                keys,
                keys,
                &bucket_map(config, stack.side == Side::Encoder, keys, keys),
            )?,
            scratch: None,
        };
        for _ in 0..streams {
            acts.stream.push(alloc.rows(format!("{name}.stream"), rows, d)?);
        }
        let lens = Lengths { batch, queries: tokens, keys };
        let cross = Lengths { keys: memory, ..lens };
        for _ in 0..blocks {
            let part = |part: &str| format!("{name}.{part}");
            let attention = AttentionActs::new(alloc, &part("self"), config, lens, !cached)?;
            acts.self_attention.push(attention);
            if stack.side == Side::Decoder {
                acts.cross_attention.push(AttentionActs::new(alloc, &part("cross"), config, cross, !cached)?);
            }
            acts.feed_forward.push(FeedForwardActs::new(alloc, &part("ff"), config, rows)?);
        }
        if keep == Keep::ForBackward {
            let before = alloc.set_purpose(Purpose::Scratch);
            acts.scratch = Some(Scratch::new(alloc, name, config, shape)?);
            alloc.set_purpose(before);
        }
        Ok(acts)
    }

    /// `[B, T, d]`: where the caller writes embeddings before a forward pass.
    pub fn input_mut(&mut self, batch: usize) -> D::ViewMut<'_, X> {
        self.stream[0].view_mut(batch * self.shape.tokens)
    }

    /// `[B, T, d]`: the result of a forward pass, after the final norm.
    pub fn output(&self, batch: usize) -> D::View<'_, X> {
        self.output.view(batch * self.shape.tokens)
    }

    /// `[B, T, d]`: where the caller writes the output's gradient before a backward pass.
    pub fn d_output_mut(&mut self, batch: usize) -> Result<D::ViewMut<'_, X>> {
        let rows = batch * self.shape.tokens;
        Ok(self.scratch_mut()?.d_branch.view_mut(rows))
    }

    /// `[B, T, d]`: the embeddings' gradient, after a backward pass.
    pub fn d_input(&self, batch: usize) -> Result<D::View<'_, X>> {
        Ok(self.scratch()?.dx.view(batch * self.shape.tokens))
    }

    /// As [`Self::d_input`], for writing.
    pub fn d_input_mut(&mut self, batch: usize) -> Result<D::ViewMut<'_, X>> {
        let rows = batch * self.shape.tokens;
        Ok(self.scratch_mut()?.dx.view_mut(rows))
    }

    /// `[B, K, d]`: the memory's gradient, after a backward pass of the decoder.
    pub fn d_memory(&self, batch: usize) -> Result<D::View<'_, X>> {
        Ok(self.scratch()?.d_memory.view(batch * self.shape.memory))
    }

    /// Examples at most.
    pub(super) fn capacity(&self) -> usize {
        self.shape.batch
    }

    /// Positions of each example.
    pub(super) fn tokens(&self) -> usize {
        self.shape.tokens
    }

    fn scratch(&self) -> Result<&Scratch<D, X>> {
        self.scratch.as_ref().ok_or_else(nothing_kept)
    }

    fn scratch_mut(&mut self) -> Result<&mut Scratch<D, X>> {
        self.scratch.as_mut().ok_or_else(nothing_kept)
    }

    fn lengths(&self, batch: usize) -> Lengths {
        Lengths { batch, queries: self.shape.tokens, keys: self.shape.tokens }
    }
}

fn nothing_kept() -> Error {
    Error::invalid("activations of a T5 stack", "allocated without what a backward pass needs")
}

/// Element `read` for reading beside element `write` for writing.
pub(super) fn pair_mut<T>(items: &mut [T], read: usize, write: usize) -> (&T, &mut T) {
    assert_ne!(read, write, "a sublayer does not overwrite its input");
    if read < write {
        let (before, after) = items.split_at_mut(write);
        (&before[read], &mut after[0])
    } else {
        let (before, after) = items.split_at_mut(read);
        (&after[0], &mut before[write])
    }
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

    fn sublayers(&self) -> usize {
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
