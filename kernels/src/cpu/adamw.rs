//! AdamW and gradient norms on the CPU: one pass over flat memory.

use super::simd::{Level, Task, dispatch};
use super::sums;
use super::{Cpu, CpuReal};
use crate::error::{Result, expect_len};
use crate::ops::{AdamW, AdamWCast, AdamWStep, AdamWUpdate};

/// Partial sums of a row. Fixed, so that the sum does not depend on the number of threads.
const PARTIAL_SUMS: usize = 64;
/// Elements summed in lanes before they join a partial sum: keeps rounding errors of long rows small.
const SUM_BLOCK: usize = 4096;

/// `Σ g²` of a piece of a row.
struct SumSquares<'a, A>(&'a [A]);

impl<A: CpuReal> Task for SumSquares<'_, A> {
    type Out = A;
    #[inline(always)]
    fn run<L: Level>(self) -> A {
        let mut sum = A::zero();
        for block in self.0.chunks(SUM_BLOCK) {
            sum += sums::dot::<L, A>(block, block);
        }
        sum
    }
}

/// The factors of one step, computed once in f64.
#[derive(Clone, Copy)]
struct Factors<A> {
    beta1: A,
    one_minus_beta1: A,
    beta2: A,
    one_minus_beta2: A,
    /// 1 − lr·wd.
    decay: A,
    /// lr / (1 − β₁ᵗ).
    rate: A,
    /// 1 / √(1 − β₂ᵗ).
    root_correction: A,
    eps: A,
}

impl<A: CpuReal> Factors<A> {
    fn new(s: AdamWStep) -> Self {
        let correction1 = 1.0 - s.beta1.powf(s.step.into());
        let correction2 = 1.0 - s.beta2.powf(s.step.into());
        Self {
            beta1: A::from_f64(s.beta1),
            one_minus_beta1: A::from_f64(1.0 - s.beta1),
            beta2: A::from_f64(s.beta2),
            one_minus_beta2: A::from_f64(1.0 - s.beta2),
            decay: A::from_f64(1.0 - s.lr * s.weight_decay),
            rate: A::from_f64(s.lr / correction1),
            root_correction: A::from_f64(1.0 / correction2.sqrt()),
            eps: A::from_f64(s.eps),
        }
    }
}

/// A piece of one row.
struct Step<'a, A> {
    p: &'a mut [A],
    m: &'a mut [A],
    v: &'a mut [A],
    g: &'a [A],
    scale: A,
    factors: Factors<A>,
}

impl<A: CpuReal> Task for Step<'_, A> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let f = self.factors;
        let n = self.p.len();
        let (p, m, v, g) = (self.p, &mut self.m[..n], &mut self.v[..n], &self.g[..n]);
        for i in 0..n {
            let grad = self.scale * g[i];
            m[i] = f.beta1.madd::<L>(m[i], f.one_minus_beta1 * grad);
            v[i] = f.beta2.madd::<L>(v[i], f.one_minus_beta2 * grad * grad);
            let denominator = v[i].sqrt().madd::<L>(f.root_correction, f.eps);
            p[i] = p[i] * f.decay - f.rate * m[i] / denominator;
        }
    }
}

impl<A: CpuReal> AdamW<A> for Cpu {
    fn sum_squares(&self, sums: &mut [A], g: &[A], rows: usize, len: usize) -> Result<()> {
        let _timed = self.timed("sum_squares");
        const OP: &str = "sum_squares";
        expect_len(OP, "sums", sums.len(), rows)?;
        expect_len(OP, "g", g.len(), rows * len)?;
        for (i, sum) in sums.iter_mut().enumerate() {
            let row = &g[i * len..(i + 1) * len];
            let piece = len.div_ceil(PARTIAL_SUMS).next_multiple_of(SUM_BLOCK).max(SUM_BLOCK);
            let mut partial = [A::zero(); PARTIAL_SUMS];
            let used = &mut partial[..len.div_ceil(piece)];
            let k = self.rows_per_part(used.len(), piece);
            self.for_parts(used.chunks_mut(k).zip(row.chunks(k * piece)), |(partial, row)| {
                for (partial, piece) in partial.iter_mut().zip(row.chunks(piece)) {
                    *partial = dispatch(SumSquares(piece));
                }
            });
            *sum = partial.into_iter().sum();
        }
        Ok(())
    }

    fn clip_scale(&self, scale: &mut [A], sums: &[A], rows: usize, max_norm: f64) -> Result<()> {
        let _timed = self.timed("clip_scale");
        const OP: &str = "clip_scale";
        expect_len(OP, "scale", scale.len(), rows)?;
        expect_len(OP, "sums", sums.len(), rows)?;
        for (scale, sum) in scale.iter_mut().zip(sums) {
            let factor = A::from_f64(max_norm) / (sum.sqrt() + A::from_f64(1e-6));
            // A norm that is no number must stay visible, in the factor too.
            *scale = match sum.to_f64().is_finite() {
                false => A::from_f64(f64::NAN),
                true if factor.to_f64() > 1.0 => A::one(),
                true => factor,
            };
        }
        Ok(())
    }

    fn adamw(&self, args: AdamWUpdate<Self, A>) -> Result<()> {
        let _timed = self.timed("adamw");
        args.check()?;
        let AdamWUpdate { p, m, v, g, scale, rows, len, step } = args;
        if p.is_empty() || !scale.iter().all(|s| s.to_f64().is_finite()) {
            return Ok(());
        }
        let factors = Factors::new(step);
        let k = self.rows_per_part(rows * len, 4).min(len);
        let moments = m.chunks_mut(len).zip(v.chunks_mut(len));
        let outputs = p.chunks_mut(len).zip(moments);
        let parts = outputs.zip(g.chunks(len).zip(scale)).flat_map(|((p, (m, v)), (g, &scale))| {
            let moments = m.chunks_mut(k).zip(v.chunks_mut(k));
            let pieces = p.chunks_mut(k).zip(moments).zip(g.chunks(k));
            pieces.map(move |((p, (m, v)), g)| Step { p, m, v, g, scale, factors })
        });
        self.for_parts(parts, dispatch);
        Ok(())
    }
}

impl<A: CpuReal> AdamWCast<A> for Cpu {
    fn adamw_cast(&self, y: &mut [A], args: AdamWUpdate<Self, A>) -> Result<()> {
        let AdamWUpdate { p, m, v, g, scale, rows, len, step } = args;
        expect_len("adamw_cast", "y", y.len(), rows * len)?;
        self.adamw(AdamWUpdate { p, m, v, g, scale, rows, len, step })?;
        if scale.iter().all(|s| s.to_f64().is_finite()) {
            y.copy_from_slice(p);
        }
        Ok(())
    }
}
