//! [`Mode`]: what a pass is for, which decides what it keeps.

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

    pub(super) fn trains(self) -> bool {
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
