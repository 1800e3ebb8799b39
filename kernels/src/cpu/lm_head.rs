//! LM head on the CPU: per chunk of labels one product for the logits, one pass each for
//! their largest value, their exponentials and their gradient (in place), and one product
//! for each gradient asked for.

use super::simd::{Level, Task, dispatch};
use super::sums;
use super::{Cpu, CpuReal};
use crate::error::{Error, Result, expect_below, expect_len};
use crate::ops::{Gemm, GemmDims, LmHead, LmHeadDims, LmHeadLoss, LmHeadScratch};

/// Some labels of a chunk: their losses. Logits become exponentials, then gradients if asked for.
struct CrossEntropy<'a, X> {
    loss: &'a mut [X],
    logits: &'a mut [X],
    targets: &'a [u32],
    weights: &'a [X],
    gradient: bool,
}

impl<X: CpuReal> Task for CrossEntropy<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let vocab = self.logits.len() / self.loss.len();
        for (i, z) in self.logits.chunks_exact_mut(vocab).enumerate() {
            let target = self.targets[i] as usize;
            let z_target = z[target];
            // Shifted by the largest, so that no exponential overflows.
            let shift = sums::max(z);
            let sum = sums::exp_sum::<L, X>(z, shift);
            self.loss[i] = shift + sum.ln() - z_target;
            if self.gradient {
                let scale = self.weights[i] / sum;
                for z in z.iter_mut() {
                    *z *= scale;
                }
                z[target] -= self.weights[i];
            }
        }
    }
}

/// Some rows of logits.
struct Argmax<'a, X> {
    ids: &'a mut [u32],
    logits: &'a [X],
}

impl<X: CpuReal> Task for Argmax<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        // The largest value of a block is a vectorised search; where it stands is
        // looked up in the winning block alone.
        const BLOCK: usize = 1024;
        let cols = self.logits.len() / self.ids.len();
        for (id, row) in self.ids.iter_mut().zip(self.logits.chunks_exact(cols)) {
            let (mut best, mut at) = (f64::NEG_INFINITY, 0);
            for (b, block) in row.chunks(BLOCK).enumerate() {
                let largest = sums::max(block).to_f64();
                if largest > best {
                    (best, at) = (largest, b * BLOCK);
                }
            }
            let offset = row[at..].iter().position(|x| x.to_f64() == best).unwrap_or(0);
            *id = (at + offset) as u32;
        }
    }
}

/// Fails unless row numbers increase strictly and are below `tokens`.
fn check_rows(op: &'static str, rows: &[u32], tokens: usize) -> Result<()> {
    expect_below(op, "rows", rows, tokens)?;
    match rows.windows(2).position(|pair| pair[0] >= pair[1]) {
        None => Ok(()),
        Some(i) => Err(Error::Unsupported { op, why: format!("`rows` does not increase after element {i}") }),
    }
}

impl<X: CpuReal> LmHead<X> for Cpu {
    // Logits stay in the cache.
    const CHUNK: usize = 128;

    fn lm_head_loss(&self, args: LmHeadLoss<Self, X>) -> Result<()> {
        let _timed = self.timed("lm_head_loss");
        args.check()?;
        let LmHeadLoss { loss, mut dx, mut dw, scratch, x, w, rows, targets, weights, dims } = args;
        const OP: &str = "lm_head_loss";
        let LmHeadDims { tokens, labels, hidden, vocab, chunk } = dims;
        let LmHeadScratch { logits, rows: gathered, d_rows } = scratch;
        check_rows(OP, rows, tokens)?;
        expect_below(OP, "targets", targets, vocab)?;
        if let Some(dx) = &mut dx {
            dx.fill(X::zero());
        }
        let gradient = dx.is_some() || dw.is_some();

        for first in (0..labels).step_by(chunk) {
            let n = chunk.min(labels - first);
            let part = first..first + n;
            let gathered = &mut gathered[..n * hidden];
            self.copy_rows(OP, gathered, x, &rows[part.clone()], hidden)?;
            let logits = &mut logits[..n * vocab];
            self.gemm(logits, gathered, w, GemmDims::new(n, vocab, hidden, false, true))?;

            let k = self.rows_per_part(n, 4 * vocab);
            let outputs = loss[part.clone()].chunks_mut(k).zip(logits.chunks_mut(k * vocab));
            let inputs = targets[part.clone()].chunks(k).zip(weights[part.clone()].chunks(k));
            self.for_parts(outputs.zip(inputs), |((loss, logits), (targets, weights))| {
                dispatch(CrossEntropy { loss, logits, targets, weights, gradient });
            });

            if let Some(dx) = &mut dx {
                let d_rows = &mut d_rows[..n * hidden];
                self.gemm(d_rows, logits, w, GemmDims::new(n, hidden, vocab, false, false))?;
                for (d_row, &row) in d_rows.chunks_exact(hidden).zip(&rows[part.clone()]) {
                    dx[row as usize * hidden..][..hidden].copy_from_slice(d_row);
                }
            }
            if let Some(dw) = &mut dw {
                self.gemm(dw, logits, gathered, GemmDims::new(vocab, hidden, n, true, false).add())?;
            }
        }
        Ok(())
    }

    fn argmax(&self, ids: &mut [u32], logits: &[X], rows: usize, cols: usize) -> Result<()> {
        let _timed = self.timed("argmax");
        const OP: &str = "argmax";
        expect_len(OP, "ids", ids.len(), rows)?;
        expect_len(OP, "logits", logits.len(), rows * cols)?;
        if cols == 0 {
            return Err(Error::Unsupported { op: OP, why: "rows have no columns".into() });
        }
        let k = self.rows_per_part(rows, cols);
        self.for_parts(ids.chunks_mut(k).zip(logits.chunks(k * cols)), |(ids, logits)| {
            dispatch(Argmax { ids, logits });
        });
        Ok(())
    }
}
