//! AdamW and global-norm clipping over flat buffers, without a round trip to the host.
//!
//! A buffer is `[rows, len]`: each row is one model or adapter, clipped on its own.
//! With step number t ≥ 1 (decoupled weight decay, Loshchilov & Hutter 2019):
//!
//! ```text
//! g ← clip · g;  m ← β₁ m + (1−β₁) g;  v ← β₂ v + (1−β₂) g²
//! p ← p (1 − lr·wd) − lr · (m / (1−β₁ᵗ)) / (√(v / (1−β₂ᵗ)) + ε)
//! ```

use crate::error::expect_len;
use crate::{Device, Error, Real, Result, View, ViewMut};

/// Numbers of one AdamW step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate of this step.
    pub lr: f64,
    /// β₁.
    pub beta1: f64,
    /// β₂.
    pub beta2: f64,
    /// ε.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// t, counted from 1.
    pub step: u32,
}

/// Arguments of [`AdamW::adamw`].
pub struct AdamWUpdate<'p, 'm, 'v, 'g, 'scale, D: Device, A: Real> {
    /// `[rows, len]`, updated in place.
    pub p: D::ViewMut<'p, A>,
    /// `[rows, len]`, the first moment, updated in place.
    pub m: D::ViewMut<'m, A>,
    /// `[rows, len]`, the second moment, updated in place.
    pub v: D::ViewMut<'v, A>,
    /// `[rows, len]`.
    pub g: D::View<'g, A>,
    /// `[rows]`: factors of the gradients.
    pub scale: D::View<'scale, A>,
    /// Models or adapters.
    pub rows: usize,
    /// Values of each.
    pub len: usize,
    /// Numbers of this step.
    pub step: AdamWStep,
}

impl<D: Device, A: Real> AdamWUpdate<'_, '_, '_, '_, '_, D, A> {
    /// Fails unless all views have the lengths that `dims` asks for.
    pub(crate) fn check(&self) -> Result<()> {
        const OP: &str = "adamw";
        let lengths = [("p", self.p.len()), ("m", self.m.len()), ("v", self.v.len()), ("g", self.g.len())];
        for (what, found) in lengths {
            expect_len(OP, what, found, self.rows * self.len)?;
        }
        expect_len(OP, "scale", self.scale.len(), self.rows)?;
        if self.step.step == 0 {
            return Err(Error::Unsupported { op: OP, why: "steps are counted from 1".into() });
        }
        Ok(())
    }
}

/// AdamW over accumulators.
pub trait AdamW<A: Real>: Device {
    /// `sums` `[rows]` `= Σ g²` of each row of `g` `[rows, len]`.
    fn sum_squares(
        &self,
        sums: Self::ViewMut<'_, A>,
        g: Self::View<'_, A>,
        rows: usize,
        len: usize,
    ) -> Result<()>;

    /// `scale[i] = min(1, max_norm / (√sums[i] + 1e-6))`, as in PyTorch's `clip_grad_norm_`; NaN where
    /// `sums[i]` is not finite. An infinite `max_norm` clips nothing.
    fn clip_scale(
        &self,
        scale: Self::ViewMut<'_, A>,
        sums: Self::View<'_, A>,
        rows: usize,
        max_norm: f64,
    ) -> Result<()>;

    /// One step: `p`, `m`, `v` `[rows, len]` updated in place; `scale` `[rows]` multiplies g. If one of
    /// the scales is not finite nothing is changed, so that the host need not wait for norms first.
    fn adamw(&self, args: AdamWUpdate<Self, A>) -> Result<()>;
}

/// AdamW over accumulators that are the masters of values in `X`.
pub trait AdamWCast<X: Real>: AdamW<X::Acc> {
    /// [`AdamW::adamw`], and in the same pass `y = p`, rounded to X. Without a step `y` is not touched either.
    fn adamw_cast(&self, y: Self::ViewMut<'_, X>, args: AdamWUpdate<Self, X::Acc>) -> Result<()>;
}
