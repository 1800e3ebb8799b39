//! [`Scratch`]: gradients of activations on their way through a stack.
//!
//! Shapes: B examples, T positions each, R = B·T rows; K positions of the memory; d model width, I = H·D width of
//! all heads, F hidden width.

use super::T5Config;
use gradtx_kernels::{Device, Real};
use gradtx_runtime::Result;
use gradtx_runtime::buffers::{Allocator, Rows};

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

/// Gradients of activations, shared by all sublayers.
pub(super) struct Scratch<D: Device, X: Real> {
    /// `[R, d]`, of the residual stream where backward has arrived.
    pub(super) dx: Rows<D, X>,
    /// What gradients of weights are computed from: sublayers use the two in turns.
    pub(super) sets: [ScratchSet<D, X>; 2],
    /// `[R, I]`
    pub(super) d_o: Rows<D, X>,
    /// `[B, H·T·max(T, K)]`
    pub(super) d_scores: Rows<D, X>,
    /// `[R, F]`
    pub(super) d_hidden: Rows<D, X>,
    /// `[B·K, d]`
    pub(super) d_memory: Rows<D, X>,
}

/// The part of [`Scratch`] that gradients of weights are computed from.
pub(super) struct ScratchSet<D: Device, X: Real> {
    /// `[R, d]`, of a branch's output before its dropout.
    pub(super) d_branch: Rows<D, X>,
    /// `[R, d]`, of a norm; in the first set also of the stack's output.
    pub(super) d_normed: Rows<D, X>,
    /// `[R, I]`
    pub(super) dq: Rows<D, X>,
    /// `[max(R, B·K), 2I]`
    pub(super) dkv: Rows<D, X>,
    /// `[R, 2F]`
    pub(super) d_gate_up: Rows<D, X>,
}

impl<D: Device, X: Real> Scratch<D, X> {
    pub(super) fn new(
        alloc: &mut Allocator<'_, D>,
        name: &str,
        config: &T5Config,
        shape: StackShape,
    ) -> Result<Self> {
        let (d, inner, f) = (config.d_model, config.inner(), config.d_ff);
        let StackShape { batch, tokens, memory } = shape;
        let (rows, widest) = (batch * tokens, tokens.max(memory));
        let mut rows_of = |part: &str, rows, cols| alloc.rows(format!("{name}.{part}"), rows, cols);
        let set = |rows_of: &mut dyn FnMut(&str, usize, usize) -> Result<Rows<D, X>>| -> Result<_> {
            Ok(ScratchSet {
                d_branch: rows_of("d_branch", rows, d)?,
                d_normed: rows_of("d_normed", rows, d)?,
                dq: rows_of("dq", rows, inner)?,
                dkv: rows_of("dkv", batch * widest, 2 * inner)?,
                d_gate_up: rows_of("d_gate_up", rows, 2 * f)?,
            })
        };
        Ok(Self {
            dx: rows_of("dx", rows, d)?,
            sets: [set(&mut rows_of)?, set(&mut rows_of)?],
            d_o: rows_of("d_o", rows, inner)?,
            d_scores: rows_of("d_scores", batch, config.num_heads * tokens * widest)?,
            d_hidden: rows_of("d_hidden", rows, f)?,
            d_memory: rows_of("d_memory", batch * memory, d)?,
        })
    }
}
