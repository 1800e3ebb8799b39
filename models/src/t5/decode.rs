//! Decoding position by position: keys and values of what was decoded are kept.
//!
//! [`Stack::start_decoding`] computes the cross-attention's keys and values of all
//! blocks once from the encoder's output; then each [`Stack::decode_step`] takes the
//! embedding of one position per example and leaves the stack's output for it. No
//! dropout: decoding is not training.
//!
//! Shapes: B examples, C positions at most, K positions of the memory, d model width,
//! I = H·D width of all heads.

use super::acts::{Keep, StackActs, pair_mut};
use super::attention::Lengths;
use super::pass::Pass;
use super::scratch::StackShape;
use super::stack::{Side, Stack};
use gradtx_kernels::ops::{Backend, Gemm, GemmDims, LinearDims, LinearForward};
use gradtx_kernels::{Device, Real};
use gradtx_runtime::buffers::{Allocator, Rows};
use gradtx_runtime::plan::Purpose;
use gradtx_runtime::{Error, Result};

/// Keys, values and one position's activations of a decoder.
pub struct DecodeCache<D: Device, X: Real> {
    /// Per block `[B, C, 2I]`: keys and values of decoded positions.
    own_kv: Vec<Rows<D, X>>,
    /// Per block `[B·K, 2I]`: keys and values of the memory.
    memory_kv: Vec<Rows<D, X>>,
    /// One position per example.
    acts: StackActs<D, X>,
    /// Positions at most, C.
    capacity: usize,
    /// Positions of the memory, K.
    memory: usize,
    /// Positions decoded so far.
    position: usize,
}

impl<D: Device, X: Real> DecodeCache<D, X> {
    /// Takes memory for decoding `shape.tokens` positions of `shape.batch` examples.
    pub fn new(dev: &D, stack: &Stack, shape: StackShape) -> Result<Self> {
        Self::allocate(&mut Allocator::new(dev, Purpose::Activations), stack, shape)
    }

    pub(crate) fn allocate(alloc: &mut Allocator<'_, D>, stack: &Stack, shape: StackShape) -> Result<Self> {
        let StackShape { batch, tokens: capacity, memory } = shape;
        let width = 2 * stack.config.inner();
        let blocks = stack.blocks.len();
        let before = alloc.set_purpose(Purpose::Cache);
        let mut kept = |name: &str, rows: usize, cols: usize| -> Result<Vec<Rows<D, X>>> {
            (0..blocks).map(|_| alloc.rows(format!("decoder.{name}"), rows, cols)).collect()
        };
        let own_kv = kept("cache", batch, capacity * width)?;
        let memory_kv = kept("memory_cache", batch * memory, width)?;
        alloc.set_purpose(before);
        let one = StackShape { batch, tokens: 1, memory };
        let acts = StackActs::allocate_attending(alloc, stack, one, Keep::Nothing, capacity, true)?;
        Ok(Self { own_kv, memory_kv, acts, capacity, memory, position: 0 })
    }

    /// `[B, d]`: where the caller writes the embeddings of the next position.
    pub fn input_mut(&mut self, batch: usize) -> D::ViewMut<'_, X> {
        self.acts.input_mut(batch)
    }

    /// Goes on at a position, behind those that were decoded before it.
    pub(crate) fn seek(&mut self, position: usize) {
        self.position = position;
    }

    /// `[B, d]`: the output at the position decoded last.
    pub fn output(&self, batch: usize) -> D::View<'_, X> {
        self.acts.output(batch)
    }
}

impl Stack {
    /// Begins a new sequence for every example, attending to the encoder's output.
    pub fn start_decoding<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        cache: &mut DecodeCache<D, X>,
        memory: &StackActs<D, X>,
    ) -> Result<()> {
        let rows = pass.batch * cache.memory;
        let room = cache.acts.capacity();
        if self.side != Side::Decoder || pass.batch > room || memory.tokens() != cache.memory {
            let why = format!(
                "{} examples on a memory of {} positions, where {room} on {} have room",
                pass.batch,
                memory.tokens(),
                cache.memory
            );
            return Err(Error::invalid("decoding with a T5", why));
        }
        let dims = LinearDims::new(rows, self.config.d_model, 2 * self.config.inner());
        for (block, kv) in self.blocks.iter().zip(&mut cache.memory_kv) {
            if let Some(cross) = &block.cross_attention {
                let weight = pass.weight(cross.kv_range());
                let source = memory.output(pass.batch);
                pass.dev.linear_forward(LinearForward {
                    y: kv.view_mut(rows),
                    x: source,
                    w: weight,
                    bias: None,
                    residual: None,
                    dims,
                })?;
            }
        }
        cache.position = 0;
        Ok(())
    }

    /// Decodes one more position, of which the cache's input holds the embeddings. Returns
    /// its index.
    pub fn decode_step<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        cache: &mut DecodeCache<D, X>,
    ) -> Result<usize> {
        let position = cache.position;
        if position == cache.capacity {
            return Err(Error::invalid("decoding with a T5", format!("all {position} positions are used")));
        }
        self.first_norm(pass, &mut cache.acts)?;
        let mut s = 0;
        for b in 0..self.blocks.len() {
            self.decode_self_attention(pass, cache, b, s)?;
            s += 1;
            if self.blocks[b].cross_attention.is_some() {
                self.decode_cross_attention(pass, cache, b, s)?;
                s += 1;
            }
            self.feed_forward(pass, &mut cache.acts, b, s)?;
            s += 1;
        }
        cache.position += 1;
        Ok(position)
    }

    fn decode_self_attention<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        cache: &mut DecodeCache<D, X>,
        b: usize,
        s: usize,
    ) -> Result<()> {
        let (config, batch, position) = (&self.config, pass.batch, cache.position);
        let (width, capacity) = (2 * config.inner(), cache.capacity);
        let attention = &self.blocks[b].self_attention;
        let StackActs { stream, self_attention, cross_attention, feed_forward, map, .. } = &mut cache.acts;
        let (x, out) = pair_mut(stream, s % 2, (s + 1) % 2);
        let own = &mut self_attention[0];
        attention.query(pass, config, batch, own)?;
        // Row i of the product is example i's place in the cache: the rows lie far apart.
        let end = ((batch - 1) * capacity + position + 1) * width;
        let dims = GemmDims {
            c_stride: capacity * width,
            ..GemmDims::new(batch, width, config.d_model, false, true)
        };
        let kv = &mut cache.own_kv[b];
        let place = kv.part_mut(position * width, end - position * width);
        let weight = pass.weight(attention.kv_range());
        <D as Gemm<X>>::gemm(pass.dev, place, own.normed(batch), weight, dims)?;
        let row = map.part(position * capacity, position + 1);
        let lens = Lengths { batch, queries: 1, keys: position + 1 };
        let (x, out, kv) = (x.view(batch), out.view_mut(batch), kv.view(batch));
        let bias = Some(self.bias(pass, row));
        let next = self.norm_after_self_attention(b, cross_attention, feed_forward, batch);
        attention.attend_cache(pass, config, (lens, capacity), own, out, x, kv, bias, next)
    }

    fn decode_cross_attention<D: Backend<X>, X: Real>(
        &self,
        pass: &Pass<'_, D, X>,
        cache: &mut DecodeCache<D, X>,
        b: usize,
        s: usize,
    ) -> Result<()> {
        let (config, batch, keys) = (&self.config, pass.batch, cache.memory);
        let block = &self.blocks[b];
        let Some(attention) = &block.cross_attention else { return Ok(()) };
        let StackActs { stream, cross_attention, feed_forward, .. } = &mut cache.acts;
        let (x, out) = pair_mut(stream, s % 2, (s + 1) % 2);
        let own = &mut cross_attention[0];
        attention.query(pass, config, batch, own)?;
        let lens = Lengths { batch, queries: 1, keys };
        let (x, out) = (x.view(batch), out.view_mut(batch));
        let kv = cache.memory_kv[b].view(batch * keys);
        let next = block.feed_forward.norm_out(config, &mut feed_forward[0], batch);
        attention.attend_cache(pass, config, (lens, keys), own, out, x, kv, None, next)
    }
}
