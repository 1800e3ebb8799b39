//! What the parts of a decoder share: in a whole pass ([`Pass`]), in the forward pass of a block ([`BlockPass`]),
//! and in its backward pass ([`BlockBackward`]).

use super::rope::RopeTables;
use super::{AdapterView, BlockConfig, LayerParams, ProductStatistics};
use crate::lora::{BlockLayout, Projection};
use gradtx_kernels::ops::{RmsNormDims, Segments};
use gradtx_kernels::{Buffer, Device, Real, ViewMut};
use gradtx_runtime::Result;
use gradtx_runtime::buffers::Allocator;
use gradtx_runtime::data::DeviceBatch;
use std::ops::Range;

/// Keys and values of earlier tokens, and what a pass does with them.
pub(super) struct Cache<'a, D: Device, X: Real> {
    /// `[L, slots, capacity, kv_heads · D]`
    pub(super) k: &'a mut D::Buf<X>,
    /// As `k`.
    pub(super) v: &'a mut D::Buf<X>,
    /// `[S]` slot of each segment.
    pub(super) slot: D::View<'a, u32>,
    /// Tokens of a slot.
    pub(super) capacity: usize,
    pub(super) slots: usize,
    pub(super) action: CacheAction,
}

/// What a pass does with a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CacheAction {
    /// Segments are whole sequences; their keys and values are stored.
    Fill,
    /// Segments are one token each, after what their slots hold.
    Decode,
}

/// What all steps of one pass share.
pub(super) struct Pass<'a, D: Device, A: Real> {
    pub(super) batch: &'a DeviceBatch<D, A>,
    pub(super) adapters: Option<AdapterView<'a, D, A>>,
    pub(super) segments: Segments<'a, D>,
    /// T
    pub(super) tokens: usize,
    /// Without elements, for passes without adapters.
    no_adapters: D::Buf<A>,
}

impl<'a, D: Device, A: Real> Pass<'a, D, A> {
    pub(super) fn new(batch: &'a DeviceBatch<D, A>, adapters: Option<AdapterView<'a, D, A>>) -> Self {
        let (segments, tokens) = (batch.segments(), batch.used().tokens);
        Self { batch, adapters, segments, tokens, no_adapters: D::Buf::default() }
    }
}

/// What the parts of one block share in a pass.
pub(super) struct BlockPass<'a, 'p, D: Device, X: Real> {
    pub(super) device: &'a D,
    /// The decoder's weights.
    pub(super) values: &'a D::Buf<X>,
    pub(super) rope: &'a RopeTables<D, X::Acc>,
    pub(super) pass: &'a Pass<'p, D, X::Acc>,
    /// Its number.
    pub(super) block: usize,
    /// Shapes of the norms of the residual stream.
    pub(super) norm: RmsNormDims,
    /// Numbers that such a norm keeps of the stream, T or 2 T.
    pub(super) norm_stats: usize,
}

impl<D: Device, X: Real> BlockPass<'_, '_, D, X> {
    /// Part of the weights.
    pub(super) fn weight(&self, range: &Range<usize>) -> D::View<'_, X> {
        self.values.view(range.clone())
    }

    /// The adapters' values; none without adapters.
    pub(super) fn adapters(&self) -> D::View<'_, X::Acc> {
        self.pass.adapters.map_or(self.pass.no_adapters.all(), |adapters| adapters.values.all())
    }

    /// Elements of the residual stream, T · H.
    pub(super) fn stream_len(&self) -> usize {
        self.norm.rows * self.norm.cols
    }
}

/// Gradients on their way through a block, shared by all blocks. Shapes are for a full stream of T tokens.
pub(super) struct BlockGrads<D: Device, X: Real> {
    /// `[T, H]` of the residual stream.
    pub(super) x: D::Buf<X>,
    /// Of any product's input, adapters' part included.
    pub(super) input: D::Buf<X>,
    /// `[T, max(R, 2F, H)]` of a product's output.
    pub(super) proj: D::Buf<X>,
    /// `[T, R]`
    pub(super) qkv: D::Buf<X>,
    /// `[heads, T]`
    pub(super) delta: D::Buf<X::Acc>,
    /// `[T, Σr]` between the factors of a product; empty where all matrices are whole.
    pub(super) between: D::Buf<X>,
}

impl<D: Device, X: Real> BlockGrads<D, X> {
    /// For streams of up to `tokens` tokens, and products whose inputs have at most `input` elements.
    pub(super) fn allocate(
        alloc: &mut Allocator<'_, D>,
        blocks: &[BlockConfig],
        hidden: usize,
        tokens: usize,
        input: usize,
    ) -> Result<Self> {
        let largest = |size: &dyn Fn(&BlockConfig) -> usize| blocks.iter().map(size).max().unwrap_or(0);
        let qkv = largest(&|block| block.attention.qkv_dim());
        let gate_up = largest(&|block| block.mlp.first_dim());
        Ok(Self {
            x: alloc.buffer("d_x", &[tokens, hidden])?,
            input: alloc.buffer("d_input", &[input])?,
            proj: alloc.buffer("d_proj", &[tokens, qkv.max(gate_up).max(hidden)])?,
            qkv: alloc.buffer("d_qkv", &[tokens, qkv])?,
            delta: alloc.buffer("delta", &[largest(&|block| block.attention.heads), tokens])?,
            between: between(alloc, "d_between_factors", blocks, tokens)?,
        })
    }
}

/// Room for what goes between the factors of any product; none where all matrices are whole.
pub(super) fn between<D: Device, X: Real>(
    alloc: &mut Allocator<'_, D>,
    name: &str,
    blocks: &[BlockConfig],
    tokens: usize,
) -> Result<D::Buf<X>> {
    match blocks.iter().map(BlockConfig::factor_columns).max() {
        None | Some(0) => Ok(D::Buf::default()),
        Some(columns) => alloc.buffer(name, &[tokens, columns]),
    }
}

/// The backward pass of one block.
pub(super) struct BlockBackward<'a, 'p, 'g, D: Device, X: Real> {
    pub(super) at: BlockPass<'a, 'p, D, X>,
    pub(super) grads: &'a mut Gradients<'g, D, X::Acc>,
    pub(super) d: &'a mut BlockGrads<D, X>,
}

impl<D: Device, X: Real> BlockBackward<'_, '_, '_, D, X> {
    /// Whether nobody wants a gradient below this product: the first adapted one.
    pub(super) fn ends_at(&self, projection: Projection) -> bool {
        let first = |layout: &BlockLayout| {
            let block = layout.first_layer();
            let is_adapted = |p: &Projection| !layout.targets(block, *p).is_empty();
            Some((block, Projection::ALL.into_iter().find(is_adapted)?))
        };
        self.at.pass.adapters.and_then(|a| first(a.layout)) == Some((self.at.block, projection))
    }
}

/// Which gradients are wanted; they are added to what the buffer holds.
pub enum Gradients<'a, D: Device, A: Real> {
    /// Of adapters, `[rows, L·d]`; a segment names its row.
    Adapters(D::ViewMut<'a, A>),
    /// Of all parameters, in the order of [`super::Decoder::layout`].
    All(D::ViewMut<'a, A>),
    /// Of the parameters of some layers, in the order of [`LayerParams::params`].
    Layers(D::ViewMut<'a, A>, &'a LayerParams),
    /// None, but sums over the products of some layers.
    Statistics(&'a mut ProductStatistics<D, A>),
}

impl<D: Device, A: Real> Gradients<'_, D, A> {
    /// Rows of adapter gradients; empty where there are none.
    pub(super) fn adapter_rows(&mut self) -> D::ViewMut<'_, A> {
        match self {
            Self::Adapters(grads) => grads.reborrow(),
            Self::All(grads) | Self::Layers(grads, _) => grads.reborrow().slice(0..0),
            Self::Statistics(sums) => sums.none(),
        }
    }

    /// The same for the gradients of A: empty where it is frozen too.
    pub(super) fn rows_of_a(&mut self, pass: &Pass<'_, D, A>) -> D::ViewMut<'_, A> {
        let is_frozen = pass.adapters.is_some_and(|adapters| adapters.layout.freezes_a());
        let rows = self.adapter_rows();
        if is_frozen { rows.slice(0..0) } else { rows }
    }

    /// The gradients of two parameters, where parameters are trained; the second one lies behind the first.
    pub(super) fn params(&mut self, [first, second]: [&Range<usize>; 2]) -> Option<[D::ViewMut<'_, A>; 2]> {
        // Between them there may be room for alignment.
        let both = self.param(&(first.start..second.end))?;
        let (of_first, of_second) = both.split_at_mut(second.start - first.start);
        Some([of_first.slice(0..first.len()), of_second])
    }

    /// The gradient of a parameter, where parameters are trained.
    pub(super) fn param(&mut self, range: &Range<usize>) -> Option<D::ViewMut<'_, A>> {
        match self {
            Self::Adapters(_) | Self::Statistics(_) => None,
            Self::All(grads) => Some(grads.reborrow().slice(range.clone())),
            Self::Layers(grads, params) => {
                let place = params.place(range)?;
                Some(grads.reborrow().slice(place))
            }
        }
    }
}
