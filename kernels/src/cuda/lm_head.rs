//! LM head on CUDA: per chunk of labels a product for the logits, one pass over them for loss and
//! gradient in place, and a product for each gradient asked for.

use super::elementwise::threads_for_row;
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::error::{Error, Result, expect_len};
use crate::ops::{GemmDims, LmHead, LmHeadDims, LmHeadLoss, LmHeadScratch};
use crate::{View, ViewMut};

const MODULE: &str = "lm_head";
/// As in `cu/lm_head.cu`.
const THREADS: usize = 512;
const LOSS_THREADS: usize = 1024;

impl<X: CudaReal> LmHead<X> for Cuda {
    // Several times as many operations for each byte of W as a device has time for while it reads it.
    const CHUNK: usize = 1024;

    fn lm_head_loss(&self, args: LmHeadLoss<Self, X>) -> Result<()> {
        args.check()?;
        let LmHeadLoss { loss, dx, dw, scratch, x, w, rows, targets, weights, dims } = args;
        const OP: &str = "lm_head_loss";
        let LmHeadDims { tokens, labels, hidden, vocab, chunk } = dims;
        let LmHeadScratch { mut logits, rows: mut gathered, mut d_rows } = scratch;
        if let Some(dx) = &dx {
            self.set_bytes(dx.pointer(), 0, dx.len() * size_of::<X>())?;
        }
        let gradient = dx.is_some() || dw.is_some();
        // As much of a row as shared memory holds, in chunks of 16 bytes, stays there between its two readings.
        let row = if gradient { vocab * size_of::<X>() / 16 } else { 0 };
        let kept = row.min(self.most_shared::<X>(MODULE, "cross_entropy")? / 16);
        let mut loss = loss;
        for first in (0..labels).step_by(chunk) {
            let n = chunk.min(labels - first);
            let part = first..first + n;
            let gathered = gathered.reborrow().slice(0..n * hidden);
            let logits = logits.reborrow().slice(0..n * vocab);
            self.copy_rows(OP, &gathered, x, rows.slice(part.clone()), hidden)?;
            self.gemm_into(OP, &logits, gathered.freeze(), w, GemmDims::new(n, vocab, hidden, false, true))?;

            let kernel = self.kernel_of::<X>(MODULE, "cross_entropy");
            let kernel = kernel.write(&loss.reborrow().slice(part.clone())).write(&logits);
            let kernel = kernel.read(targets.slice(part.clone())).read(weights.slice(part.clone()));
            let kernel = kernel.fault().int(vocab).int(kept).int(gradient.into());
            let threads = threads_for_row::<X>(vocab, LOSS_THREADS);
            // SAFETY: a row of logits, a target, a weight and a loss per block; targets are checked.
            unsafe { kernel.run([n, 1, 1], threads, kept * 16) }?;

            if let Some(dx) = &dx {
                let d_rows = d_rows.reborrow().slice(0..n * hidden);
                let dims = GemmDims::new(n, hidden, vocab, false, false);
                self.gemm_into(OP, &d_rows, logits.freeze(), w, dims)?;
                let kernel = self.kernel_of::<X>(MODULE, "scatter_rows").write(dx).read(d_rows.freeze());
                let kernel = kernel.read(rows.slice(part)).fault().int(hidden).int(tokens);
                // SAFETY: `n` rows of d_rows and numbers; numbers beyond dx are refused.
                unsafe { kernel.run([n, 1, 1], threads_for_row::<X>(hidden, THREADS), 0) }?;
            }
            if let Some(dw) = &dw {
                let dims = GemmDims::new(vocab, hidden, n, true, false).add();
                self.gemm_into(OP, dw, logits.freeze(), gathered.freeze(), dims)?;
            }
        }
        Ok(())
    }

    fn argmax(
        &self,
        ids: CudaViewMut<'_, u32>,
        logits: CudaView<'_, X>,
        rows: usize,
        cols: usize,
    ) -> Result<()> {
        const OP: &str = "argmax";
        expect_len(OP, "ids", ids.len(), rows)?;
        expect_len(OP, "logits", logits.len(), rows * cols)?;
        if cols == 0 {
            return Err(Error::Unsupported { op: OP, why: "rows have no columns".into() });
        }
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&ids).read(logits).int(cols);
        // SAFETY: a row of logits and an id per block.
        unsafe { kernel.run([rows, 1, 1], threads_for_row::<X>(cols, THREADS), 0) }
    }
}
