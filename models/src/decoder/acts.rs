//! [`Activations`]: every buffer that a pass over a packed stream needs, allocated once.
//!
//! What is kept for backward depends on what is trained. Buffers of a block are kept
//! per block when its backward reads them; otherwise all blocks share one. Frozen
//! products need no input kept, so training q and v adapters keeps neither the MLP's
//! normalised input nor its hidden row. Blocks below the first adapted one keep nothing.

use super::attention::AttentionActs;
use super::mlp::MlpActs;
use super::pass::{BlockGrads, between};
use super::per_block::PerBlock;
use super::product::ProductInputs;
use super::rope::RopeTables;
use super::{AdapterView, Decoder, DecoderConfig, Mode, StatisticsOf};
use crate::lora::{BlockLayout, Projection};
use gradtx_kernels::ops::LmHead;
use gradtx_kernels::{Backend, Buffer, Device, Real};
use gradtx_runtime::buffers::Allocator;
use gradtx_runtime::data::BatchCapacity;
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use gradtx_runtime::{Error, Result};

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
    /// The layers whose full weights they train, if they are for such.
    pub(super) layers: Vec<usize>,
    /// The layers whose products' sums they are for, if they are for such.
    pub(super) statistics: Option<StatisticsOf>,
    /// `[L + 1][T, H]` residual stream before each block, and after the last.
    pub(super) x: PerBlock<D, X>,
    /// `[L][T, H]` residual stream between attention and MLP.
    pub(super) x_mid: PerBlock<D, X>,
    pub(super) attention: AttentionActs<D, X>,
    pub(super) mlp: MlpActs<D, X>,
    /// `[T, H]` after the final norm.
    pub(super) last: D::Buf<X>,
    /// `[T]` or `[2, T]` of the final norm.
    pub(super) last_norm_stats: D::Buf<X::Acc>,
    /// `[chunk, V]`
    pub(super) head_logits: D::Buf<X>,
    /// `[2][chunk, H]`
    pub(super) head_rows: D::Buf<X>,
    /// `[M]`
    pub(super) losses: D::Buf<X::Acc>,
    /// `[T, Σr]` between the factors of a product; empty where all matrices are whole.
    pub(super) between: D::Buf<X>,
    /// Empty unless something is trained.
    pub(super) d: BlockGrads<D, X>,
    pub(super) rope: RopeTables<D, X::Acc>,
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
        let (t, trains, hidden) = (room.tokens, mode.trains(), config.hidden);
        let blocks = config.blocks();
        let inputs = ProductInputs { mode, tokens: t };
        let keeps = |block| mode.keeps(block);
        // The input of each block, and the output of the last.
        let x = PerBlock::allocate(alloc, "x", keeps, vec![vec![t, hidden]; blocks.len() + 1])?;
        let x_mid = PerBlock::allocate(alloc, "x_mid", keeps, vec![vec![t, hidden]; blocks.len()])?;
        let attention = AttentionActs::allocate(alloc, &blocks, t, &inputs)?;
        let mlp = MlpActs::allocate(alloc, &blocks, t, &inputs)?;
        let before = alloc.set_purpose(Purpose::Scratch);
        let of_block = |block: (usize, _)| Projection::ALL.map(|product| (block, product));
        let products = || blocks.iter().enumerate().flat_map(of_block);
        let d = match trains {
            true => {
                let widest = products().map(|(block, product)| inputs.len_of::<D, X>(block, product)).max();
                BlockGrads::allocate(alloc, &blocks, hidden, t, widest.unwrap_or(0))?
            }
            false => BlockGrads::allocate(alloc, &[], 0, 0, 0)?,
        };
        let chunk = head_chunk::<D, X>(room);
        let rows = t.max(chunk);
        let acts = Self {
            capacity: room,
            trains,
            layout: mode.adapters().map(BlockLayout::hash),
            layers: match mode {
                Mode::Layers(params) => params.layers().to_vec(),
                _ => vec![],
            },
            statistics: match mode {
                Mode::Statistics(of) => Some(of.clone()),
                _ => None,
            },
            x,
            x_mid,
            attention,
            mlp,
            last: alloc.buffer("final", &[rows, hidden])?,
            last_norm_stats: alloc.buffer("final_inv_rms", &[config.block().norm.statistics() * rows])?,
            head_logits: alloc.buffer("head_logits", &[chunk, config.vocab])?,
            head_rows: alloc.buffer("head_rows", &[2, chunk, hidden])?,
            losses: alloc.buffer("losses", &[room.labels])?,
            between: between(alloc, "between_factors", &blocks, t)?,
            d,
            rope: RopeTables::allocate(alloc, config.rotation(), positions)?,
            chunk,
            labels: 0,
        };
        if trains {
            let bytes =
                products().map(|(block, product)| inputs.scratch::<D, X>(block, product, room.segments));
            alloc.operation_scratch("sums of adapters", bytes.max().unwrap_or(0));
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
