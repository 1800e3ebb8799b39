//! [`Mode`]: what a pass is for, which decides what it keeps.

use super::{LayerParams, StatisticsOf};
use crate::lora::{BlockLayout, Projection};

/// What a pass is for.
#[derive(Clone, Copy, Debug)]
pub enum Mode<'a> {
    /// Losses, logits, generation: nothing is kept. With adapters of this layout, or without.
    Inference(Option<&'a BlockLayout>),
    /// Gradients of adapters of this layout; the base is frozen.
    Adapters(&'a BlockLayout),
    /// Gradients of all parameters, without adapters.
    AllParameters,
    /// Gradients of the full weights of some layers, without adapters.
    Layers(&'a LayerParams),
    /// Sums over the products of some layers, without adapters.
    Statistics(&'a StatisticsOf),
}

impl<'a> Mode<'a> {
    /// The adapters' layout.
    pub(super) fn adapters(self) -> Option<&'a BlockLayout> {
        match self {
            Self::Inference(layout) => layout,
            Self::Adapters(layout) => Some(layout),
            Self::AllParameters | Self::Layers(_) | Self::Statistics(_) => None,
        }
    }

    pub(super) fn trains(self) -> bool {
        !matches!(self, Self::Inference(_))
    }

    /// Backward goes through this block; or, for the number of blocks, through what follows them.
    pub(super) fn keeps(self, block: usize) -> bool {
        match self {
            Self::Inference(_) => false,
            Self::Adapters(layout) => block >= layout.first_layer(),
            Self::AllParameters => true,
            Self::Layers(params) => block >= params.layers()[0],
            Self::Statistics(of) => of.layers.first().is_some_and(|first| block >= *first),
        }
    }

    /// Backward reads the input of this product of this block.
    pub(super) fn keeps_input(self, block: usize, fused: Projection) -> bool {
        match self {
            Self::Inference(_) => false,
            Self::Adapters(layout) => !layout.targets(block, fused).is_empty(),
            Self::AllParameters => true,
            Self::Layers(params) => params.layers().contains(&block),
            Self::Statistics(of) => of.layers.contains(&block),
        }
    }
}
