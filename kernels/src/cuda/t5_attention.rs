//! T5 attention on CUDA.
//!
//! bf16 with heads of 64 and up to 96 keys goes through the tensor cores (`cu/t5_tiles.cu`, a block
//! per head of an example), everything else through plain kernels (`cu/t5_attention.cu`, a block
//! per 16 queries, or keys, of a head of an example).

use super::launch::Launch;
use super::t5_tiles::Plan;
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::error::{Error, Result, expect_at_least, expect_len};
use crate::ops::{BucketMap, T5Attention, T5AttentionDims};
use crate::rng::drop_threshold;
use crate::{View, ViewMut};

const MODULE: &str = "t5_attention";
/// As in `cu/t5_attention.cu`: threads, and rows of a block.
const THREADS: usize = 128;
const ROWS: usize = 16;
const TABLE_THREADS: usize = 256;

/// Elements of a row of q and o, and half of a row of kv.
fn width(dims: &T5AttentionDims) -> usize {
    dims.heads * dims.head_dim
}

/// Checks what both directions have in common.
fn check<X: CudaReal>(
    op: &'static str,
    q: usize,
    probs: usize,
    bias: &Option<BucketMap<'_, Cuda, X>>,
    keys: usize,
    dims: &T5AttentionDims,
) -> Result<()> {
    expect_len(op, "q", q, dims.batch * dims.queries * width(dims))?;
    expect_len(op, "probs", probs, dims.batch * dims.heads * dims.queries * dims.keys)?;
    if let Some(bias) = bias {
        expect_len(op, "bias.table", bias.table.len(), bias.buckets * dims.heads)?;
        expect_len(op, "bias.map", bias.map.len(), dims.queries * dims.keys)?;
    }
    super::dropout::check_probability(op, dims.dropout)?;
    if dims.dropout > 0.0 {
        expect_len(op, "keys", keys, dims.batch)?;
    }
    if dims.kv_rows < dims.keys || dims.head_dim == 0 {
        let why = format!("{} keys in {} rows of kv, heads of {}", dims.keys, dims.kv_rows, dims.head_dim);
        return Err(Error::Unsupported { op, why });
    }
    Ok(())
}

/// Bytes for this many floats per row of a block.
fn shared(floats: usize) -> usize {
    ROWS * floats * size_of::<f32>()
}

impl Launch<'_> {
    /// The shape, as plain kernels take it.
    fn t5_shape(self, dims: &T5AttentionDims) -> Self {
        let launch = self.int(dims.queries).int(dims.keys).int(dims.kv_rows);
        launch.int(dims.heads).int(dims.head_dim)
    }

    /// The shape, as kernels on the tensor cores take it.
    fn t5_tiled_shape(self, dims: &T5AttentionDims) -> Self {
        let launch = self.int(dims.queries).int(dims.keys).int(dims.kv_rows);
        launch.int(dims.heads).int(dims.causal.into())
    }

    /// The masks of probabilities.
    fn t5_drop(self, keys: CudaView<'_, u64>, dims: &T5AttentionDims) -> Self {
        let launch = self.read(keys).int(dims.site as usize);
        launch.int(drop_threshold(dims.dropout) as usize).float(1.0 / (1.0 - dims.dropout))
    }
}

impl<X: CudaReal> T5Attention<X> for Cuda {
    fn t5_attention_forward(
        &self,
        o: CudaViewMut<'_, X>,
        probs: CudaViewMut<'_, X>,
        q: CudaView<'_, X>,
        kv: CudaView<'_, X>,
        bias: Option<BucketMap<'_, Self, X>>,
        keys: CudaView<'_, u64>,
        dims: T5AttentionDims,
    ) -> Result<()> {
        const OP: &str = "t5_attention_forward";
        check(OP, q.len(), probs.len(), &bias, keys.len(), &dims)?;
        expect_len(OP, "o", o.len(), q.len())?;
        let used = (dims.batch.max(1) - 1) * dims.kv_rows + dims.keys;
        expect_at_least(OP, "kv", kv.len(), if dims.batch == 0 { 0 } else { 2 * used * width(&dims) })?;
        if probs.len() == 0 {
            return self.set_bytes(o.pointer(), 0, o.len() * size_of::<X>());
        }
        let plan = Plan::forward::<X>(
            self,
            &dims,
            bias.map(|b| b.buckets),
            &[o.pointer(), q.pointer(), kv.pointer()],
        );
        let kernel = plan.as_ref().map_or_else(|| self.kernel_of::<X>(MODULE, OP), |plan| plan.kernel(self));
        let kernel = kernel.write(&o).write(&probs).read(q).read(kv);
        let kernel = kernel.read_if(bias.map(|b| b.table)).read_if(bias.map(|b| b.map));
        let kernel = kernel.fault().int(bias.map_or(0, |b| b.buckets));
        if let Some(plan) = plan {
            // SAFETY: the lengths above; buckets beyond the table are refused.
            return unsafe { plan.run(kernel.t5_tiled_shape(&dims).t5_drop(keys, &dims)) };
        }
        let kernel = kernel.t5_shape(&dims).int(dims.causal.into()).t5_drop(keys, &dims);
        let grid = [dims.queries.div_ceil(ROWS), dims.heads, dims.batch];
        // SAFETY: the lengths above; buckets beyond the table are refused.
        unsafe { kernel.run(grid, THREADS, shared(dims.head_dim + dims.keys)) }
    }

    fn t5_attention_backward(
        &self,
        dq: CudaViewMut<'_, X>,
        dkv: CudaViewMut<'_, X>,
        d_table: Option<CudaViewMut<'_, f32>>,
        d_scores: CudaViewMut<'_, X>,
        d_o: CudaView<'_, X>,
        probs: CudaView<'_, X>,
        q: CudaView<'_, X>,
        kv: CudaView<'_, X>,
        bias: Option<BucketMap<'_, Self, X>>,
        keys: CudaView<'_, u64>,
        dims: T5AttentionDims,
    ) -> Result<()> {
        const OP: &str = "t5_attention_backward";
        check(OP, q.len(), probs.len(), &bias, keys.len(), &dims)?;
        expect_len(OP, "dq", dq.len(), q.len())?;
        expect_len(OP, "d_o", d_o.len(), q.len())?;
        expect_len(OP, "d_scores", d_scores.len(), probs.len())?;
        expect_len(OP, "kv", kv.len(), 2 * dims.batch * dims.keys * width(&dims))?;
        expect_len(OP, "dkv", dkv.len(), kv.len())?;
        if dims.kv_rows != dims.keys {
            let why = format!("{} rows of kv for {} keys", dims.kv_rows, dims.keys);
            return Err(Error::Unsupported { op: OP, why });
        }
        if let Some(d_table) = &d_table {
            expect_len(OP, "d_table", d_table.len(), bias.map_or(0, |bias| bias.buckets) * dims.heads)?;
        }
        if probs.is_empty() {
            self.set_bytes(dq.pointer(), 0, dq.len() * size_of::<X>())?;
            return self.set_bytes(dkv.pointer(), 0, dkv.len() * size_of::<X>());
        }
        // The table's gradient needs the map.
        let table = d_table.as_ref().zip(bias);
        let addresses = [&dq, &dkv, &d_scores].map(|view| view.pointer());
        let addresses = [addresses.as_slice(), &[d_o, q, kv].map(|view| view.pointer())].concat();
        let buckets = table.map(|(_, bias)| bias.buckets);
        if let Some(plan) = Plan::backward::<X>(self, &dims, buckets, &addresses) {
            let partial = if table.is_some() { d_scores.pointer() } else { 0 };
            let kernel = plan.kernel(self).write(&dq).write(&dkv).address::<f32>(partial);
            let kernel = kernel.read(d_o).read(probs).read(q).read(kv);
            let kernel = kernel.read_if(table.map(|(_, bias)| bias.map)).int(buckets.unwrap_or(0));
            // SAFETY: the lengths above; the plan has made sure that sums fit into `d_scores`.
            unsafe { plan.run(kernel.t5_tiled_shape(&dims).t5_drop(keys, &dims)) }?;
            return match table {
                // SAFETY: as above.
                Some((d_table, _)) => unsafe { self.t5_table_sum(d_table, partial, dims.batch) },
                None => Ok(()),
            };
        }
        let kernel = self.kernel_of::<X>(MODULE, "t5_attention_backward_q").write(&dq).write(&d_scores);
        let kernel = kernel.read(d_o).read(probs).read(kv).t5_shape(&dims).t5_drop(keys, &dims);
        let grid = [dims.queries.div_ceil(ROWS), dims.heads, dims.batch];
        // SAFETY: the lengths above.
        unsafe { kernel.run(grid, THREADS, shared(dims.head_dim + dims.keys)) }?;
        let kernel = self.kernel_of::<X>(MODULE, "t5_attention_backward_kv").write(&dkv);
        let kernel = kernel.read(d_scores.freeze()).read(d_o).read(probs).read(q);
        let kernel = kernel.t5_shape(&dims).t5_drop(keys, &dims);
        let grid = [dims.keys.div_ceil(ROWS), dims.heads, dims.batch];
        // SAFETY: the lengths above.
        unsafe { kernel.run(grid, THREADS, shared(2 * dims.queries)) }?;
        if let Some((d_table, bias)) = table {
            let kernel = self.kernel_of::<X>(MODULE, "t5_table_gradient").write(d_table);
            let kernel = kernel.read(d_scores.freeze()).read(bias.map);
            let kernel = kernel.int(dims.batch).int(dims.heads).int(dims.queries * dims.keys);
            // SAFETY: the lengths above.
            unsafe { kernel.run([bias.buckets, dims.heads, 1], TABLE_THREADS, 0) }?;
        }
        Ok(())
    }
}
