//! Matrix products and linear layers on CUDA: by cuBLASLt where it is installed and has something
//! for the shape, otherwise by kernels of our own.

use super::product::Product;
use super::profile::Work;
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::error::{Error, Result, expect_at_least};
use crate::ops::{
    Gemm, GemmDims, Linear, LinearBackwardInput, LinearBackwardWeight, LinearDims, LinearForward, Out,
};
use crate::{View, ViewMut};

const MODULE: &str = "gemm";
/// As in `cu/gemm.cu`: depth and number of the stages of a tile, and padding of its rows.
const STAGE_DEPTH: usize = 32;
const STAGES: usize = 3;
const PAD: usize = 8;

/// Which kernel: the tile's edge decides speed, never the result.
struct Choice {
    name: &'static str,
    tile: usize,
    threads: usize,
    /// Bytes of dynamic shared memory.
    shared: usize,
}

/// Names of the kernels with the small and the large tile.
fn names(trans_a: bool, trans_b: bool) -> [&'static str; 2] {
    match (trans_a, trans_b) {
        (false, false) => ["gemm_nn_64", "gemm_nn_128"],
        (false, true) => ["gemm_nt_64", "gemm_nt_128"],
        (true, false) => ["gemm_tn_64", "gemm_tn_128"],
        (true, true) => ["gemm_tt_64", "gemm_tt_128"],
    }
}

/// Bytes of the stages of a tile that has `edge` rows of op(A) or columns of op(B).
fn stage_bytes(edge: usize, depth_in_rows: bool) -> usize {
    let (rows, cols) = if depth_in_rows { (edge, STAGE_DEPTH) } else { (STAGE_DEPTH, edge) };
    STAGES * rows * (cols + PAD) * size_of::<u16>()
}

impl Choice {
    /// For bf16: large tiles where there are enough of them for every multiprocessor.
    fn tensor_cores(dims: &GemmDims, processors: usize) -> Self {
        let large = dims.m.div_ceil(128) * dims.n.div_ceil(128) >= processors;
        let (tile, threads) = if large { (128, 256) } else { (64, 128) };
        let shared = stage_bytes(tile, !dims.trans_a) + stage_bytes(tile, dims.trans_b);
        let name = names(dims.trans_a, dims.trans_b)[usize::from(large)];
        Self { name, tile, threads, shared }
    }

    /// For f32.
    fn plain(dims: &GemmDims) -> Self {
        Self { name: names(dims.trans_a, dims.trans_b)[0], tile: 64, threads: 256, shared: 0 }
    }
}

/// Fails unless the three matrices hold what `dims` says.
fn check(op: &'static str, c: usize, a: usize, b: usize, dims: &GemmDims) -> Result<()> {
    let a_shape = if dims.trans_a { (dims.k, dims.m) } else { (dims.m, dims.k) };
    let b_shape = if dims.trans_b { (dims.n, dims.k) } else { (dims.k, dims.n) };
    let matrices = [
        ("a", a, a_shape, dims.a_stride),
        ("b", b, b_shape, dims.b_stride),
        ("c", c, (dims.m, dims.n), dims.c_stride),
    ];
    for (what, found, (rows, cols), stride) in matrices {
        if rows > 1 && stride < cols {
            let why = format!("rows of `{what}` have {cols} values but are only {stride} apart");
            return Err(Error::Unsupported { op, why });
        }
        let reach = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols };
        expect_at_least(op, what, found, reach)?;
    }
    Ok(())
}

/// A product's operations, and the bytes of its matrices, which bound thin ones.
fn work_of<X, C>(dims: &GemmDims) -> Work {
    let [m, n, k] = [dims.m, dims.n, dims.k].map(|n| n as f64);
    let bytes = (m * k + k * n) * size_of::<X>() as f64 + m * n * size_of::<C>() as f64;
    Work { flops: 2.0 * m * n * k, bytes }
}

impl Cuda {
    /// `c = alpha · op(a) op(b) [+ bias] [+ start]`, with `C` the inputs' type or f32. `start` is an
    /// address and a row stride of a matrix like c, which may be c itself.
    pub(super) fn product<X: CudaReal, C: CudaReal>(
        &self,
        op: &'static str,
        c: &CudaViewMut<'_, C>,
        a: CudaView<'_, X>,
        b: CudaView<'_, X>,
        bias: Option<CudaView<'_, X>>,
        start: (u64, usize),
        dims: &GemmDims,
    ) -> Result<()> {
        check(op, c.len(), a.len(), b.len(), dims)?;
        if self.library_product(c, a, b, bias, start, dims)? {
            return Ok(());
        }
        let (choice, suffix) = match (X::SUFFIX, C::SUFFIX) {
            ("f32", _) => (Choice::plain(dims), "f32"),
            (_, "f32") => (Choice::tensor_cores(dims, self.inner.processors), "bf16_f32"),
            _ => (Choice::tensor_cores(dims, self.inner.processors), "bf16"),
        };
        let kernel = self.kernel_typed(MODULE, choice.name, suffix).write(c).read(a).read(b).read_if(bias);
        let kernel = kernel.address::<C>(start.0).long(dims.a_stride).long(dims.b_stride).long(dims.c_stride);
        let kernel = kernel.long(start.1).int(dims.m).int(dims.n).int(dims.k).float(dims.alpha);
        let grid = [dims.n.div_ceil(choice.tile), dims.m.div_ceil(choice.tile), 1];
        let kernel = kernel.work(work_of::<X, C>(dims));
        // SAFETY: checked above; `start` is null or a matrix that the callers have checked.
        unsafe { kernel.run(grid, choice.threads, choice.shared) }
    }

    /// The same by cuBLASLt; false where it is not there or has nothing for this product.
    fn library_product<X: CudaReal, C: CudaReal>(
        &self,
        c: &CudaViewMut<'_, C>,
        a: CudaView<'_, X>,
        b: CudaView<'_, X>,
        bias: Option<CudaView<'_, X>>,
        (start, start_stride): (u64, usize),
        dims: &GemmDims,
    ) -> Result<bool> {
        let Ok(library) = &self.inner.products else { return Ok(false) };
        if dims.m == 0 || dims.n == 0 || dims.k == 0 || (bias.is_some() && X::DTYPE != C::DTYPE) {
            return Ok(false);
        }
        let product = Product {
            inputs: X::DTYPE,
            output: C::DTYPE,
            a: a.pointer(),
            b: b.pointer(),
            c: c.pointer(),
            bias: bias.map_or(0, CudaView::pointer),
            start,
            start_stride,
            dims: *dims,
        };
        let queue = self.queue()?;
        // SAFETY: as of our own kernel: checked by `product` and its callers.
        let run = || unsafe { library.run(queue, self.is_second, &product) };
        let GemmDims { m, n, k, .. } = *dims;
        self.measured_if(|| format!("product {m}x{n}x{k}").into(), work_of::<X, C>(dims), run)
    }

    /// [`Gemm::gemm`] with C of the inputs' type or f32.
    pub(super) fn gemm_into<X: CudaReal, C: CudaReal>(
        &self,
        op: &'static str,
        c: &CudaViewMut<'_, C>,
        a: CudaView<'_, X>,
        b: CudaView<'_, X>,
        dims: GemmDims,
    ) -> Result<()> {
        let start = if dims.out == Out::Add { c.pointer() } else { 0 };
        self.product(op, c, a, b, None, (start, dims.c_stride), &dims)
    }
}

impl<X: CudaReal> Gemm<X> for Cuda {
    fn gemm(
        &self,
        c: CudaViewMut<'_, X>,
        a: CudaView<'_, X>,
        b: CudaView<'_, X>,
        dims: GemmDims,
    ) -> Result<()> {
        self.gemm_into("gemm", &c, a, b, dims)
    }
}

impl<X: CudaReal> Linear<X> for Cuda {
    fn linear_forward(&self, args: LinearForward<Self, X>) -> Result<()> {
        args.check()?;
        let LinearForward { y, x, w, bias, residual, dims } = args;
        const OP: &str = "linear_forward";
        let LinearDims { rows, in_dim, out_dim, x_stride } = dims;
        let product = GemmDims { a_stride: x_stride, ..GemmDims::new(rows, out_dim, in_dim, false, true) };
        let start = (residual.map_or(0, CudaView::pointer), out_dim);
        self.product(OP, &y, x, w, bias, start, &product)
    }

    fn linear_backward_input(&self, args: LinearBackwardInput<Self, X>) -> Result<()> {
        args.check()?;
        let LinearBackwardInput { dx, dy, w, dims, out } = args;
        const OP: &str = "linear_backward_input";
        let LinearDims { rows, in_dim, out_dim, x_stride } = dims;
        let product = GemmDims::new(rows, in_dim, out_dim, false, false);
        self.gemm_into(OP, &dx, dy, w, GemmDims { c_stride: x_stride, out, ..product })
    }

    fn linear_backward_weight(&self, args: LinearBackwardWeight<Self, X>) -> Result<()> {
        args.check()?;
        let LinearBackwardWeight { dw, dbias, dy, x, dims, out } = args;
        const OP: &str = "linear_backward_weight";
        let LinearDims { rows, in_dim, out_dim, x_stride } = dims;
        if let Some(dbias) = &dbias {
            self.sum_rows(dbias, dy, rows, out_dim, out)?;
        }
        let product = GemmDims::new(out_dim, in_dim, rows, true, false);
        self.gemm_into(OP, &dw, dy, x, GemmDims { b_stride: x_stride, out, ..product })
    }
}
