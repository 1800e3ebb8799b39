//! AdamW and global-norm clipping over flat buffers, without a round trip to the host.
//!
//! A buffer is `[rows, len]`: each row is one model or adapter, clipped on its own.
//! With step number t ≥ 1 (decoupled weight decay, Loshchilov & Hutter 2019):
//!
//! ```text
//! g ← clip · g;  m ← β₁ m + (1−β₁) g;  v ← β₂ v + (1−β₂) g²
//! p ← p (1 − lr·wd) − lr · (m / (1−β₁ᵗ)) / (√(v / (1−β₂ᵗ)) + ε)
//! ```

use crate::{Device, Real, Result};

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
    fn adamw(
        &self,
        p: Self::ViewMut<'_, A>,
        m: Self::ViewMut<'_, A>,
        v: Self::ViewMut<'_, A>,
        g: Self::View<'_, A>,
        scale: Self::View<'_, A>,
        rows: usize,
        len: usize,
        step: AdamWStep,
    ) -> Result<()>;
}

/// AdamW over accumulators that are the masters of values in `X`.
pub trait AdamWCast<X: Real>: AdamW<X::Acc> {
    /// [`AdamW::adamw`], and in the same pass `y = p`, rounded to X. Without a step `y` is not touched either.
    fn adamw_cast(
        &self,
        y: Self::ViewMut<'_, X>,
        p: Self::ViewMut<'_, X::Acc>,
        m: Self::ViewMut<'_, X::Acc>,
        v: Self::ViewMut<'_, X::Acc>,
        g: Self::View<'_, X::Acc>,
        scale: Self::View<'_, X::Acc>,
        rows: usize,
        len: usize,
        step: AdamWStep,
    ) -> Result<()>;
}
