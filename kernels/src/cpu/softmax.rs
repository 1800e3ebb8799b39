//! Softmax of rows of scores, forward and backward, for both attentions.

use super::CpuReal;
use super::simd::{Level, Task};
use super::sums;

/// Replaces rows of scores by `exp(score − largest)`, not yet divided by their sums.
pub(super) struct ExpRows<'a, X> {
    /// Rows of `cols`.
    pub scores: &'a mut [X],
    pub cols: usize,
    /// How many columns row 0 sees, and every later row one more; the rest become 0.
    pub first_visible: usize,
    /// `[rows]`: the largest score.
    pub largest: &'a mut [X],
    /// `[rows]`: the sum.
    pub sums: &'a mut [X],
}

impl<X: CpuReal> Task for ExpRows<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        for (i, row) in self.scores.chunks_mut(self.cols).enumerate() {
            let (seen, hidden) = row.split_at_mut(self.cols.min(self.first_visible + i));
            let shift = sums::max(seen);
            self.largest[i] = shift;
            self.sums[i] = sums::exp_sum::<L, X>(seen, shift);
            hidden.fill(X::zero());
        }
    }
}

/// Multiplies every row by a factor of its own.
pub(super) struct ScaleRows<'a, X> {
    /// Rows of `cols`.
    pub rows: &'a mut [X],
    pub cols: usize,
    pub factors: &'a [X],
}

impl<X: CpuReal> Task for ScaleRows<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        for (row, &factor) in self.rows.chunks_mut(self.cols).zip(self.factors) {
            row.iter_mut().for_each(|x| *x *= factor);
        }
    }
}

/// Probabilities again from scores and lse, and the gradient of the scores.
pub(super) struct CausalBackward<'a, X> {
    /// Scores `[rows, cols]` on entry, probabilities after.
    pub scores: &'a mut [X],
    /// Gradient of the probabilities `[rows, cols]` on entry, `p ⊙ (dp − delta)` after.
    pub d_probs: &'a mut [X],
    pub cols: usize,
    /// How many columns row 0 sees, and every later row one more.
    pub first_visible: usize,
    /// `[rows]`.
    pub lse: &'a [X],
    /// `[rows]`.
    pub delta: &'a [X],
}

impl<X: CpuReal> Task for CausalBackward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let rows = self.scores.chunks_mut(self.cols).zip(self.d_probs.chunks_mut(self.cols));
        for (i, (p, d)) in rows.enumerate() {
            let visible = self.cols.min(self.first_visible + i);
            let (lse, delta) = (self.lse[i], self.delta[i]);
            let (seen, hidden) = p.split_at_mut(visible);
            for (p, d) in seen.iter_mut().zip(&mut d[..visible]) {
                *p = (*p - lse).fast_exp::<L>();
                *d = *p * (*d - delta);
            }
            hidden.fill(X::zero());
            d[visible..].fill(X::zero());
        }
    }
}

/// `delta[i] = Σ a[i] ⊙ b[i]` of rows of `cols`, each with a stride of its own.
pub(super) struct RowDots<'a, X> {
    pub sums: &'a mut [X],
    pub a: &'a [X],
    pub b: &'a [X],
    pub cols: usize,
    pub a_stride: usize,
    pub b_stride: usize,
}

impl<X: CpuReal> Task for RowDots<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        for (i, sum) in self.sums.iter_mut().enumerate() {
            let a = &self.a[i * self.a_stride..][..self.cols];
            let b = &self.b[i * self.b_stride..][..self.cols];
            *sum = sums::dot::<L, X>(a, b);
        }
    }
}
