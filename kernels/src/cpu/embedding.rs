//! Token embedding on the CPU: rows are copied; gradients are added by the thread that
//! owns the table row, which goes through all ids in order.

use super::simd::{Level, Task, dispatch};
use super::{Cpu, CpuReal};
use crate::Result;
use crate::error::{Error, expect_below, expect_len};
use crate::ops::Embedding;

impl Cpu {
    /// `out[i] = table[ids[i]]`, rows of `cols` values.
    pub(super) fn copy_rows<X: CpuReal>(
        &self,
        op: &'static str,
        out: &mut [X],
        table: &[X],
        ids: &[u32],
        cols: usize,
    ) -> Result<()> {
        expect_len(op, "out", out.len(), ids.len() * cols)?;
        expect_below(op, "ids", ids, table_rows(op, table.len(), cols)?)?;
        let k = self.rows_per_part(ids.len(), cols);
        self.for_parts(out.chunks_mut(k * cols).zip(ids.chunks(k)), |(out, ids)| {
            for (out, &id) in out.chunks_exact_mut(cols).zip(ids) {
                out.copy_from_slice(&table[id as usize * cols..][..cols]);
            }
        });
        Ok(())
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

/// Some rows, and their ids.
struct Add<'a, X> {
    x: &'a mut [X],
    table: &'a [X],
    ids: &'a [u32],
    dim: usize,
}

impl<X: CpuReal> Task for Add<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        for (x, &id) in self.x.chunks_exact_mut(self.dim).zip(self.ids) {
            let row = &self.table[id as usize * self.dim..][..self.dim];
            for (x, &value) in x.iter_mut().zip(row) {
                *x += value;
            }
        }
    }
}

/// Table rows from `first`, and all ids.
struct Backward<'a, X> {
    d_table: &'a mut [X],
    first: usize,
    dx: &'a [X],
    ids: &'a [u32],
    dim: usize,
}

impl<X: CpuReal> Task for Backward<'_, X> {
    type Out = ();
    #[inline(always)]
    fn run<L: Level>(self) {
        let rows = self.first..self.first + self.d_table.len() / self.dim;
        for (&id, dx) in self.ids.iter().zip(self.dx.chunks_exact(self.dim)) {
            if rows.contains(&(id as usize)) {
                let d = &mut self.d_table[(id as usize - self.first) * self.dim..][..self.dim];
                for c in 0..self.dim {
                    d[c] += dx[c];
                }
            }
        }
    }
}

impl<X: CpuReal> Embedding<X> for Cpu {
    fn embedding_forward(&self, x: &mut [X], table: &[X], ids: &[u32], dim: usize) -> Result<()> {
        let _timed = self.timed("embedding_forward");
        self.copy_rows("embedding_forward", x, table, ids, dim)
    }

    fn embedding_add(&self, x: &mut [X], table: &[X], ids: &[u32], dim: usize) -> Result<()> {
        let _timed = self.timed("embedding_add");
        const OP: &str = "embedding_add";
        expect_len(OP, "x", x.len(), ids.len() * dim)?;
        expect_below(OP, "ids", ids, table_rows(OP, table.len(), dim)?)?;
        let k = self.rows_per_part(ids.len(), 2 * dim);
        self.for_parts(x.chunks_mut(k * dim).zip(ids.chunks(k)), |(x, ids)| {
            dispatch(Add { x, table, ids, dim });
        });
        Ok(())
    }

    fn embedding_backward(&self, d_table: &mut [X], dx: &[X], ids: &[u32], dim: usize) -> Result<()> {
        let _timed = self.timed("embedding_backward");
        const OP: &str = "embedding_backward";
        let vocab = table_rows(OP, d_table.len(), dim)?;
        expect_len(OP, "dx", dx.len(), ids.len() * dim)?;
        expect_below(OP, "ids", ids, vocab)?;
        // One part per thread: each goes through all ids, and the work is in the ids.
        let shared = self.rows_per_part(ids.len(), dim) < ids.len();
        let k = if shared { vocab.div_ceil(self.threads()) } else { vocab }.max(1);
        self.for_parts(d_table.chunks_mut(k * dim).enumerate(), |(i, d_table)| {
            dispatch(Backward { d_table, first: i * k, dx, ids, dim });
        });
        Ok(())
    }
}
