//! Rotary embedding and the q/k norm on CUDA: a block per token.

use super::elementwise::threads_for_row;
use super::rmsnorm::{COLUMN_BLOCK, COLUMN_THREADS};
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::error::{Error, Result, expect_len};
use crate::ops::{Out, QkNorm, QkvDims, Rope};
use crate::{View, ViewMut};

const MODULE: &str = "rope";
/// As in `cu/rope.cu`: threads of a block of the norms, and the most of the rotary embedding's.
const THREADS: usize = 256;
const ROPE_THREADS: usize = 512;

/// Threads of a token's block: one for every 16 bytes of half a head, so that all are asked for at once.
fn rope_threads<X: CudaReal>(heads: usize, head_dim: usize) -> usize {
    threads_for_row::<X>(heads * head_dim / 2, ROPE_THREADS)
}

/// Fails unless tables of angles and positions fit; the number of positions in the tables.
fn check_angles(op: &'static str, cos: usize, sin: usize, positions: usize, dims: QkvDims) -> Result<usize> {
    let half = dims.head_dim / 2;
    if half == 0 || !dims.head_dim.is_multiple_of(2) {
        return Err(Error::Unsupported { op, why: format!("head size {} is not even", dims.head_dim) });
    }
    expect_len(op, "cos", cos, cos / half * half)?;
    expect_len(op, "sin", sin, cos)?;
    expect_len(op, "positions", positions, dims.tokens)?;
    Ok(cos / half)
}

/// Fails unless the views of a q/k norm fit.
fn check_norm(
    op: &'static str,
    outer: [(&'static str, usize); 2],
    inv_rms: usize,
    weights: [usize; 2],
    dims: QkvDims,
) -> Result<()> {
    for (what, len) in outer {
        expect_len(op, what, len, dims.tokens * dims.row())?;
    }
    expect_len(op, "inv_rms", inv_rms, dims.tokens * (dims.heads + dims.kv_heads))?;
    expect_len(op, "w_q", weights[0], dims.head_dim)?;
    expect_len(op, "w_k", weights[1], dims.head_dim)
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
        // SAFETY: the lengths above.
        unsafe { kernel.run([cols.div_ceil(COLUMN_BLOCK), 1, 1], COLUMN_THREADS, 0) }
    }
}

impl<X: CudaReal> Rope<X> for Cuda {
    fn rope_forward(
        &self,
        qkv: CudaViewMut<'_, X>,
        bias: Option<CudaView<'_, X>>,
        cos: CudaView<'_, f32>,
        sin: CudaView<'_, f32>,
        positions: CudaView<'_, u32>,
        dims: QkvDims,
    ) -> Result<()> {
        const OP: &str = "rope_forward";
        expect_len(OP, "qkv", qkv.len(), dims.tokens * dims.row())?;
        if let Some(bias) = bias {
            expect_len(OP, "bias", bias.len(), dims.row())?;
        }
        let limit = check_angles(OP, cos.len(), sin.len(), positions.len(), dims)?;
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&qkv).read_if(bias).read(cos).read(sin);
        let kernel = kernel.read(positions).fault();
        let kernel = kernel.int(dims.heads).int(dims.kv_heads).int(dims.head_dim).int(limit);
        let heads = dims.heads + if bias.is_some() { 2 } else { 1 } * dims.kv_heads;
        // SAFETY: the lengths above; positions beyond the tables are refused.
        unsafe { kernel.run([dims.tokens, 1, 1], rope_threads::<X>(heads, dims.head_dim), 0) }
    }

    fn rope_backward(
        &self,
        dqkv: CudaViewMut<'_, X>,
        dbias: Option<CudaViewMut<'_, f32>>,
        cos: CudaView<'_, f32>,
        sin: CudaView<'_, f32>,
        positions: CudaView<'_, u32>,
        dims: QkvDims,
    ) -> Result<()> {
        const OP: &str = "rope_backward";
        expect_len(OP, "dqkv", dqkv.len(), dims.tokens * dims.row())?;
        if let Some(dbias) = &dbias {
            expect_len(OP, "dbias", dbias.len(), dims.row())?;
        }
        let limit = check_angles(OP, cos.len(), sin.len(), positions.len(), dims)?;
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&dqkv).read(cos).read(sin);
        let kernel = kernel.read(positions).fault();
        let kernel = kernel.int(dims.heads).int(dims.kv_heads).int(dims.head_dim).int(limit);
        let threads = rope_threads::<X>(dims.heads + dims.kv_heads, dims.head_dim);
        // SAFETY: the lengths above; positions beyond the tables are refused.
        unsafe { kernel.run([dims.tokens, 1, 1], threads, 0) }?;
        match &dbias {
            Some(dbias) => self.sum_rows(dbias, dqkv.freeze(), dims.tokens, dims.row(), Out::Add),
            None => Ok(()),
        }
    }
}

impl<X: CudaReal> QkNorm<X> for Cuda {
    fn qk_norm_forward(
        &self,
        y: CudaViewMut<'_, X>,
        inv_rms: CudaViewMut<'_, f32>,
        qkv: CudaView<'_, X>,
        w_q: CudaView<'_, X>,
        w_k: CudaView<'_, X>,
        dims: QkvDims,
        eps: f64,
    ) -> Result<()> {
        const OP: &str = "qk_norm_forward";
        let outer = [("y", y.len()), ("qkv", qkv.len())];
        check_norm(OP, outer, inv_rms.len(), [w_q.len(), w_k.len()], dims)?;
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&y).write(&inv_rms).read(qkv).read(w_q).read(w_k);
        let kernel = kernel.int(dims.heads).int(dims.kv_heads).int(dims.head_dim).float(eps);
        // SAFETY: the lengths above.
        unsafe { kernel.run([dims.tokens, 1, 1], THREADS, 0) }
    }

    fn qk_norm_backward(
        &self,
        dqkv: CudaViewMut<'_, X>,
        dw: Option<(CudaViewMut<'_, f32>, CudaViewMut<'_, f32>)>,
        dy: CudaView<'_, X>,
        qkv: CudaView<'_, X>,
        inv_rms: CudaView<'_, f32>,
        w_q: CudaView<'_, X>,
        w_k: CudaView<'_, X>,
        dims: QkvDims,
    ) -> Result<()> {
        const OP: &str = "qk_norm_backward";
        let QkvDims { tokens, heads, kv_heads, head_dim } = dims;
        let outer = [("dy", dy.len()), ("qkv", qkv.len())];
        check_norm(OP, outer, inv_rms.len(), [w_q.len(), w_k.len()], dims)?;
        expect_len(OP, "dqkv", dqkv.len(), tokens * dims.row())?;
        if let Some((dw_q, dw_k)) = &dw {
            expect_len(OP, "dw_q", dw_q.len(), head_dim)?;
            expect_len(OP, "dw_k", dw_k.len(), head_dim)?;
        }
        let kernel = self.kernel_of::<X>(MODULE, OP).write(&dqkv).read(dy).read(qkv).read(inv_rms);
        let kernel = kernel.read(w_q).read(w_k).int(heads).int(kv_heads).int(head_dim);
        // SAFETY: the lengths above.
        unsafe { kernel.run([tokens, 1, 1], THREADS, 0) }?;
        let Some((dw_q, dw_k)) = &dw else { return Ok(()) };
        for (dw, first, count) in [(dw_q, 0, heads), (dw_k, heads, kv_heads)] {
            let kernel =
                self.kernel_of::<X>(MODULE, "qk_norm_weight").write(dw).read(dy).read(qkv).read(inv_rms);
            let kernel = kernel.int(tokens).int(first).int(count).int(heads + kv_heads);
            let kernel = kernel.int(dims.row()).int(head_dim);
            // SAFETY: the lengths above.
            unsafe { kernel.run([head_dim.div_ceil(COLUMN_BLOCK), 1, 1], COLUMN_THREADS, 0) }?;
        }
        Ok(())
    }
}
