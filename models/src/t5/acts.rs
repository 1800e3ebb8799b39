//! [`StackActs`]: what a stack keeps from its forward pass, and room for its backward pass.
//!
//! Shapes: B examples, T positions each, R = B·T rows; K positions of the memory (the
//! encoder's output); d model width, I = H·D width of all heads, F hidden width.

use super::attention::{AttentionActs, Lengths};
use super::buckets::bucket_map;
use super::feed_forward::FeedForwardActs;
use super::scratch::{Scratch, StackShape};
use super::stack::{Side, Stack};
use gradtx_kernels::{Device, Real};
use gradtx_runtime::buffers::{Allocator, Rows};
use gradtx_runtime::plan::Purpose;
use gradtx_runtime::{Error, Result};

/// What a forward pass keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Everything that backward needs.
    ForBackward,
    /// Nothing: sublayers of a kind share their buffers.
    Nothing,
}

/// Activations of a stack: named buffers, allocated once.
pub struct StackActs<D: Device, X: Real> {
    pub(super) shape: StackShape,
    /// `[R, d]` before each sublayer, and after the last; two, in turns, where nothing is kept.
    pub(super) stream: Vec<Rows<D, X>>,
    pub(super) self_attention: Vec<AttentionActs<D, X>>,
    pub(super) cross_attention: Vec<AttentionActs<D, X>>,
    pub(super) feed_forward: Vec<FeedForwardActs<D, X>>,
    /// `[R]`, of the final norm.
    pub(super) inv_rms: Rows<D, X::Acc>,
    /// `[R, d]`
    pub(super) output: Rows<D, X>,
    /// `[T, T]`: buckets of relative positions.
    pub(super) map: Rows<D, u32>,
    pub(super) scratch: Option<Scratch<D, X>>,
}

impl<D: Device, X: Real> StackActs<D, X> {
    /// Takes memory for a stack.
    pub fn new(dev: &D, stack: &Stack, shape: StackShape, keep: Keep) -> Result<Self> {
        Self::allocate(&mut Allocator::new(dev, Purpose::Activations), stack, shape, keep)
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
            map: alloc.filled_rows(format!("{name}.buckets"), keys, keys, || {
                bucket_map(config, stack.side == Side::Encoder, keys, keys)
            })?,
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
        Ok(self.scratch_mut()?.sets[0].d_normed.view_mut(rows))
    }

    /// `[B, T, d]`: the embeddings' gradient, after a backward pass.
    pub fn d_input(&self, batch: usize) -> Result<D::View<'_, X>> {
        Ok(self.scratch()?.dx.view(batch * self.shape.tokens))
    }

    /// As [`Self::d_input`], for writing.
    pub(crate) fn d_input_mut(&mut self, batch: usize) -> Result<D::ViewMut<'_, X>> {
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

    pub(super) fn lengths(&self, batch: usize) -> Lengths {
        Lengths { batch, queries: self.shape.tokens, keys: self.shape.tokens }
    }
}

pub(super) fn nothing_kept() -> Error {
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
