//! Sums, gathers, conversions and filling of flat memory on CUDA.

use super::profile::Work;
use super::{Cuda, CudaReal, CudaView, CudaViewMut, failed};
use crate::error::{Error, Result, expect_len, expect_rows};
use crate::ops::{Cast, Elementwise, RandomRows, StridedRows};
use crate::rng::BELL_SPREAD;
use crate::{Elem, View, ViewMut, bf16};
use cudarc::driver::sys;

const MODULE: &str = "elementwise";
const THREADS: usize = 256;
/// Blocks in the second dimension of a grid at most.
const MAX_ROWS: usize = 65_535;

/// Threads for a row of `cols` elements of `X`, 16 bytes each: whole warps, at most `most`.
pub(super) fn threads_for_row<X: Elem>(cols: usize, most: usize) -> usize {
    cols.div_ceil(16 / size_of::<X>()).next_multiple_of(32).clamp(32, most)
}

impl Cuda {
    /// Blocks for `len` elements of `X`, 16 bytes per thread and round.
    pub(super) fn flat_blocks<X: Elem>(&self, len: usize) -> usize {
        self.blocks_for(len.div_ceil(16 / size_of::<X>()), THREADS)
    }

    /// `out[i] = table[ids[i]]`, rows of `cols` values; `op` is named in errors.
    pub(super) fn copy_rows<X: CudaReal>(
        &self,
        op: &'static str,
        out: &CudaViewMut<'_, X>,
        table: CudaView<'_, X>,
        ids: CudaView<'_, u32>,
        cols: usize,
    ) -> Result<()> {
        let rows = table_rows(op, table.len(), cols)?;
        expect_len(op, "out", out.len(), ids.len() * cols)?;
        let kernel = self.kernel_of::<X>(MODULE, "gather_rows").write(out).read(table).read(ids);
        let kernel = kernel.fault().int(cols).int(rows);
        // A table may have many more rows than are read.
        let kernel = kernel.moves(2 * ids.len() * cols * size_of::<X>());
        // SAFETY: `out` has a row per id, `table` has `rows` rows, and ids beyond it are refused.
        unsafe { kernel.run([ids.len(), 1, 1], threads_for_row::<X>(cols, THREADS), 0) }
    }

    /// `len` elements at `pointer` become copies of `value`, the bytes of one.
    pub(super) fn fill_bytes(&self, pointer: u64, len: usize, value: &[u8]) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let word = |at: usize, bytes: usize| {
            let mut wide = [0; 8];
            wide[..bytes].copy_from_slice(&value[at..at + bytes]);
            u64::from_le_bytes(wide)
        };
        let stream = self.queue()?;
        let work = Work { bytes: (len * value.len()) as f64, ..Default::default() };
        let set = |set: &dyn Fn() -> sys::CUresult| {
            let queue = || set().result().map_err(failed("set memory"));
            self.measured(|| "set memory".into(), work, queue)
        };
        match value.len() {
            // SAFETY: callers pass a view of `len` elements of this size, aligned to it.
            1 => set(&|| unsafe { sys::cuMemsetD8Async(pointer, value[0], len, stream) }),
            // SAFETY: as above.
            2 => set(&|| unsafe { sys::cuMemsetD16Async(pointer, word(0, 2) as u16, len, stream) }),
            // SAFETY: as above.
            4 => set(&|| unsafe { sys::cuMemsetD32Async(pointer, word(0, 4) as u32, len, stream) }),
            8 => {
                let kernel =
                    self.kernel(MODULE, "fill_8").address::<u64>(pointer).long(word(0, 8) as usize).long(len);
                // SAFETY: as above.
                unsafe { kernel.run([self.blocks_for(len, THREADS), 1, 1], THREADS, 0) }
            }
            _ => {
                let kernel = self.kernel(MODULE, "fill_16").address::<u64>(pointer);
                let kernel = kernel.long(word(0, 8) as usize).long(word(8, 8) as usize).long(len);
                // SAFETY: as above; the largest elements have 16 bytes.
                unsafe { kernel.run([self.blocks_for(len, THREADS), 1, 1], THREADS, 0) }
            }
        }
    }

    fn cast_with<From: Elem, To: Elem>(
        &self,
        name: &'static str,
        dst: CudaViewMut<'_, To>,
        src: CudaView<'_, From>,
    ) -> Result<()> {
        expect_len("cast", "src", src.len(), dst.len())?;
        let blocks = self.flat_blocks::<bf16>(src.len());
        let kernel = self.kernel(MODULE, name).write(&dst).read(src).long(src.len());
        // SAFETY: both views hold that many elements.
        unsafe { kernel.run([blocks, 1, 1], THREADS, 0) }
    }
}

/// Rows of a table with this many columns.
pub(super) fn table_rows(op: &'static str, len: usize, cols: usize) -> Result<usize> {
    if cols == 0 {
        return Err(Error::Unsupported { op, why: "rows have no columns".into() });
    }
    expect_len(op, "table", len, len / cols * cols)?;
    Ok(len / cols)
}

impl<X: CudaReal> Elementwise<X> for Cuda {
    fn axpby(&self, y: CudaViewMut<'_, X>, a: f64, x: CudaView<'_, X>, b: f64) -> Result<()> {
        expect_len("axpby", "x", x.len(), y.len())?;
        let kernel = self.kernel_of::<X>(MODULE, "axpby").write(&y).float(a).read(x).float(b).long(x.len());
        // SAFETY: both views hold that many elements.
        unsafe { kernel.run([self.flat_blocks::<X>(x.len()), 1, 1], THREADS, 0) }
    }

    fn difference(&self, out: CudaViewMut<'_, X>, x: CudaView<'_, X>, y: CudaView<'_, X>) -> Result<()> {
        expect_len("difference", "x", x.len(), out.len())?;
        expect_len("difference", "y", y.len(), out.len())?;
        let kernel = self.kernel_of::<X>(MODULE, "difference").write(&out).read(x).read(y).long(x.len());
        // SAFETY: the three views hold that many elements.
        unsafe { kernel.run([self.flat_blocks::<X>(x.len()), 1, 1], THREADS, 0) }
    }

    fn add_row(&self, y: CudaViewMut<'_, X>, row: CudaView<'_, X>) -> Result<()> {
        let cols = row.len();
        let rows = table_rows("add_row", y.len(), cols)?;
        let kernel = self.kernel_of::<X>(MODULE, "add_row").write(&y).read(row).int(cols);
        // SAFETY: y has so many rows of so many values.
        unsafe { kernel.run([rows, 1, 1], threads_for_row::<X>(cols, THREADS), 0) }
    }

    fn gather_rows(
        &self,
        out: CudaViewMut<'_, X>,
        x: CudaView<'_, X>,
        rows: CudaView<'_, u32>,
        cols: usize,
    ) -> Result<()> {
        self.copy_rows("gather_rows", &out, x, rows, cols)
    }

    fn copy_strided(&self, out: CudaViewMut<'_, X>, x: CudaView<'_, X>, rows: StridedRows) -> Result<()> {
        let StridedRows { rows, cols, out_stride, x_stride } = rows;
        expect_rows("copy_strided", "out", out.len(), rows, cols, out_stride)?;
        expect_rows("copy_strided", "x", x.len(), rows, cols, x_stride)?;
        let kernel = self.kernel_of::<X>(MODULE, "copy_strided").write(&out).read(x);
        let kernel = kernel.long(rows).long(cols).long(out_stride).long(x_stride);
        let kernel = kernel.moves(2 * rows * cols * size_of::<X>());
        // SAFETY: both views have all rows.
        unsafe { kernel.run([self.flat_blocks::<X>(cols), rows.min(MAX_ROWS), 1], THREADS, 0) }
    }

    fn random_rows(&self, out: CudaViewMut<'_, X>, rows: RandomRows) -> Result<()> {
        let RandomRows { rows, cols, stride, key, std } = rows;
        expect_rows("random_rows", "out", out.len(), rows, cols, stride)?;
        let kernel = self.kernel_of::<X>(MODULE, "random_rows").write(&out).long(key as usize);
        let kernel = kernel.float(std / BELL_SPREAD).long(rows).long(cols).long(stride);
        let kernel = kernel.moves(rows * cols * size_of::<X>());
        let blocks = self.blocks_for((rows * cols).div_ceil(4), THREADS);
        // SAFETY: the view has all rows.
        unsafe { kernel.run([blocks, 1, 1], THREADS, 0) }
    }
}

impl Cast<f32, bf16> for Cuda {
    fn cast(&self, dst: CudaViewMut<'_, bf16>, src: CudaView<'_, f32>) -> Result<()> {
        self.cast_with("cast_f32_bf16", dst, src)
    }
}

impl Cast<bf16, f32> for Cuda {
    fn cast(&self, dst: CudaViewMut<'_, f32>, src: CudaView<'_, bf16>) -> Result<()> {
        self.cast_with("cast_bf16_f32", dst, src)
    }
}

impl Cast<f32, f32> for Cuda {
    fn cast(&self, dst: CudaViewMut<'_, f32>, src: CudaView<'_, f32>) -> Result<()> {
        crate::Device::copy(self, dst, src)
    }
}
