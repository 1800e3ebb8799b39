//! LM head and softmax cross-entropy together, in chunks of labelled rows, so that
//! logits of a whole batch never exist.
//!
//! `loss[m] = ln Σ_v exp(z[m, v]) − z[m, target[m]]` with `z = x[row[m]] Wᵀ`; the
//! gradient is of `Σ_m weight[m] · loss[m]`.

use crate::error::{expect_at_least, expect_len};
use crate::{Device, Error, Real, Result, View, ViewMut};

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

/// Arguments of [`LmHead::lm_head_loss`].
pub struct LmHeadLoss<'loss, 'dx, 'dw, 'scratch, 'x, 'w, 'rows, 'targets, 'weights, D: Device, X: Real> {
    /// `[M]` `=`, unweighted, in nats.
    pub loss: D::ViewMut<'loss, X::Acc>,
    /// `[T, hidden]` `=` where asked for, zero where there is no label.
    pub dx: Option<D::ViewMut<'dx, X>>,
    /// `[vocab, hidden]` `+=` where asked for.
    pub dw: Option<D::ViewMut<'dw, X::Acc>>,
    /// Room for a chunk of labels.
    pub scratch: LmHeadScratch<'scratch, D, X>,
    /// `[T, hidden]`.
    pub x: D::View<'x, X>,
    /// `[vocab, hidden]`.
    pub w: D::View<'w, X>,
    /// `[M]`: the row of x of each label, strictly increasing.
    pub rows: D::View<'rows, u32>,
    /// `[M]`, below vocab.
    pub targets: D::View<'targets, u32>,
    /// `[M]`: factors of the labels' losses in the gradient.
    pub weights: D::View<'weights, X::Acc>,
    /// Shapes.
    pub dims: LmHeadDims,
}

impl<D: Device, X: Real> LmHeadLoss<'_, '_, '_, '_, '_, '_, '_, '_, '_, D, X> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "lm_head_loss";
        let LmHeadDims { tokens, labels, hidden, vocab, chunk } = self.dims;
        if chunk == 0 || hidden == 0 || vocab == 0 {
            return Err(Error::Unsupported { op: OP, why: format!("a dimension is zero: {:?}", self.dims) });
        }
        expect_len(OP, "loss", self.loss.len(), labels)?;
        expect_len(OP, "x", self.x.len(), tokens * hidden)?;
        expect_len(OP, "w", self.w.len(), vocab * hidden)?;
        expect_len(OP, "rows", self.rows.len(), labels)?;
        expect_len(OP, "targets", self.targets.len(), labels)?;
        expect_len(OP, "weights", self.weights.len(), labels)?;
        expect_at_least(OP, "scratch.logits", self.scratch.logits.len(), chunk * vocab)?;
        expect_at_least(OP, "scratch.rows", self.scratch.rows.len(), chunk * hidden)?;
        expect_at_least(OP, "scratch.d_rows", self.scratch.d_rows.len(), chunk * hidden)?;
        if let Some(dw) = &self.dw {
            expect_len(OP, "dw", dw.len(), vocab * hidden)?;
        }
        match &self.dx {
            Some(dx) => expect_len(OP, "dx", dx.len(), tokens * hidden),
            None => Ok(()),
        }
    }
}

/// LM head with its loss.
pub trait LmHead<X: Real>: Device {
    /// Labels to take at a time where there are enough: W is read once for each chunk, and
    /// logits of a chunk are kept.
    const CHUNK: usize;

    /// Loss per label and, if asked for, gradients.
    fn lm_head_loss(&self, args: LmHeadLoss<Self, X>) -> Result<()>;

    /// `ids[i]` `=` column of the largest value of row i (the first among equals).
    fn argmax(
        &self,
        ids: Self::ViewMut<'_, u32>,
        logits: Self::View<'_, X>,
        rows: usize,
        cols: usize,
    ) -> Result<()>;
}
