//! Rotary embedding and the q/k norm on CUDA: a block per token.

use super::elementwise::threads_for_row;
use super::rmsnorm::{COLUMN_BLOCK, COLUMN_THREADS};
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::error::{Result, expect_len};
use crate::ops::{Out, QkNorm, QkNormBackward, QkNormForward, QkvDims, Rope, RopeBackward, RopeForward};
use crate::{View, ViewMut};

const MODULE: &str = "rope";
/// As in `cu/rope.cu`: threads of a block of the norms, and the most of the rotary embedding's.
const THREADS: usize = 256;
const ROPE_THREADS: usize = 512;

/// Threads of a token's block: one for every 16 bytes of half a head, so that all are asked for at once.
fn rope_threads<X: CudaReal>(heads: usize, head_dim: usize) -> usize {
    threads_for_row::<X>(heads * head_dim / 2, ROPE_THREADS)
}

impl Cuda {
    /// `sums (=|+=) Σ_rows d`, `d` contiguous `[rows, cols]`.
    pub(super) fn sum_rows<X: CudaReal>(
        &self,
        sums: &CudaViewMut<'_, f32>,
        d: CudaView<'_, X>,
        rows: usize,
        cols: usize,
        out: Out,
    ) -> Result<()> {
        expect_len("bias_backward", "d", d.len(), rows * cols)?;
        expect_len("bias_backward", "sums", sums.len(), cols)?;
        let kernel = self.kernel_of::<X>(MODULE, "bias_backward").write(sums).read(d).int(rows).int(cols);
        let kernel = kernel.int((out == Out::Add).into());
        // SAFETY: the lengths checked above.
        unsafe { kernel.run([cols.div_ceil(COLUMN_BLOCK), 1, 1], COLUMN_THREADS, 0) }
    }
}

impl<X: CudaReal> Rope<X> for Cuda {
    fn rope_forward(&self, args: RopeForward<Self, X>) -> Result<()> {
        args.check()?;
        let RopeForward { qkv, bias, cos, sin, positions, dims } = args;
        const OP: &str = "rope_forward";
        let limit = cos.len() / (dims.head_dim / 2);
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&qkv).read_if(bias).read(cos).read(sin);
        let kernel = kernel.read(positions).fault();
        let kernel = kernel.int(dims.heads).int(dims.kv_heads).int(dims.head_dim).int(limit);
        let heads = dims.heads + if bias.is_some() { 2 } else { 1 } * dims.kv_heads;
        // SAFETY: the lengths checked above; positions beyond the tables are refused.
        unsafe { kernel.run([dims.tokens, 1, 1], rope_threads::<X>(heads, dims.head_dim), 0) }
    }

    fn rope_backward(&self, args: RopeBackward<Self, X>) -> Result<()> {
        args.check()?;
        let RopeBackward { dqkv, dbias, cos, sin, positions, dims } = args;
        const OP: &str = "rope_backward";
        let limit = cos.len() / (dims.head_dim / 2);
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&dqkv).read(cos).read(sin);
        let kernel = kernel.read(positions).fault();
        let kernel = kernel.int(dims.heads).int(dims.kv_heads).int(dims.head_dim).int(limit);
        let threads = rope_threads::<X>(dims.heads + dims.kv_heads, dims.head_dim);
        // SAFETY: the lengths checked above; positions beyond the tables are refused.
        unsafe { kernel.run([dims.tokens, 1, 1], threads, 0) }?;
        match &dbias {
            Some(dbias) => self.sum_rows(dbias, dqkv.freeze(), dims.tokens, dims.row(), Out::Add),
            None => Ok(()),
        }
    }
}

impl<X: CudaReal> QkNorm<X> for Cuda {
    fn qk_norm_forward(&self, args: QkNormForward<Self, X>) -> Result<()> {
        args.check()?;
        let QkNormForward { y, inv_rms, qkv, w_q, w_k, dims, eps } = args;
        const OP: &str = "qk_norm_forward";
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&y).write(&inv_rms).read(qkv).read(w_q).read(w_k);
        let kernel = kernel.int(dims.heads).int(dims.kv_heads).int(dims.head_dim).float(eps);
        // SAFETY: the lengths checked above.
        unsafe { kernel.run([dims.tokens, 1, 1], THREADS, 0) }
    }

    fn qk_norm_backward(&self, args: QkNormBackward<Self, X>) -> Result<()> {
        args.check()?;
        let QkNormBackward { dqkv, dw, dy, qkv, inv_rms, w_q, w_k, dims } = args;
        const OP: &str = "qk_norm_backward";
        let QkvDims { tokens, heads, kv_heads, head_dim } = dims;
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&dqkv).read(dy).read(qkv).read(inv_rms);
        let kernel = kernel.read(w_q).read(w_k).int(heads).int(kv_heads).int(head_dim);
        // SAFETY: the lengths checked above.
        unsafe { kernel.run([tokens, 1, 1], THREADS, 0) }?;
        let Some((dw_q, dw_k)) = &dw else { return Ok(()) };
        for (dw, first, count) in [(dw_q, 0, heads), (dw_k, heads, kv_heads)] {
            let kernel =
                self.kernel_of::<X>(MODULE, "qk_norm_weight").write(dw).read(dy).read(qkv).read(inv_rms);
            let kernel = kernel.int(tokens).int(first).int(count).int(heads + kv_heads);
            let kernel = kernel.int(dims.row()).int(head_dim);
            // SAFETY: the lengths checked above.
            unsafe { kernel.run([head_dim.div_ceil(COLUMN_BLOCK), 1, 1], COLUMN_THREADS, 0) }?;
        }
        Ok(())
    }
}
