//! LM head and softmax cross-entropy together, in chunks of labelled rows, so that
//! logits of a whole batch never exist.
//!
//! `loss[m] = ln Σ_v exp(z[m, v]) − z[m, target[m]]` with `z = x[row[m]] Wᵀ`; the
//! gradient is of `Σ_m weight[m] · loss[m]`.

use crate::{Device, Real, Result};

/// Shapes of the LM head.
#[derive(Clone, Copy, Debug)]
pub struct LmHeadDims {
    /// Rows of x, T.
    pub tokens: usize,
    /// Labels, M.
    pub labels: usize,
    /// Columns of x.
    pub hidden: usize,
    /// Rows of W.
    pub vocab: usize,
    /// Labels whose logits are computed at a time.
    pub chunk: usize,
}

/// Scratch of the LM head: `logits` `[chunk, vocab]`, `rows` and `d_rows` `[chunk, hidden]`.
pub struct LmHeadScratch<'a, D: Device, X: Real> {
    /// Logits, then their gradient.
    pub logits: D::ViewMut<'a, X>,
    /// Gathered rows of x.
    pub rows: D::ViewMut<'a, X>,
    /// Their gradient.
    pub d_rows: D::ViewMut<'a, X>,
}

/// LM head with its loss.
pub trait LmHead<X: Real>: Device {
    /// Labels to take at a time where there are enough: W is read once for each chunk, and
    /// logits of a chunk are kept.
    const CHUNK: usize;

    /// Loss per label and, if asked for, gradients.
    ///
    /// `loss` `[M]` `=` (unweighted, nats). `dx` `[T, hidden]` `=` (zero where there is no
    /// label). `dw` `[vocab, hidden]` `+=`. `x` `[T, hidden]`; `rows` `[M]` strictly
    /// increasing; `targets` `[M]` below vocab; `weights` `[M]`.
    fn lm_head_loss(
        &self,
        loss: Self::ViewMut<'_, X::Acc>,
        dx: Option<Self::ViewMut<'_, X>>,
        dw: Option<Self::ViewMut<'_, X::Acc>>,
        scratch: LmHeadScratch<'_, Self, X>,
        x: Self::View<'_, X>,
        w: Self::View<'_, X>,
        rows: Self::View<'_, u32>,
        targets: Self::View<'_, u32>,
        weights: Self::View<'_, X::Acc>,
        dims: LmHeadDims,
    ) -> Result<()>;

    /// `ids[i]` `=` column of the largest value of row i (the first among equals).
    fn argmax(
        &self,
        ids: Self::ViewMut<'_, u32>,
        logits: Self::View<'_, X>,
        rows: usize,
        cols: usize,
    ) -> Result<()>;
}
