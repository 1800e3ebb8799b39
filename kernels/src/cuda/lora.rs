//! Adapted linear layers on CUDA.
//!
//! A row of the adapter input is x and, behind it, room for s. While the adapters' columns fit
//! into [`ROOM`], each adapter has its own of them, and a token zeros in the others; rows of frozen
//! weights have the same room, and B is written there before a product. Then one matrix product
//! is the layer with all its adapters, and another one gives both gradients. Adapters that are
//! more than that share the columns, and have passes of their own over y and dy, as have weights
//! without room. Which way is taken depends on shapes alone.
//!
//! Products with A are fused with the norm and with each other ([`lora_rows`]), those with B
//! and the sums of gradients are in `cu/lora.cu`.

use super::device::workspace_bytes;
use super::launch::Launch;
use super::lora_rows::{self, NormRows};
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::error::{Error, Result};
use crate::ops::{
    Gemm, GemmDims, LoraDims, LoraDownBackward, LoraLinear, LoraLinearBackward, LoraLinearForward,
    LoraTarget, RmsNorm, RmsNormBackward, RmsNormDims, RmsNormForward, RmsNormLoraBackward,
    RmsNormLoraForward, Segments,
};
use crate::rng::drop_threshold;
use crate::{View, ViewMut};

const MODULE: &str = "lora";
/// Columns behind x, and behind the rows of a frozen weight: 8 adapters of 4 targets at rank 2.
const ROOM: usize = 64;
/// Used columns of the room are a multiple of this: the depth of the tiles of large products. (With 3,648 columns
/// of x and room an H100 takes 7 % longer than with 3,584; with 3,600 it took 8 %.)
const DEPTH: usize = 64;
/// As in `cu/lora.cuh`.
const MAX_TARGETS: usize = 4;
/// As in `cu/lora.cu`: threads of its kernels and of the sums of gradients, and tokens of a tile of dB.
const THREADS: usize = 128;
const SUM_THREADS: usize = 256;
const B_TILE: usize = 64;
/// Elements from one row of an adapter input to the next.
pub(super) fn row_stride(dims: &LoraDims<'_>) -> usize {
    match dims.tail() {
        0 => dims.in_dim,
        tail => (dims.in_dim + tail.max(ROOM)).next_multiple_of(8),
    }
}

/// Elements from one row of a frozen weight to the next.
fn weight_stride(in_dim: usize) -> usize {
    (in_dim + ROOM).next_multiple_of(8)
}

/// Rows of a matrix of adapters or gradients.
fn rows_of(len: usize, dims: &LoraDims<'_>) -> usize {
    len / dims.adapter_stride.max(1)
}

/// How the columns behind x are used.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    /// Adapters in the matrix.
    adapters: usize,
    /// From one adapter's to the next one's; 0 where all share them.
    step: usize,
    /// Columns that are written.
    width: usize,
}

impl Columns {
    pub fn new(adapters: CudaView<'_, f32>, dims: &LoraDims<'_>) -> Self {
        let (adapters, tail) = (rows_of(adapters.len(), dims), dims.tail());
        match adapters.saturating_mul(tail) {
            all @ 0..=ROOM => Self { adapters, step: tail, width: all.next_multiple_of(DEPTH) },
            _ => Self { adapters, step: 0, width: tail },
        }
    }
}

/// Tiles of at most so many tokens of one segment, at most.
pub(super) fn tiles(tile: usize, segments: usize, dims: &LoraDims<'_>) -> usize {
    dims.tokens.div_ceil(tile) + segments
}

/// Bytes of the sums of all tiles of dB.
fn scratch_of_b(segments: usize, dims: &LoraDims<'_>) -> usize {
    let size: usize = dims.targets.iter().map(|target| target.out_len * dims.rank).sum();
    tiles(B_TILE, segments, dims) * size * size_of::<f32>()
}

/// Fails unless the kernels have room for the targets.
fn check_targets(op: &'static str, dims: &LoraDims<'_>) -> Result<()> {
    match dims.targets.len() {
        0..=MAX_TARGETS => Ok(()),
        n => {
            let why = format!("{n} targets, at most {MAX_TARGETS} are possible");
            Err(Error::Unsupported { op, why })
        }
    }
}

/// The columns behind the rows of a frozen weight, where B of all adapters is written before a product. They are no part of
/// the weight: no view reads them but the product that follows, so they may be written while views of the weight are lent.
struct WeightColumns<'a, X> {
    /// The weight with its columns, `[out_dim, stride]`.
    rows: CudaView<'a, X>,
    stride: usize,
}

impl<'a, X: CudaReal> WeightColumns<'a, X> {
    /// Those of a weight of a layer, unless it has none.
    fn of(w: CudaView<'a, X>, dims: &LoraDims<'_>) -> Option<Self> {
        let stride = weight_stride(dims.in_dim);
        (w.len() == dims.out_dim * stride).then_some(Self { rows: w, stride })
    }
}

impl Launch<'_> {
    /// A `X*` to a weight whose columns are written.
    fn write_columns<X: CudaReal>(self, columns: &WeightColumns<'_, X>) -> Self {
        self.address::<X>(columns.rows.pointer())
    }

    /// Where tokens and adapters of the stream are, and rows and columns of an adapter input.
    pub(super) fn stream(self, segments: &Segments<'_, Cuda>, dims: &LoraDims<'_>, columns: Columns) -> Self {
        let launch = self.read(segments.offsets).read(segments.adapter).read(segments.keys);
        let launch = launch.fault().int(segments.count).int(dims.tokens);
        launch.int(columns.adapters)
    }

    pub(super) fn rows(self, dims: &LoraDims<'_>, columns: Columns) -> Self {
        self.long(row_stride(dims)).int(dims.in_dim).int(columns.step).int(columns.width)
    }

    /// A `u64` for every target.
    fn long_per_target(self, dims: &LoraDims<'_>, of: impl Fn(&LoraTarget) -> usize) -> Self {
        (0..MAX_TARGETS).fold(self, |launch, n| launch.long(dims.targets.get(n).map_or(0, &of)))
    }

    /// A `u32` for every target.
    fn int_per_target(self, dims: &LoraDims<'_>, of: impl Fn(&LoraTarget) -> usize) -> Self {
        (0..MAX_TARGETS).fold(self, |launch, n| launch.int(dims.targets.get(n).map_or(0, &of)))
    }

    /// A of all targets, the factor of s, and the masks.
    pub(super) fn factors(self, adapters: CudaView<'_, f32>, dims: &LoraDims<'_>) -> Self {
        let launch = self.read(adapters).long(dims.adapter_stride).long_per_target(dims, |t| t.a_offset);
        let launch = launch.int_per_target(dims, |t| t.site as usize);
        let launch = launch.int(dims.targets.len()).int(dims.rank).float(dims.scale);
        launch.int(drop_threshold(dims.dropout) as usize).float(1.0 / (1.0 - dims.dropout))
    }

    /// B of all targets.
    fn outputs(self, dims: &LoraDims<'_>) -> Self {
        let launch = self.long_per_target(dims, |t| t.b_offset).int_per_target(dims, |t| t.out_start);
        launch.int_per_target(dims, |t| t.out_len).int(dims.targets.len()).int(dims.rank)
    }
}

/// Sums of a gradient in scratch memory, and where they belong.
pub(super) struct Partial {
    pub pointer: u64,
    /// Tokens of a tile.
    pub tile: usize,
    /// Elements of a tile, beginning with `first` of the gradient.
    pub size: usize,
    pub first: usize,
}

impl Cuda {
    /// Writes B of all adapters into the columns of a weight that are theirs.
    fn lora_weight_tail<X: CudaReal>(
        &self,
        w: &WeightColumns<'_, X>,
        adapters: CudaView<'_, f32>,
        dims: &LoraDims<'_>,
        columns: Columns,
    ) -> Result<()> {
        let kernel = self.kernel_of::<X>(MODULE, "lora_weight_tail").write_columns(w).read(adapters);
        let kernel = kernel.long(dims.adapter_stride).long(w.stride).int(dims.out_dim);
        let kernel = kernel.int(dims.in_dim).int(columns.width).int(columns.adapters).outputs(dims);
        let chunks = (dims.out_dim * columns.width).div_ceil(16 / size_of::<X>());
        let blocks = self.blocks_for(chunks, THREADS);
        // SAFETY: every row of the weight has as many columns behind it, and the kernel writes nothing else.
        unsafe { kernel.run([blocks, 1, 1], THREADS, 0) }
    }

    /// One of the passes that multiply rows by B: `to` is y or d_input, `from` the input or dy.
    fn lora_by_b<X: CudaReal>(
        &self,
        name: &'static str,
        pointers: impl Fn(&LoraTarget) -> (u64, u64),
        adapters: CudaView<'_, f32>,
        segments: &Segments<'_, Self>,
        dims: &LoraDims<'_>,
    ) -> Result<()> {
        let columns = Columns::new(adapters, dims);
        for (n, target) in dims.targets.iter().enumerate() {
            let (to, from) = pointers(target);
            let kernel = self.kernel_of::<X>(MODULE, name).address::<X>(to).address::<X>(from).read(adapters);
            let kernel = kernel.stream(segments, dims, columns).long(dims.adapter_stride);
            let kernel = kernel.long(target.b_offset).rows(dims, columns).int(dims.out_dim);
            let kernel = kernel.int(target.out_len).int(dims.rank).int(n * dims.rank);
            // SAFETY: checked by the callers; segments and adapters out of range are refused.
            unsafe { kernel.run([dims.tokens, 1, 1], THREADS, 0) }?;
        }
        Ok(())
    }

    /// Adds the sums of all tiles to their gradient rows. `len` is the length of a target's
    /// gradient, `offset` its place.
    pub(super) fn lora_add_rows(
        &self,
        grads: &CudaViewMut<'_, f32>,
        partial: Partial,
        segments: &Segments<'_, Self>,
        dims: &LoraDims<'_>,
        offset: impl Fn(&LoraTarget) -> usize,
        len: impl Fn(&LoraTarget) -> usize,
    ) -> Result<()> {
        let Partial { pointer, tile, size, first } = partial;
        let kernel = self.kernel(MODULE, "lora_gradient_rows").write(grads).address::<f32>(pointer);
        let kernel = kernel.read(segments.offsets).read(segments.grad_row).fault();
        let kernel = kernel.int(segments.count).int(dims.tokens).int(rows_of(grads.len(), dims)).int(tile);
        let kernel = kernel.long(dims.adapter_stride).long(first).long(size).long_per_target(dims, offset);
        let end = |n: usize| dims.targets.iter().take(n + 1).map(&len).sum();
        let kernel = (0..MAX_TARGETS).fold(kernel, |kernel, n| kernel.long(end(n)));
        // SAFETY: the targets lie within a row (`LoraDims::check_input`), and rows out of range are refused.
        unsafe { kernel.run([size.div_ceil(32), 1, 1], SUM_THREADS, 0) }
    }

    /// `dB += dyᵀ s`.
    fn lora_gradient_b<X: CudaReal>(
        &self,
        grads: &CudaViewMut<'_, f32>,
        dy: CudaView<'_, X>,
        input: CudaView<'_, X>,
        segments: &Segments<'_, Self>,
        dims: &LoraDims<'_>,
        columns: Columns,
    ) -> Result<()> {
        let len = |target: &LoraTarget| target.out_len * dims.rank;
        let size: usize = dims.targets.iter().map(len).sum();
        let tiles = tiles(B_TILE, segments.count, dims);
        let scratch = self.workspace(scratch_of_b(segments.count, dims))?;
        let kernel = self.kernel_of::<X>(MODULE, "lora_gradient_b").address::<f32>(scratch.pointer);
        let kernel = kernel.read(dy).read(input).stream(segments, dims, columns).rows(dims, columns);
        let kernel = kernel.int(dims.out_dim).long(size).outputs(dims);
        let longest = dims.targets.iter().map(|t| t.out_len).max().unwrap_or(0);
        let grid = [tiles, longest.div_ceil(THREADS * 16 / size_of::<X>()), dims.targets.len()];
        // SAFETY: the lengths were checked; segments and adapters out of range are refused.
        unsafe { kernel.run(grid, THREADS, 0) }?;
        let partial = Partial { pointer: scratch.pointer, tile: B_TILE, size, first: 0 };
        self.lora_add_rows(grads, partial, segments, dims, |t| t.b_offset, len)
    }
}

impl<X: CudaReal> LoraLinear<X> for Cuda {
    fn lora_input_len(dims: &LoraDims<'_>) -> usize {
        dims.tokens * row_stride(dims)
    }

    fn lora_row_stride(dims: &LoraDims<'_>) -> usize {
        row_stride(dims)
    }

    fn lora_weight_stride(in_dim: usize) -> usize {
        weight_stride(in_dim)
    }

    fn lora_scratch(dims: &LoraDims<'_>, segments: usize) -> usize {
        match dims.tail() {
            0 => 0,
            // All units at a time, which is the most.
            units => workspace_bytes(
                scratch_of_b(segments, dims).max(lora_rows::scratch_of_a(segments, dims, units)),
            ),
        }
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
        dims.check_input::<Self, X>(OP, input.len(), &segments)?;
        check_targets(OP, &dims)?;
        if dims.tail() == 0 {
            return Ok(());
        }
        let kernel = self.kernel_of::<X>(lora_rows::MODULE, OP).write(&input);
        // SAFETY: the lengths were checked.
        unsafe { self.run_rows_forward(kernel, adapters, &segments, &dims) }
    }

    fn rmsnorm_lora_forward(&self, args: RmsNormLoraForward<Self, X>) -> Result<()> {
        args.check()?;
        let RmsNormLoraForward { input, inv_rms, x, w_norm, adapters, segments, norm, dims } = args;
        const OP: &str = "rmsnorm_lora_forward";
        check_targets(OP, &dims)?;
        if dims.tail() == 0 {
            let norm = RmsNormDims { y_stride: row_stride(&dims), ..norm };
            return self.rmsnorm_forward(RmsNormForward { y: input, inv_rms, x, w: w_norm, dims: norm });
        }
        let kernel = self.kernel_of::<X>(lora_rows::MODULE, OP).write(&input).write(&inv_rms).read(x);
        let kernel = kernel.read(w_norm).long(norm.x_stride).float(norm.eps);
        // SAFETY: the lengths were checked.
        unsafe { self.run_rows_forward(kernel, adapters, &segments, &dims) }
    }

    fn lora_linear_forward(&self, args: LoraLinearForward<Self, X>) -> Result<()> {
        args.check()?;
        let LoraLinearForward { mut y, input, w, bias, residual, adapters, segments, dims } = args;
        const OP: &str = "lora_linear_forward";
        check_targets(OP, &dims)?;
        let (columns, of_w) = (Columns::new(adapters, &dims), WeightColumns::of(w, &dims));
        let w_stride = of_w.as_ref().map_or(dims.in_dim, |of_w| of_w.stride);
        let fused = of_w.filter(|_| dims.tail() > 0 && columns.step > 0);
        if let Some(of_w) = &fused {
            self.lora_weight_tail(of_w, adapters, &dims, columns)?;
        }
        let depth = if fused.is_some() { dims.in_dim + columns.width } else { dims.in_dim };
        let product = GemmDims::new(dims.tokens, dims.out_dim, depth, false, true);
        let product = GemmDims { a_stride: row_stride(&dims), b_stride: w_stride, ..product };
        let start = (residual.map_or(0, CudaView::pointer), dims.out_dim);
        self.product(OP, &y.reborrow(), input, w, bias, start, &product)?;
        if fused.is_some() {
            return Ok(());
        }
        let at =
            |target: &LoraTarget| (y.pointer() + (target.out_start * size_of::<X>()) as u64, input.pointer());
        self.lora_by_b::<X>("lora_up_forward", at, adapters, &segments, &dims)
    }

    fn lora_linear_backward(&self, args: LoraLinearBackward<Self, X>) -> Result<()> {
        args.check()?;
        let LoraLinearBackward { mut d_input, grads, dy, input, w, adapters, segments, dims } = args;
        const OP: &str = "lora_linear_backward";
        check_targets(OP, &dims)?;
        let (columns, of_w) = (Columns::new(adapters, &dims), WeightColumns::of(w, &dims));
        let w_stride = of_w.as_ref().map_or(dims.in_dim, |of_w| of_w.stride);
        let fused = of_w.filter(|_| dims.tail() > 0 && columns.step > 0);
        if let Some(of_w) = &fused {
            // Other adapters may have been there since the forward pass.
            self.lora_weight_tail(of_w, adapters, &dims, columns)?;
        }
        let width = if fused.is_some() { dims.in_dim + columns.width } else { dims.in_dim };
        let product = GemmDims::new(dims.tokens, width, dims.out_dim, false, false);
        let product = GemmDims { b_stride: w_stride, c_stride: row_stride(&dims), ..product };
        self.gemm(d_input.reborrow(), dy, w, product)?;
        if dims.tail() == 0 {
            return Ok(());
        }
        if fused.is_none() {
            let dy_at = |target: &LoraTarget| dy.pointer() + (target.out_start * size_of::<X>()) as u64;
            let at = |target: &LoraTarget| (d_input.pointer(), dy_at(target));
            self.lora_by_b::<X>("lora_up_backward", at, adapters, &segments, &dims)?;
        }
        self.lora_gradient_b(&grads, dy, input, &segments, &dims, columns)
    }

    fn lora_down_backward(&self, args: LoraDownBackward<Self, X>) -> Result<()> {
        args.check()?;
        let LoraDownBackward { d_input, grads, input, adapters, segments, dims } = args;
        const OP: &str = "lora_down_backward";
        check_targets(OP, &dims)?;
        if dims.tail() == 0 {
            return Ok(());
        }
        self.lora_by_a_backward(OP, None, &d_input, &grads, input, adapters, &segments, &dims)
    }

    fn rmsnorm_lora_backward(&self, args: RmsNormLoraBackward<Self, X>) -> Result<()> {
        args.check()?;
        let RmsNormLoraBackward {
            dx,
            d_input,
            grads,
            x,
            input,
            inv_rms,
            w_norm,
            adapters,
            segments,
            norm,
            dims,
        } = args;
        const OP: &str = "rmsnorm_lora_backward";
        check_targets(OP, &dims)?;
        if dims.tail() == 0 {
            let norm = RmsNormDims { y_stride: row_stride(&dims), ..norm };
            let out = crate::ops::Out::Add;
            return self.rmsnorm_backward(RmsNormBackward {
                dx,
                dw: None,
                dy: d_input.freeze(),
                x,
                inv_rms,
                w: w_norm,
                dims: norm,
                out,
            });
        }
        let rows = NormRows { dx, x, inv_rms, w_norm, dims: norm };
        self.lora_by_a_backward(OP, Some(rows), &d_input, &grads, input, adapters, &segments, &dims)
    }
}
