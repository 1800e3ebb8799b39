//! How an operation is shared between threads: consecutive rows of its outputs.
//!
//! An operation cuts its outputs into parts with ordinary iterators
//! (`chunks_mut`, zipped), as many rows each as [`Cpu::rows_per_part`] says, and
//! [`Cpu::for_parts`] runs them. Every output element is computed by one part alone,
//! so where the cuts fall has no influence on the result.

use super::Cpu;

/// Elements below which an operation is not worth a thread: about ten microseconds of work.
const PARALLEL_MIN: usize = 1 << 14;
/// Parts per thread, so that a thread that was held up does not hold up all.
const PARTS_PER_THREAD: usize = 4;

impl Cpu {
    /// Rows of one part, for `rows` rows that touch `row_cost` elements each. At least 1;
    /// all of them where there is too little to share.
    pub(crate) fn rows_per_part(&self, rows: usize, row_cost: usize) -> usize {
        if self.threads() == 1 || rows.saturating_mul(row_cost) < 2 * PARALLEL_MIN {
            return rows.max(1);
        }
        let even = rows.div_ceil(self.threads() * PARTS_PER_THREAD);
        even.max(PARALLEL_MIN / row_cost.max(1)).max(1)
    }

    /// Runs `work` on every part, on this device's threads; a single part stays on the caller's.
    pub(crate) fn for_parts<P: Send>(
        &self,
        parts: impl IntoIterator<Item = P, IntoIter: Send>,
        work: impl Fn(P) + Sync + Send,
    ) {
        let mut parts = parts.into_iter();
        let Some(first) = parts.next() else { return };
        if self.threads() == 1 {
            return std::iter::once(first).chain(parts).for_each(work);
        }
        let Some(second) = parts.next() else { return work(first) };
        let work = &work;
        self.run(|| {
            rayon::scope(|scope| {
                for part in [first, second].into_iter().chain(parts) {
                    scope.spawn(move |_| work(part));
                }
            });
        });
    }

    /// Gives every part of `out` and the index of its first element to `work`.
    ///
    /// For sums over rows into one row of columns: a part owns some columns and goes
    /// through all rows in order. `depth` is the number of rows.
    pub(crate) fn for_columns<T: Send>(
        &self,
        out: &mut [T],
        depth: usize,
        work: impl Fn(usize, &mut [T]) + Sync + Send,
    ) {
        // Whole cache lines of every row, so that no line is read by two threads.
        const LINE: usize = 32;
        let columns = LINE * self.rows_per_part(out.len().div_ceil(LINE), LINE * depth);
        let parts = out.chunks_mut(columns).enumerate();
        self.for_parts(parts, |(i, part)| work(i * columns, part));
    }
}
