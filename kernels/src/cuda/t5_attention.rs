//! T5 attention on CUDA.
//!
//! bf16 with heads of 64 and up to 96 keys goes through the tensor cores (`cu/t5_tiles.cu`, a block
//! per head of an example), everything else through plain kernels (`cu/t5_attention.cu`, a block
//! per 16 queries, or keys, of a head of an example).

use super::launch::Launch;
use super::t5_tiles::Plan;
use super::{Cuda, CudaReal, CudaView};
use crate::error::Result;
use crate::ops::{T5Attention, T5AttentionBackward, T5AttentionDims, T5AttentionForward};
use crate::rng::drop_threshold;
use crate::{View, ViewMut};

const MODULE: &str = "t5_attention";
/// As in `cu/t5_attention.cu`: threads, and rows of a block.
const THREADS: usize = 128;
const ROWS: usize = 16;
const TABLE_THREADS: usize = 256;

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
    fn t5_attention_forward(&self, args: T5AttentionForward<Self, X>) -> Result<()> {
        args.check()?;
        let T5AttentionForward { o, probs, q, kv, bias, keys, dims } = args;
        const OP: &str = "t5_attention_forward";
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
            // SAFETY: the lengths checked above; buckets beyond the table are refused.
            return unsafe { plan.run(kernel.t5_tiled_shape(&dims).t5_drop(keys, &dims)) };
        }
        let kernel = kernel.t5_shape(&dims).int(dims.causal.into()).t5_drop(keys, &dims);
        let grid = [dims.queries.div_ceil(ROWS), dims.heads, dims.batch];
        // SAFETY: the lengths checked above; buckets beyond the table are refused.
        unsafe { kernel.run(grid, THREADS, shared(dims.head_dim + dims.keys)) }
    }

    fn t5_attention_backward(&self, args: T5AttentionBackward<Self, X>) -> Result<()> {
        args.check()?;
        let T5AttentionBackward { dq, dkv, d_table, d_scores, d_o, probs, q, kv, bias, keys, dims } = args;
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
            // SAFETY: the lengths checked above; the plan has made sure that sums fit into `d_scores`.
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
        // SAFETY: the lengths checked above.
        unsafe { kernel.run(grid, THREADS, shared(dims.head_dim + dims.keys)) }?;
        let kernel = self.kernel_of::<X>(MODULE, "t5_attention_backward_kv").write(&dkv);
        let kernel = kernel.read(d_scores.freeze()).read(d_o).read(probs).read(q);
        let kernel = kernel.t5_shape(&dims).t5_drop(keys, &dims);
        let grid = [dims.keys.div_ceil(ROWS), dims.heads, dims.batch];
        // SAFETY: the lengths checked above.
        unsafe { kernel.run(grid, THREADS, shared(2 * dims.queries)) }?;
        if let Some((d_table, bias)) = table {
            let kernel = self.kernel_of::<X>(MODULE, "t5_table_gradient").write(d_table);
            let kernel = kernel.read(d_scores.freeze()).read(bias.map);
            let kernel = kernel.int(dims.batch).int(dims.heads).int(dims.queries * dims.keys);
            // SAFETY: the lengths checked above.
            unsafe { kernel.run([bias.buckets, dims.heads, 1], TABLE_THREADS, 0) }?;
        }
        Ok(())
    }
}
