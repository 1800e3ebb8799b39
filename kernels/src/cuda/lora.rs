//! Adapted linear layers on CUDA.
//!
//! A row of the adapter input is x and s side by side, padded to 16 bytes: the products of the
//! base go through the row's first part, the rank-r products (`cu/lora.cu`) through both, one
//! target after the other.

use super::launch::Launch;
use super::rmsnorm::{COLUMN_BLOCK, COLUMN_THREADS};
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::error::{Error, Result, expect_len};
use crate::ops::{Gemm, GemmDims, Linear, LinearDims, LoraDims, LoraLinear, LoraTarget, Out};
use crate::ops::{RmsNorm, RmsNormDims, Segments};
use crate::rng::drop_threshold;

const MODULE: &str = "lora";
/// As in `cu/lora.cu`.
const THREADS: usize = 128;
const ROWS_THREADS: usize = 256;

/// Elements from one row of an adapter input to the next.
fn row_stride(dims: &LoraDims<'_>) -> usize {
    dims.in_dim + dims.tail().next_multiple_of(8)
}

/// Rows of a matrix of adapters or gradients.
fn rows_of(len: usize, dims: &LoraDims<'_>) -> usize {
    len / dims.adapter_stride.max(1)
}

/// Checks everything that all adapted operations have in common, but for numbers that only the device sees.
fn check(op: &'static str, input: usize, segments: &Segments<'_, Cuda>, dims: &LoraDims<'_>) -> Result<()> {
    expect_len(op, "input", input, dims.tokens * row_stride(dims))?;
    expect_len(op, "segments.offsets", segments.offsets.len(), segments.count + 1)?;
    expect_len(op, "segments.adapter", segments.adapter.len(), segments.count)?;
    expect_len(op, "segments.grad_row", segments.grad_row.len(), segments.count)?;
    expect_len(op, "segments.keys", segments.keys.len(), segments.count)?;
    for (n, target) in dims.targets.iter().enumerate() {
        let a_end = target.a_offset + dims.rank * dims.in_dim;
        let b_end = target.b_offset + dims.rank * target.out_len;
        if a_end.max(b_end) > dims.adapter_stride || target.out_start + target.out_len > dims.out_dim {
            let why = format!("target {n} reaches beyond the adapter row or the outputs");
            return Err(Error::Unsupported { op, why });
        }
    }
    super::dropout::check_probability(op, dims.dropout)
}

/// Fails unless norm and adapted layer have the same rows.
fn check_norm(op: &'static str, norm: &RmsNormDims, dims: &LoraDims<'_>) -> Result<()> {
    if (norm.rows, norm.cols) == (dims.tokens, dims.in_dim) {
        return Ok(());
    }
    let found = format!("{} rows of {} for the norm", norm.rows, norm.cols);
    let why = format!("{found}, {} rows of {} for the layer", dims.tokens, dims.in_dim);
    Err(Error::Unsupported { op, why })
}

impl Launch<'_> {
    /// Where tokens and adapters of the stream are; `adapters` is the number of rows of adapters.
    fn stream(
        self,
        cuda: &Cuda,
        segments: &Segments<'_, Cuda>,
        dims: &LoraDims<'_>,
        adapters: usize,
    ) -> Self {
        let launch = self.read(segments.offsets).read(segments.adapter).read(segments.keys);
        launch.pointer(cuda.fault_pointer()).int(segments.count).int(dims.tokens).int(adapters)
    }

    /// The factor of s, and the mask of a target.
    fn drop(self, target: &LoraTarget, dims: &LoraDims<'_>) -> Self {
        let launch = self.float(dims.scale).int(target.site as usize);
        launch.int(drop_threshold(dims.dropout) as usize).float(1.0 / (1.0 - dims.dropout))
    }
}

impl Cuda {
    /// One of the kernels that multiply rows by A: s from x, or dx from ds.
    fn lora_by_a<X: CudaReal>(
        &self,
        name: &'static str,
        input: &CudaViewMut<'_, X>,
        adapters: CudaView<'_, f32>,
        segments: &Segments<'_, Self>,
        dims: &LoraDims<'_>,
    ) -> Result<()> {
        for (n, target) in dims.targets.iter().enumerate() {
            let kernel = self.kernel_of::<X>(MODULE, name).write(input).read(adapters);
            let kernel = kernel.stream(self, segments, dims, rows_of(adapters.len(), dims));
            let kernel = kernel.long(dims.adapter_stride).long(target.a_offset).long(row_stride(dims));
            let kernel = kernel.int(dims.in_dim).int(dims.rank).int(n * dims.rank).drop(target, dims);
            // SAFETY: checked by `check`; segments and adapters out of range are refused.
            unsafe { kernel.run([dims.tokens, 1, 1], THREADS, 0) }?;
        }
        Ok(())
    }

    /// One of the kernels that multiply rows by B: `to` is y or d_input, `from` the input or dy.
    fn lora_by_b<X: CudaReal>(
        &self,
        name: &'static str,
        pointers: impl Fn(&LoraTarget) -> (u64, u64),
        adapters: CudaView<'_, f32>,
        segments: &Segments<'_, Self>,
        dims: &LoraDims<'_>,
    ) -> Result<()> {
        for (n, target) in dims.targets.iter().enumerate() {
            let (to, from) = pointers(target);
            let kernel = self.kernel_of::<X>(MODULE, name).pointer(to).pointer(from).read(adapters);
            let kernel = kernel.stream(self, segments, dims, rows_of(adapters.len(), dims));
            let kernel = kernel.long(dims.adapter_stride).long(target.b_offset).long(row_stride(dims));
            let kernel = kernel.int(dims.in_dim).int(dims.out_dim).int(target.out_len);
            let kernel = kernel.int(dims.rank).int(n * dims.rank);
            // SAFETY: checked by `check` and the callers; segments and adapters out of range are refused.
            unsafe { kernel.run([dims.tokens, 1, 1], THREADS, 0) }?;
        }
        Ok(())
    }

    /// Adds the segments' sums of a matrix of `size` elements to their gradient rows at `offset`.
    fn lora_add_rows(
        &self,
        grads: &CudaViewMut<'_, f32>,
        partial: u64,
        segments: &Segments<'_, Self>,
        dims: &LoraDims<'_>,
        (offset, size): (usize, usize),
    ) -> Result<()> {
        let kernel = self.kernel(MODULE, "lora_gradient_rows").write(grads).pointer(partial);
        let kernel = kernel.read(segments.grad_row).pointer(self.fault_pointer()).int(segments.count);
        let kernel = kernel.int(rows_of(grads.len(), dims)).long(dims.adapter_stride).long(offset).long(size);
        // SAFETY: the target lies within a row (`check`), and rows out of range are refused.
        unsafe { kernel.run([size.div_ceil(ROWS_THREADS), 1, 1], ROWS_THREADS, 0) }
    }
}

impl<X: CudaReal> LoraLinear<X> for Cuda {
    fn lora_input_len(dims: &LoraDims<'_>) -> usize {
        dims.tokens * row_stride(dims)
    }

    fn lora_row_stride(dims: &LoraDims<'_>) -> usize {
        row_stride(dims)
    }

    fn lora_rows<'a>(input: Self::View<'a, X>, _: &LoraDims<'_>) -> Self::View<'a, X> {
        input
    }

    fn lora_rows_mut<'a>(input: Self::ViewMut<'a, X>, _: &LoraDims<'_>) -> Self::ViewMut<'a, X> {
        input
    }

    fn lora_down_forward(
        &self,
        input: CudaViewMut<'_, X>,
        adapters: CudaView<'_, f32>,
        segments: Segments<'_, Self>,
        dims: LoraDims<'_>,
    ) -> Result<()> {
        const OP: &str = "lora_down_forward";
        check(OP, input.len(), &segments, &dims)?;
        self.lora_by_a(OP, &input, adapters, &segments, &dims)
    }

    fn rmsnorm_lora_forward(
        &self,
        mut input: CudaViewMut<'_, X>,
        inv_rms: CudaViewMut<'_, f32>,
        x: CudaView<'_, X>,
        w_norm: CudaView<'_, X>,
        adapters: CudaView<'_, f32>,
        segments: Segments<'_, Self>,
        norm: RmsNormDims,
        dims: LoraDims<'_>,
    ) -> Result<()> {
        const OP: &str = "rmsnorm_lora_forward";
        check(OP, input.len(), &segments, &dims)?;
        check_norm(OP, &norm, &dims)?;
        let norm = RmsNormDims { y_stride: row_stride(&dims), ..norm };
        self.rmsnorm_forward(input.reborrow(), inv_rms, x, w_norm, norm)?;
        self.lora_down_forward(input, adapters, segments, dims)
    }

    fn lora_linear_forward(
        &self,
        y: CudaViewMut<'_, X>,
        input: CudaView<'_, X>,
        w: CudaView<'_, X>,
        residual: Option<CudaView<'_, X>>,
        adapters: CudaView<'_, f32>,
        segments: Segments<'_, Self>,
        dims: LoraDims<'_>,
    ) -> Result<()> {
        check("lora_linear_forward", input.len(), &segments, &dims)?;
        let mut y = y;
        let linear = LinearDims {
            x_stride: row_stride(&dims),
            ..LinearDims::new(dims.tokens, dims.in_dim, dims.out_dim)
        };
        self.linear_forward(y.reborrow(), input, w, None, residual, linear)?;
        let at =
            |target: &LoraTarget| (y.pointer() + (target.out_start * size_of::<X>()) as u64, input.pointer());
        self.lora_by_b::<X>("lora_up_forward", at, adapters, &segments, &dims)
    }

    fn lora_linear_backward(
        &self,
        d_input: CudaViewMut<'_, X>,
        grads: CudaViewMut<'_, f32>,
        dy: CudaView<'_, X>,
        input: CudaView<'_, X>,
        w: CudaView<'_, X>,
        adapters: CudaView<'_, f32>,
        segments: Segments<'_, Self>,
        dims: LoraDims<'_>,
    ) -> Result<()> {
        const OP: &str = "lora_linear_backward";
        check(OP, input.len(), &segments, &dims)?;
        expect_len(OP, "d_input", d_input.len(), input.len())?;
        expect_len(OP, "dy", dy.len(), dims.tokens * dims.out_dim)?;
        expect_len(OP, "w", w.len(), dims.out_dim * dims.in_dim)?;
        let mut d_input = d_input;
        let product = GemmDims::new(dims.tokens, dims.in_dim, dims.out_dim, false, false);
        let stride = row_stride(&dims);
        self.gemm(d_input.reborrow(), dy, w, GemmDims { c_stride: stride, ..product })?;
        let dy_at = |target: &LoraTarget| dy.pointer() + (target.out_start * size_of::<X>()) as u64;
        let at = |target: &LoraTarget| (d_input.pointer(), dy_at(target));
        self.lora_by_b::<X>("lora_up_backward", at, adapters, &segments, &dims)?;
        for (n, target) in dims.targets.iter().enumerate() {
            let size = target.out_len * dims.rank;
            let scratch = self.workspace(segments.count * size * size_of::<f32>())?;
            let kernel = self.kernel_of::<X>(MODULE, "lora_gradient_b").pointer(scratch.pointer);
            let kernel = kernel.pointer(dy_at(target)).read(input).stream(self, &segments, &dims, 0);
            let kernel = kernel.long(stride).int(dims.in_dim).int(dims.out_dim).int(target.out_len);
            let kernel = kernel.int(dims.rank).int(n * dims.rank);
            let grid = [target.out_len.div_ceil(COLUMN_BLOCK), segments.count, dims.rank];
            // SAFETY: the lengths above; segments out of range are refused.
            unsafe { kernel.run(grid, COLUMN_THREADS, 0) }?;
            self.lora_add_rows(&grads, scratch.pointer, &segments, &dims, (target.b_offset, size))?;
        }
        Ok(())
    }

    fn lora_down_backward(
        &self,
        d_input: CudaViewMut<'_, X>,
        grads: CudaViewMut<'_, f32>,
        input: CudaView<'_, X>,
        adapters: CudaView<'_, f32>,
        segments: Segments<'_, Self>,
        dims: LoraDims<'_>,
    ) -> Result<()> {
        const OP: &str = "lora_down_backward";
        check(OP, input.len(), &segments, &dims)?;
        expect_len(OP, "d_input", d_input.len(), input.len())?;
        self.lora_by_a(OP, &d_input, adapters, &segments, &dims)?;
        for (n, target) in dims.targets.iter().enumerate() {
            let size = dims.rank * dims.in_dim;
            let scratch = self.workspace(segments.count * size * size_of::<f32>())?;
            let kernel = self.kernel_of::<X>(MODULE, "lora_gradient_a").pointer(scratch.pointer);
            let kernel = kernel.read(input).read(d_input.freeze()).stream(self, &segments, &dims, 0);
            let kernel = kernel.long(row_stride(&dims)).int(dims.in_dim).int(dims.rank).int(n * dims.rank);
            let kernel = kernel.drop(target, &dims);
            let grid = [dims.in_dim.div_ceil(COLUMN_BLOCK), segments.count, dims.rank];
            // SAFETY: the lengths above; segments out of range are refused.
            unsafe { kernel.run(grid, COLUMN_THREADS, 0) }?;
            self.lora_add_rows(&grads, scratch.pointer, &segments, &dims, (target.a_offset, size))?;
        }
        Ok(())
    }

    fn rmsnorm_lora_backward(
        &self,
        dx: CudaViewMut<'_, X>,
        mut d_input: CudaViewMut<'_, X>,
        grads: CudaViewMut<'_, f32>,
        x: CudaView<'_, X>,
        input: CudaView<'_, X>,
        inv_rms: CudaView<'_, f32>,
        w_norm: CudaView<'_, X>,
        adapters: CudaView<'_, f32>,
        segments: Segments<'_, Self>,
        norm: RmsNormDims,
        dims: LoraDims<'_>,
    ) -> Result<()> {
        check_norm("rmsnorm_lora_backward", &norm, &dims)?;
        self.lora_down_backward(d_input.reborrow(), grads, input, adapters, segments, dims)?;
        let norm = RmsNormDims { y_stride: row_stride(&dims), ..norm };
        self.rmsnorm_backward(dx, None, d_input.freeze(), x, inv_rms, w_norm, norm, Out::Add)
    }
}
