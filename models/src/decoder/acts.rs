//! [`Activations`]: every buffer that a pass over a packed stream needs, allocated once.
//!
//! What is kept for backward depends on what is trained. Buffers of a block are kept
//! per block when its backward reads them; otherwise all blocks share one. Frozen
//! products need no input kept, so training q and v adapters keeps neither the MLP's
//! normalised input nor its hidden row.

use super::adapters::lora_dims;
use super::rope::RopeTables;
use super::{AdapterView, Decoder, DecoderConfig};
use crate::lora::{BlockLayout, Projection};
use gradtx_kernels::ops::LmHead;
use gradtx_kernels::{Backend, Buffer, Device, Elem, Real};
use gradtx_runtime::buffers::Allocator;
use gradtx_runtime::data::BatchCapacity;
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use gradtx_runtime::{Error, Result};

/// What a pass is for.
#[derive(Clone, Copy, Debug)]
pub enum Mode<'a> {
    /// Losses, logits, generation: nothing is kept. With adapters of this layout, or without.
    Inference(Option<&'a BlockLayout>),
    /// Gradients of adapters of this layout; the base is frozen.
    Adapters(&'a BlockLayout),
    /// Gradients of all parameters, without adapters.
    AllParameters,
}

impl<'a> Mode<'a> {
    /// The adapters' layout.
    pub(super) fn adapters(self) -> Option<&'a BlockLayout> {
        match self {
            Self::Inference(layout) => layout,
            Self::Adapters(layout) => Some(layout),
            Self::AllParameters => None,
        }
    }

    fn trains(self) -> bool {
        !matches!(self, Self::Inference(_))
    }

    /// Backward reads the input of this product.
    pub(super) fn keeps_input(self, fused: Projection) -> bool {
        match self {
            Self::Inference(_) => false,
            Self::Adapters(layout) => !layout.targets(0, fused).is_empty(),
            Self::AllParameters => true,
        }
    }
}

/// A buffer of every block: one for each, or one that they share.
pub(super) struct PerBlock<D: Device, T: Elem> {
    buf: D::Buf<T>,
    /// Elements that a block has room for.
    room: usize,
    shared: bool,
}

impl<D: Device, T: Elem> PerBlock<D, T> {
    /// One part of this shape for each of so many blocks, or one that they share.
    fn allocate(
        alloc: &mut Allocator<'_, D>,
        name: &str,
        kept: Option<usize>,
        shape: &[usize],
    ) -> Result<Self> {
        let buf = match kept {
            Some(blocks @ 2..) => alloc.buffer(name, &[&[blocks], shape].concat())?,
            _ => alloc.buffer(name, shape)?,
        };
        Ok(Self { buf, room: shape.iter().product(), shared: kept.is_none() })
    }

    fn start(&self, block: usize) -> usize {
        if self.shared { 0 } else { block * self.room }
    }

    /// The first `len` elements of a block's part.
    pub(super) fn get(&self, block: usize, len: usize) -> D::View<'_, T> {
        let start = self.start(block);
        self.buf.view(start..start + len)
    }

    /// The same for writing.
    pub(super) fn get_mut(&mut self, block: usize, len: usize) -> D::ViewMut<'_, T> {
        let start = self.start(block);
        self.buf.view_mut(start..start + len)
    }
}

/// Labels of a chunk of the head.
fn head_chunk<D: LmHead<X>, X: Real>(room: BatchCapacity) -> usize {
    room.labels.clamp(1, D::CHUNK)
}

/// Buffers of a forward and backward pass. Shapes are for a full stream of T tokens.
pub struct Activations<D: Device, X: Real> {
    pub(super) capacity: BatchCapacity,
    pub(super) trains: bool,
    /// Hash of the adapters' layout, if there are adapters.
    pub(super) layout: Option<String>,
    /// `[L + 1][T, H]` residual stream before each block, and after the last.
    pub(super) x: PerBlock<D, X>,
    /// `[L][adapter input]` of q/k/v, o, gate/up and down.
    pub(super) inputs: [PerBlock<D, X>; 4],
    /// `[L][T]` of the two norms of a block.
    pub(super) inv_rms: [PerBlock<D, X::Acc>; 2],
    /// `[L][T, R]`; rotated in place, or before the q/k norm where there is one.
    pub(super) qkv: PerBlock<D, X>,
    /// `[L][T, R]` normalised and rotated, where there is a q/k norm.
    pub(super) qkv_normed: PerBlock<D, X>,
    /// `[L][T, heads + kv_heads]`
    pub(super) qk_inv_rms: PerBlock<D, X::Acc>,
    /// `[L][heads, T]`
    pub(super) lse: PerBlock<D, X::Acc>,
    /// `[L][T, H]` residual stream between attention and MLP.
    pub(super) x_mid: PerBlock<D, X>,
    /// `[L][T, 2F]`
    pub(super) gate_up: PerBlock<D, X>,
    /// `[T, H]` after the final norm.
    pub(super) last: D::Buf<X>,
    /// `[T]`
    pub(super) last_inv_rms: D::Buf<X::Acc>,
    /// `[chunk, V]`
    pub(super) head_logits: D::Buf<X>,
    /// `[2][chunk, H]`
    pub(super) head_rows: D::Buf<X>,
    /// `[M]`
    pub(super) losses: D::Buf<X::Acc>,
    /// `[T, H]` gradient of the residual stream.
    pub(super) d_x: D::Buf<X>,
    /// The largest adapter input, for gradients of any.
    pub(super) d_input: D::Buf<X>,
    /// `[T, max(R, 2F, H)]` gradient of a product's output.
    pub(super) d_proj: D::Buf<X>,
    /// `[T, R]`
    pub(super) d_qkv: D::Buf<X>,
    /// `[heads, T]`
    pub(super) delta: D::Buf<X::Acc>,
    pub(super) rope: RopeTables<D, X::Acc>,
    /// What passes without adapters lend in an adapter's place.
    pub(super) nothing: D::Buf<X::Acc>,
    pub(super) chunk: usize,
    pub(super) labels: usize,
}

impl<D: Backend<X>, X: Real> Activations<D, X> {
    /// Buffers for streams up to `capacity`, for this decoder in this mode.
    pub fn new(decoder: &Decoder<D, X>, capacity: BatchCapacity, mode: Mode<'_>) -> Result<Self> {
        let mut alloc = Allocator::new(&decoder.device, Purpose::Activations);
        Self::allocate(&mut alloc, &decoder.config, capacity, mode, capacity.tokens)
    }

    /// The buffers that [`Self::new`] takes.
    pub fn plan(config: &DecoderConfig, capacity: BatchCapacity, mode: Mode<'_>) -> MemoryPlan {
        Allocator::plan_sizes(Purpose::Activations, |alloc| {
            Self::allocate(alloc, config, capacity, mode, capacity.tokens)
        })
    }

    /// The same with an allocator, where positions may go beyond the length of a stream (decoding on a cache).
    pub(crate) fn allocate(
        alloc: &mut Allocator<'_, D>,
        config: &DecoderConfig,
        room: BatchCapacity,
        mode: Mode<'_>,
        positions: usize,
    ) -> Result<Self> {
        let (t, trains) = (room.tokens, mode.trains());
        let (h, r, f) = (config.hidden, config.qkv_dim(), config.intermediate);
        let dims = |fused| lora_dims(config, mode.adapters(), 0.0, 0, fused, t);
        let input_len = |fused| D::lora_input_len(&dims(fused));
        let kept = |is_kept: bool| is_kept.then_some(config.layers);
        let all = kept(trains);
        // o is read by attention's own backward, whether o_proj is adapted or not.
        let keeps = |fused| kept(mode.keeps_input(fused) || (trains && fused == Projection::O));
        let mut input = |name, fused| PerBlock::allocate(alloc, name, keeps(fused), &[input_len(fused)]);
        let inputs = [
            input("qkv_input", Projection::Qkv)?,
            input("o_input", Projection::O)?,
            input("gate_up_input", Projection::GateUp)?,
            input("down_input", Projection::Down)?,
        ];
        let (normed, norms) = match config.family.qk_norm() {
            true => (r, config.heads + config.kv_heads),
            false => (0, 0),
        };
        // One more than blocks: the input of each, and the output of the last.
        let x = PerBlock::allocate(alloc, "x", all.map(|blocks| blocks + 1), &[t, h])?;
        let mut inv_rms = |name| PerBlock::allocate(alloc, name, all, &[t]);
        let inv_rms = [inv_rms("attention_inv_rms")?, inv_rms("mlp_inv_rms")?];
        let qkv = PerBlock::allocate(alloc, "qkv", all, &[t, r])?;
        let qkv_normed = PerBlock::allocate(alloc, "qkv_normed", all, &[t, normed])?;
        let qk_inv_rms = PerBlock::allocate(alloc, "qk_inv_rms", all, &[t, norms])?;
        let lse = PerBlock::allocate(alloc, "lse", all, &[config.heads, t])?;
        let x_mid = PerBlock::allocate(alloc, "x_mid", all, &[t, h])?;
        let gate_up = PerBlock::allocate(alloc, "gate_up", all, &[t, 2 * f])?;
        let before = alloc.set_purpose(Purpose::Scratch);
        let chunk = head_chunk::<D, X>(room);
        let rows = t.max(chunk);
        let t_if = if trains { t } else { 0 };
        let widest = if trains { Projection::ALL.map(input_len).into_iter().max().unwrap_or(0) } else { 0 };
        let rope = (config.rope_theta, config.rope_scaling);
        let acts = Self {
            capacity: room,
            trains,
            layout: mode.adapters().map(BlockLayout::hash),
            x,
            inputs,
            inv_rms,
            qkv,
            qkv_normed,
            qk_inv_rms,
            lse,
            x_mid,
            gate_up,
            last: alloc.buffer("final", &[rows, h])?,
            last_inv_rms: alloc.buffer("final_inv_rms", &[rows])?,
            head_logits: alloc.buffer("head_logits", &[chunk, config.vocab])?,
            head_rows: alloc.buffer("head_rows", &[2, chunk, h])?,
            losses: alloc.buffer("losses", &[room.labels])?,
            d_x: alloc.buffer("d_x", &[t_if, h])?,
            d_input: alloc.buffer("d_input", &[widest])?,
            d_proj: alloc.buffer("d_proj", &[t_if, r.max(2 * f).max(h)])?,
            d_qkv: alloc.buffer("d_qkv", &[t_if, r])?,
            delta: alloc.buffer("delta", &[config.heads, t_if])?,
            rope: RopeTables::allocate(alloc, config.head_dim, rope, positions)?,
            nothing: D::Buf::default(),
            chunk,
            labels: 0,
        };
        if trains {
            let scratch = Projection::ALL.map(|fused| D::lora_scratch(&dims(fused), room.segments));
            alloc.operation_scratch("sums of adapters", scratch.into_iter().max().unwrap_or(0));
        }
        alloc.set_purpose(before);
        Ok(acts)
    }

    /// Loss of every label of the last stream, `[M]`, in nats and unweighted.
    pub fn losses(&self) -> D::View<'_, X::Acc> {
        self.losses.view(0..self.labels)
    }

    /// Fails unless this stream, and adapters of this layout, have a place in these buffers.
    pub(super) fn check(
        &self,
        used: BatchCapacity,
        adapters: Option<&AdapterView<'_, D, X::Acc>>,
    ) -> Result<()> {
        let room = self.capacity;
        if used.tokens > room.tokens || used.labels > room.labels {
            let why = format!("it has {used:?}, the activations have room for {room:?}");
            return Err(Error::invalid("packed stream", why));
        }
        match (&self.layout, adapters.map(|a| a.layout.hash())) {
            (_, None) => Ok(()),
            (Some(here), Some(given)) if *here == given => Ok(()),
            (here, Some(given)) => Err(Error::invalid(
                "adapters of a pass",
                format!("their layout is {given}, the activations were allocated for {here:?}"),
            )),
        }
    }
}
