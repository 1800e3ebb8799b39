//! A writable matrix that can be cut both ways: heads are blocks of columns, segments
//! blocks of rows, and each block goes to one thread.
//!
//! Slices can only be cut between rows. [`MatrixMut`] also cuts between columns; its
//! parts never overlap, so handing them to threads needs no `unsafe` of the caller.

use std::marker::PhantomData;

/// Rows of `cols` elements, `stride` apart, borrowed for writing.
pub(crate) struct MatrixMut<'a, X> {
    start: *mut X,
    rows: usize,
    cols: usize,
    stride: usize,
    lifetime: PhantomData<&'a mut [X]>,
}

// SAFETY: it stands for exclusive borrows of its rows, which are Send when X is.
unsafe impl<X: Send> Send for MatrixMut<'_, X> {}

impl<'a, X> MatrixMut<'a, X> {
    /// The first `cols` elements of `rows` rows of a slice.
    ///
    /// # Panics
    /// If rows overlap or reach beyond the slice.
    pub fn new(slice: &'a mut [X], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(rows <= 1 || stride >= cols, "rows overlap");
        assert!(rows == 0 || slice.len() >= (rows - 1) * stride + cols, "the slice is too short");
        Self { start: slice.as_mut_ptr(), rows, cols, stride, lifetime: PhantomData }
    }

    /// One row.
    pub fn row(&mut self, i: usize) -> &mut [X] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: `new` saw that all rows lie in the slice, cuts only narrow them, and the
        // parts of a cut are disjoint; the result borrows self mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(i * self.stride), self.cols) }
    }

    /// The rows before and from row `mid`.
    pub fn split_rows(self, mid: usize) -> (Self, Self) {
        assert!(mid <= self.rows, "cut at row {mid} of {}", self.rows);
        // Wrapping, for the second part may be empty and start beyond the slice.
        let below = self.start.wrapping_add(mid * self.stride);
        (Self { rows: mid, ..self }, Self { start: below, rows: self.rows - mid, ..self })
    }

    /// The columns before and from column `mid`.
    pub fn split_columns(self, mid: usize) -> (Self, Self) {
        assert!(mid <= self.cols, "cut at column {mid} of {}", self.cols);
        let right = self.start.wrapping_add(mid);
        (Self { cols: mid, ..self }, Self { start: right, cols: self.cols - mid, ..self })
    }

    /// Blocks of `height` rows (the last may have fewer).
    pub fn row_blocks(self, height: usize) -> impl Iterator<Item = Self> + Send + use<'a, X>
    where
        X: Send,
    {
        let mut rest = Some(self);
        std::iter::from_fn(move || {
            let matrix = rest.take().filter(|m| m.rows > 0)?;
            let mid = height.min(matrix.rows);
            let (block, below) = matrix.split_rows(mid);
            rest = Some(below);
            Some(block)
        })
    }

    /// Blocks of `width` columns (the last may have fewer).
    pub fn column_blocks(self, width: usize) -> impl Iterator<Item = Self> + Send + use<'a, X>
    where
        X: Send,
    {
        let mut rest = Some(self);
        std::iter::from_fn(move || {
            let matrix = rest.take().filter(|m| m.cols > 0)?;
            let mid = width.min(matrix.cols);
            let (block, right) = matrix.split_columns(mid);
            rest = Some(right);
            Some(block)
        })
    }

    /// The rows of every segment; `offsets` as in [`crate::ops::Segments`].
    pub fn row_segments(self, offsets: &'a [u32]) -> impl Iterator<Item = Self> + Send + use<'a, X>
    where
        X: Send,
    {
        let mut rest = Some(self);
        offsets.windows(2).map_while(move |pair| {
            let (block, below) = rest.take()?.split_rows((pair[1] - pair[0]) as usize);
            rest = Some(below);
            Some(block)
        })
    }

    /// The columns of every segment.
    pub fn column_segments(self, offsets: &'a [u32]) -> impl Iterator<Item = Self> + Send + use<'a, X>
    where
        X: Send,
    {
        let mut rest = Some(self);
        offsets.windows(2).map_while(move |pair| {
            let (block, right) = rest.take()?.split_columns((pair[1] - pair[0]) as usize);
            rest = Some(right);
            Some(block)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_the_matrix_once_and_leave_the_gaps() {
        let (rows, cols, stride) = (7, 5, 8);
        let mut data = vec![0; rows * stride - 3];
        let offsets = [0, 1, 3, 7];
        let segments = MatrixMut::new(&mut data, rows, cols, stride).row_segments(&offsets);
        for (n, mut block) in segments.flat_map(|m| m.column_blocks(2)).enumerate() {
            for i in 0..block.rows {
                block.row(i).iter_mut().for_each(|x| *x += n + 1);
            }
        }
        for (i, row) in data.chunks(stride).enumerate() {
            let segment = [0, 1, 1, 2, 2, 2, 2][i];
            let expected: Vec<_> = (0..cols).map(|j| 3 * segment + j / 2 + 1).collect();
            assert_eq!(row[..cols], expected);
            assert!(row[cols..].iter().all(|&x| x == 0));
        }
    }

    #[test]
    fn columns_by_segments_and_rows_by_blocks() {
        let mut data = vec![0; 12];
        let offsets = [0, 3, 4];
        let blocks =
            MatrixMut::new(&mut data, 3, 4, 4).column_segments(&offsets).flat_map(|m| m.row_blocks(2));
        for (n, mut block) in blocks.enumerate() {
            for i in 0..block.rows {
                block.row(i).fill(n);
            }
        }
        assert_eq!(data, [0, 0, 0, 2, 0, 0, 0, 2, 1, 1, 1, 3]);
    }

    #[test]
    #[should_panic(expected = "too short")]
    fn a_short_slice_is_refused() {
        MatrixMut::new(&mut [0; 8], 3, 2, 3).row(0);
        MatrixMut::new(&mut [0; 7], 3, 2, 3).row(0);
    }
}
