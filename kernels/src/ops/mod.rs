//! The operations: one file each, with the contract that every device keeps.
//!
//! Conventions. Output views come first, inputs next, a dims struct last. An operation with more than
//! four arguments takes them as one struct of named fields, whose `check` is what all devices check.
//! (Each view in it has a lifetime of its own: those of an unknown device do not shorten.) An
//! operation never allocates and never returns tensors. Its text states for every
//! output whether it is assigned (`=`) or added to (`+=`). Forward and backward
//! stand side by side, and one trait holds both, so that an operation without a
//! backward does not compile. Matrices are row-major; "stride" is the distance
//! between rows in elements.
//!
//! `X` is the type of activations and frozen weights; sums, statistics, losses,
//! trainable values and their gradients are `X::Acc` (f32 whatever `X` is; see
//! [`Real::Acc`]).
//!
//! The packed token stream. A batch is one stream of `T` tokens without padding,
//! cut into segments; a segment is one example. [`Segments`] gives for each where
//! it begins, which adapter it uses, into which gradient row it is summed, and the
//! key of its random numbers. Attention never crosses a segment.

mod activation;
mod adamw;
mod attention;
mod dropout;
mod elementwise;
mod embedding;
mod gemm;
mod layernorm;
mod linear;
mod lm_head;
mod lora;
mod mse;
mod relu;
mod residual;
mod rmsnorm;
mod rope;
mod t5_attention;

pub use activation::{GatedActivation, GatedDims, GatedDropoutBackward, GatedDropoutForward, GatedKind};
pub use adamw::{AdamW, AdamWCast, AdamWStep, AdamWUpdate};
pub use attention::{
    Attention, AttentionBackward, AttentionDecode, AttentionDims, AttentionForward, CacheStore, DecodeDims,
};
pub use dropout::{Dropout, DropoutDims};
pub use elementwise::{Cast, Elementwise, RandomRows, StridedRows};
pub use embedding::Embedding;
pub use gemm::{Gemm, GemmDims};
pub use layernorm::{LayerNorm, LayerNormBackward, LayerNormForward};
pub use linear::{Linear, LinearBackwardInput, LinearBackwardWeight, LinearDims, LinearForward};
pub use lm_head::{LmHead, LmHeadDims, LmHeadLoss, LmHeadScratch};
pub use lora::{
    DROPOUT_STREAM, LoraDims, LoraDownBackward, LoraLinear, LoraLinearBackward, LoraLinearForward,
    LoraTarget, RmsNormLoraBackward, RmsNormLoraForward,
};
pub use mse::{Mse, MseDims, SquaredError};
pub use relu::{Relu, ReluDims};
pub use residual::{ResidualNorm, ResidualNormBackward, ResidualNormDims, ResidualNormForward};
pub use rmsnorm::{RmsNorm, RmsNormBackward, RmsNormBackwardWeight, RmsNormDims, RmsNormForward};
pub use rope::{QkNorm, QkNormBackward, QkNormForward, QkvDims, Rope, RopeBackward, RopeForward};
pub use t5_attention::{BucketMap, T5Attention, T5AttentionBackward, T5AttentionDims, T5AttentionForward};

use crate::{AsyncCopy, Collective, Device, GraphCapture, Queues, Real};

/// Whether an operation assigns its output or adds to it, where its contract leaves the choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Out {
    /// `out = …`
    Assign,
    /// `out += …`
    Add,
}

/// The segments of a packed stream, as views. `S` segments, `T` tokens.
pub struct Segments<'a, D: Device> {
    /// `[S + 1]`: first token of each segment, then `T`. Strictly increasing from 0.
    pub offsets: D::View<'a, u32>,
    /// `[S]`: the adapter of each segment, a row of the adapter matrix.
    pub adapter: D::View<'a, u32>,
    /// `[S]`: the row of the gradient matrix that the segment is summed into.
    pub grad_row: D::View<'a, u32>,
    /// `[S]`: key of each segment's random numbers.
    pub keys: D::View<'a, u64>,
    /// Number of segments, `S`.
    pub count: usize,
}

impl<D: Device> Clone for Segments<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for Segments<'_, D> {}

/// A trait that is nothing but the sum of others, which are named once.
macro_rules! sum_of_traits {
    ($(#[$doc:meta])* $name:ident<$X:ident>: $($bounds:tt)+) => {
        $(#[$doc])*
        pub trait $name<$X: Real>: $($bounds)+ {}
        impl<$X: Real, D: $($bounds)+> $name<$X> for D {}
    };
}

sum_of_traits! {
/// Every operation that the models need, in one type `X`; what goes on beside them; and what ranks need to train together.
Backend<X>:
    Collective
    + AsyncCopy
    + Queues
    + GraphCapture
    + Gemm<X>
    + Linear<X>
    + LoraLinear<X>
    + RmsNorm<X>
    + LayerNorm<X>
    + ResidualNorm<X>
    + Rope<X>
    + QkNorm<X>
    + Attention<X>
    + T5Attention<X>
    + GatedActivation<X>
    + Relu<X>
    + Dropout<X>
    + Embedding<X>
    + LmHead<X>
    + Mse<X>
    + Elementwise<X>
    + Elementwise<X::Acc>
    + Gemm<X::Acc>
    + AdamW<X::Acc>
    + AdamWCast<X>
    + Cast<X, X::Acc>
    + Cast<X::Acc, X>
}
