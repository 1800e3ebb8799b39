//! Embeddings on CUDA: rows are gathered or added; the gradient of a table row is added by one block, in order.

use super::elementwise::table_rows;
use super::{Cuda, CudaReal, CudaView, CudaViewMut};
use crate::error::expect_len;
use crate::ops::Embedding;
use crate::{Result, View, ViewMut};

const THREADS: usize = 128;

impl<X: CudaReal> Embedding<X> for Cuda {
    fn embedding_forward(
        &self,
        x: CudaViewMut<'_, X>,
        table: CudaView<'_, X>,
        ids: CudaView<'_, u32>,
        dim: usize,
    ) -> Result<()> {
        self.copy_rows("embedding_forward", &x, table, ids, dim)
    }

    fn embedding_add(
        &self,
        x: CudaViewMut<'_, X>,
        table: CudaView<'_, X>,
        ids: CudaView<'_, u32>,
        dim: usize,
    ) -> Result<()> {
        const OP: &str = "embedding_add";
        let rows = table_rows(OP, table.len(), dim)?;
        expect_len(OP, "x", x.len(), ids.len() * dim)?;
        let kernel = self.kernel_of::<X>("embedding", OP).write(&x).read(table).read(ids);
        let kernel = kernel.fault().int(dim).int(rows).moves(3 * ids.len() * dim * size_of::<X>());
        // SAFETY: `x` has a row per id, and ids beyond the table are refused.
        unsafe { kernel.run([ids.len(), 1, 1], THREADS, 0) }
    }

    fn embedding_backward(
        &self,
        d_table: CudaViewMut<'_, f32>,
        dx: CudaView<'_, X>,
        ids: CudaView<'_, u32>,
        dim: usize,
    ) -> Result<()> {
        const OP: &str = "embedding_backward";
        let vocab = table_rows(OP, d_table.len(), dim)?;
        expect_len(OP, "dx", dx.len(), ids.len() * dim)?;
        let kernel = self.kernel_of::<X>("embedding", OP).write(&d_table).read(dx).read(ids);
        let kernel = kernel.fault().int(ids.len()).int(dim).int(vocab);
        let kernel = kernel.moves(ids.len() * dim * (size_of::<X>() + 2 * size_of::<f32>()));
        // SAFETY: the lengths checked above; ids beyond the table are refused.
        unsafe { kernel.run([ids.len(), 1, 1], THREADS, 0) }
    }
}
