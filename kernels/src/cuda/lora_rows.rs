//! The launches of `cu/lora_rows.cu`: products of adapted layers with A, with the norm before them.

use super::launch::Launch;
use super::lora::{Columns, Partial, row_stride, tiles};
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::ViewMut;
use crate::error::Result;
use crate::ops::{LoraDims, LoraTarget, RmsNormDims, Segments};

pub(super) const MODULE: &str = "lora_rows";
/// As in the kernels: threads of the forward ones, and the most of the backward ones; tokens of their tiles.
const FORWARD_THREADS: usize = 64;
const ROWS_THREADS: usize = 256;
const PAIR_THREADS: usize = 512;
const A_TILE: usize = 32;
/// Of the backward kernel of two targets of rank 1 or 2: the most targets and ranks, rows of a step, steps that are
/// on their way at most, and rows of 16-byte chunks of one step and row.
const PAIR: usize = 2;
const PAIR_ROWS: usize = 2;
const PAIR_STAGES: usize = 3;
const PAIR_KINDS: usize = 3;

/// Threads of a block that takes whole rows: as few as take no more rounds than the most would.
fn row_threads<X>(cols: usize) -> usize {
    let chunks = cols.div_ceil(16 / size_of::<X>());
    let rounds = chunks.div_ceil(ROWS_THREADS).max(1);
    chunks.div_ceil(rounds).next_multiple_of(32).max(32)
}

/// Bytes of the sums of all tiles of so many units' dA.
pub(super) fn scratch_of_a(segments: usize, dims: &LoraDims<'_>, units: usize) -> usize {
    tiles(A_TILE, segments, dims) * units * dims.in_dim * size_of::<f32>()
}

const PAIR_KERNEL: &str = "rmsnorm_lora_backward_pair";

/// Threads of a block whose threads have 16 bytes of a row each.
fn pair_threads<X>(cols: usize) -> usize {
    (cols / (16 / size_of::<X>())).next_multiple_of(32)
}

/// Shared memory of one step.
fn stage_bytes<X>(cols: usize) -> usize {
    PAIR_ROWS * PAIR_KINDS * pair_threads::<X>(cols) * 16
}

/// Views of the rows of a backward kernel: with the norm, or of a layer alone.
pub(super) struct NormRows<'a, X> {
    pub dx: CudaViewMut<'a, X>,
    pub x: CudaView<'a, X>,
    pub inv_rms: CudaView<'a, f32>,
    pub w_norm: CudaView<'a, X>,
    pub dims: RmsNormDims,
}

impl Cuda {
    /// Rows of x that a warp of the forward kernels takes: two share what they read of A where there are
    /// enough for all warps. A row's sums are the same either way.
    fn rows_per_warp(&self, tokens: usize) -> usize {
        if tokens >= 16 * self.inner.processors { 2 } else { 1 }
    }

    /// Runs a forward kernel whose own arguments are there.
    ///
    /// # Safety
    /// They must be views of rows of these dims.
    pub(super) unsafe fn run_rows_forward(
        &self,
        kernel: Launch<'_>,
        adapters: CudaView<'_, f32>,
        segments: &Segments<'_, Self>,
        dims: &LoraDims<'_>,
    ) -> Result<()> {
        let (rows, columns) = (self.rows_per_warp(dims.tokens), Columns::new(adapters, dims));
        let kernel = kernel.factors(adapters, dims).stream(segments, dims, columns);
        let kernel = kernel.rows(dims, columns).int(rows);
        let blocks = dims.tokens.div_ceil(rows * FORWARD_THREADS / 32);
        // SAFETY: the caller vouches for the views; segments and adapters out of range are refused.
        unsafe { kernel.run([blocks, 1, 1], FORWARD_THREADS, 0) }
    }

    /// The backward of the products with A, alone or with the norm before them.
    pub(super) fn lora_by_a_backward<X: CudaReal>(
        &self,
        op: &'static str,
        norm: Option<NormRows<'_, X>>,
        d_input: &CudaViewMut<'_, X>,
        grads: &CudaViewMut<'_, f32>,
        input: CudaView<'_, X>,
        adapters: CudaView<'_, f32>,
        segments: &Segments<'_, Self>,
        dims: &LoraDims<'_>,
    ) -> Result<()> {
        if let Some(norm) = &norm
            && let Some(stages) = self.pair_stages(norm, d_input, input, adapters, dims)?
        {
            return self.lora_pair_backward(norm, stages, d_input, grads, input, adapters, segments, dims);
        }
        let (units, columns) = (dims.tail(), Columns::new(adapters, dims));
        let float = size_of::<f32>();
        let ds = A_TILE * units * float;
        // As many units at a time as a block can sum in shared memory; one launch in practice. Where a
        // device has too little for a single one, blocks sum in scratch memory, all units at once.
        let in_shared = self.most_shared::<X>(MODULE, op)?.saturating_sub(ds) / (dims.in_dim.max(1) * float);
        let (name, at_a_time) = match in_shared {
            0 if norm.is_some() => ("rmsnorm_lora_backward_scratch", units),
            0 => ("lora_down_backward_scratch", units),
            n => (op, n),
        };
        let tiles = tiles(A_TILE, segments.count, dims);
        let scratch = self.workspace(scratch_of_a(segments.count, dims, units.min(at_a_time)))?;
        for first in (0..units).step_by(at_a_time) {
            let count = at_a_time.min(units - first);
            let kernel = self.kernel_of::<X>(MODULE, name);
            let kernel = match &norm {
                None => kernel.write(d_input).address::<f32>(scratch.pointer).read(input),
                Some(norm) => {
                    let kernel =
                        kernel.write(&norm.dx).write(d_input).address::<f32>(scratch.pointer).read(norm.x);
                    let kernel = kernel.read(input).read(norm.inv_rms).read(norm.w_norm);
                    kernel.long(norm.dims.x_stride)
                }
            };
            let kernel = kernel.factors(adapters, dims).int(first).int(count).int((first == 0).into());
            let kernel = kernel.stream(segments, dims, columns).rows(dims, columns);
            let shared = if in_shared == 0 { ds } else { count * dims.in_dim * float + ds };
            let threads = row_threads::<X>(dims.in_dim);
            // SAFETY: the callers have checked lengths; segments and adapters out of range are refused.
            unsafe { kernel.run([tiles, 1, 1], threads, shared) }?;
            let size = count * dims.in_dim;
            let first = first * dims.in_dim;
            let partial = Partial { pointer: scratch.pointer, tile: A_TILE, size, first };
            self.add_rows_of_a(grads, partial, segments, dims)?;
        }
        Ok(())
    }

    /// Steps on their way in the kernel for two targets of rank 1 or 2, where shapes and alignment let it run.
    fn pair_stages<X: CudaReal>(
        &self,
        norm: &NormRows<'_, X>,
        d_input: &CudaViewMut<'_, X>,
        input: CudaView<'_, X>,
        adapters: CudaView<'_, f32>,
        dims: &LoraDims<'_>,
    ) -> Result<Option<usize>> {
        let (wide, four) = (16 / size_of::<X>(), 16 / size_of::<f32>());
        let pointers = [norm.dx.pointer(), d_input.pointer(), norm.x.pointer(), input.pointer()];
        let aligned =
            pointers.iter().chain(&[norm.w_norm.pointer(), adapters.pointer()]).all(|p| p.is_multiple_of(16));
        let strides =
            [dims.in_dim, norm.dims.x_stride, row_stride(dims)].iter().all(|n| n.is_multiple_of(wide));
        let of_a = dims.targets.iter().all(|t| t.a_offset.is_multiple_of(four))
            && dims.adapter_stride.is_multiple_of(four);
        let fits = (1..=PAIR_THREADS * wide).contains(&dims.in_dim);
        let fits = fits && dims.targets.len() <= PAIR && dims.rank <= PAIR;
        if !(aligned && strides && of_a && fits) {
            return Ok(None);
        }
        let stages = self.most_shared::<X>(MODULE, PAIR_KERNEL)? / stage_bytes::<X>(dims.in_dim);
        Ok((stages >= PAIR_STAGES - 1).then_some(stages.min(PAIR_STAGES)))
    }

    /// The backward of a norm and the products with A of up to two targets of rank 1 or 2.
    fn lora_pair_backward<X: CudaReal>(
        &self,
        norm: &NormRows<'_, X>,
        stages: usize,
        d_input: &CudaViewMut<'_, X>,
        grads: &CudaViewMut<'_, f32>,
        input: CudaView<'_, X>,
        adapters: CudaView<'_, f32>,
        segments: &Segments<'_, Self>,
        dims: &LoraDims<'_>,
    ) -> Result<()> {
        let (size, columns) = (dims.tail() * dims.in_dim, Columns::new(adapters, dims));
        let tiles = tiles(A_TILE, segments.count, dims);
        let scratch = self.workspace(scratch_of_a(segments.count, dims, dims.tail()))?;
        let kernel = self.kernel_of::<X>(MODULE, PAIR_KERNEL).write(&norm.dx).read(d_input.freeze());
        let kernel = kernel.address::<f32>(scratch.pointer).read(norm.x).read(input).read(norm.inv_rms);
        let kernel = kernel.read(norm.w_norm).int(norm.dims.x_stride).int(stages).factors(adapters, dims);
        let kernel = kernel.stream(segments, dims, columns).rows(dims, columns);
        let (threads, shared) = (pair_threads::<X>(dims.in_dim), stages * stage_bytes::<X>(dims.in_dim));
        // SAFETY: the callers have checked lengths; segments and adapters out of range are refused.
        unsafe { kernel.run([tiles, 1, 1], threads, shared) }?;
        let partial = Partial { pointer: scratch.pointer, tile: A_TILE, size, first: 0 };
        self.add_rows_of_a(grads, partial, segments, dims)
    }

    /// Adds the sums of all tiles to dA; there are no rows of it where A is frozen.
    fn add_rows_of_a(
        &self,
        grads: &CudaViewMut<'_, f32>,
        partial: Partial,
        segments: &Segments<'_, Self>,
        dims: &LoraDims<'_>,
    ) -> Result<()> {
        if grads.len() == 0 {
            return Ok(());
        }
        let len = |_: &LoraTarget| dims.rank * dims.in_dim;
        self.lora_add_rows(grads, partial, segments, dims, |t| t.a_offset, len)
    }
}
