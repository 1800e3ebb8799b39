//! T5 attention on the tensor cores (`cu/t5_tiles.cu`): which shapes have a kernel there, and its launch.

use super::launch::Launch;
use super::{Cuda, CudaReal};
use crate::ViewMut;
use crate::ops::T5AttentionDims;

/// As in `cu/t5_tiles.cu`: the size of heads, rows of a tile, the most tiles of queries in a block, the
/// padding of rows in shared memory, and the columns of a block that sums over examples.
const MODULE: &str = "t5_tiles";
const HEAD_DIM: usize = 64;
const TILE: usize = 16;
const MAX_TILES: usize = 6;
const PAD: usize = 8;
const COLUMN_BLOCK: usize = 32;

/// The kernels forward and backward for at most so many keys.
const KERNELS: [(usize, &str, &str); 4] = [
    (32, "t5_attention_forward_32", "t5_attention_backward_32"),
    (48, "t5_attention_forward_48", "t5_attention_backward_48"),
    (64, "t5_attention_forward_64", "t5_attention_backward_64"),
    (96, "t5_attention_forward_96", "t5_attention_backward_96"),
];

/// A kernel and the size of its launch.
pub(super) struct Plan {
    name: &'static str,
    grid: [usize; 3],
    threads: usize,
    /// Bytes.
    shared: usize,
}

/// The kernels for these dimensions and memory at these addresses, if there are any.
fn kernels<X: CudaReal>(
    dims: &T5AttentionDims,
    addresses: &[u64],
) -> Option<(usize, &'static str, &'static str)> {
    let aligned = addresses.iter().all(|a| a.is_multiple_of(16));
    let suits = X::SUFFIX == "bf16" && dims.head_dim == HEAD_DIM && aligned;
    KERNELS.into_iter().find(|(most, ..)| suits && dims.keys <= *most)
}

/// Bytes of so many rows of `cols` in shared memory.
fn rows_of(cols: usize, rows: usize) -> usize {
    rows * (cols + PAD) * size_of::<u16>()
}

impl Plan {
    /// Forward, with a bias from a table of so many buckets or none.
    pub fn forward<X: CudaReal>(
        cuda: &Cuda,
        dims: &T5AttentionDims,
        buckets: Option<usize>,
        addresses: &[u64],
    ) -> Option<Self> {
        let (most, name, _) = kernels::<X>(dims, addresses).filter(|_| buckets != Some(0))?;
        // A second warp helps a single tile of queries to load keys and values.
        let tiles = dims.queries.div_ceil(TILE);
        let warps = tiles.clamp(2, MAX_TILES);
        let biases = buckets.unwrap_or(0) * size_of::<f32>();
        let shared = rows_of(HEAD_DIM, warps * TILE + 2 * most) + biases;
        let grid = [tiles.div_ceil(warps), dims.heads, dims.batch];
        Self { name, grid, threads: warps * 32, shared }.fitting(cuda)
    }

    /// Backward, with sums of the scores' gradients for so many buckets or none. They go to the place of the
    /// scores' gradients themselves, if it is large enough.
    pub fn backward<X: CudaReal>(
        cuda: &Cuda,
        dims: &T5AttentionDims,
        buckets: Option<usize>,
        addresses: &[u64],
    ) -> Option<Self> {
        let (most, _, name) = kernels::<X>(dims, addresses).filter(|_| buckets != Some(0))?;
        let tiles = dims.queries.div_ceil(TILE);
        let (rows, buckets) = (tiles * TILE, buckets.unwrap_or(0));
        let fits =
            tiles <= MAX_TILES && buckets * size_of::<f32>() <= dims.queries * dims.keys * size_of::<X>();
        let sums = buckets * tiles * 32 * size_of::<f32>();
        let shared = rows_of(HEAD_DIM, 2 * rows + most + rows.max(most)) + rows_of(most, 2 * rows) + sums;
        let threads = tiles.max(dims.keys.div_ceil(TILE)) * 32;
        let grid = [1, dims.heads, dims.batch];
        Self { name, grid, threads, shared }.fitting(cuda).filter(|_| fits)
    }

    /// Unless a block cannot have that much shared memory.
    fn fitting(self, cuda: &Cuda) -> Option<Self> {
        (self.shared <= cuda.inner.limits.most_shared).then_some(self)
    }

    /// Its kernel, without arguments.
    pub fn kernel<'a>(&self, cuda: &'a Cuda) -> Launch<'a> {
        cuda.kernel(MODULE, self.name)
    }

    /// Queues it.
    ///
    /// # Safety
    /// As of [`Launch::run`].
    pub unsafe fn run(&self, kernel: Launch<'_>) -> crate::Result<()> {
        // SAFETY: the caller's.
        unsafe { kernel.run(self.grid, self.threads, self.shared) }
    }
}

impl Cuda {
    /// `d_table +=` the sums over `batch` examples of `size` numbers each at `partial`.
    ///
    /// # Safety
    /// There must be as many at `partial`, and `size` at `d_table`.
    pub(super) unsafe fn t5_table_sum(
        &self,
        d_table: &super::CudaViewMut<'_, f32>,
        partial: u64,
        batch: usize,
    ) -> crate::Result<()> {
        let size = d_table.len();
        let kernel =
            self.kernel(MODULE, "t5_table_sum").write(d_table).address::<f32>(partial).int(batch).int(size);
        let kernel = kernel.moves((batch + 2) * size * size_of::<f32>());
        // SAFETY: the caller's.
        unsafe { kernel.run([size.div_ceil(COLUMN_BLOCK), 1, 1], COLUMN_BLOCK * COLUMN_BLOCK, 0) }
    }
}
