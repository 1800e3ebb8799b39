//! Named activation buffers: allocated once, and listed for the memory plan.

use gradtx_kernels::{Device, Elem};
use gradtx_runtime::Result;

/// A buffer of rows of `cols` values; the first rows are lent, as many as a batch has.
pub(crate) struct Rows<D: Device, T: Elem> {
    buf: D::Buf<T>,
    cols: usize,
}

impl<D: Device, T: Elem> Rows<D, T> {
    /// The first `rows` rows.
    pub(crate) fn view(&self, rows: usize) -> D::View<'_, T> {
        self.prefix(rows * self.cols)
    }

    /// The first `rows` rows, for writing.
    pub(crate) fn view_mut(&mut self, rows: usize) -> D::ViewMut<'_, T> {
        self.prefix_mut(rows * self.cols)
    }

    /// The first `len` values, for shapes that vary from call to call.
    pub(crate) fn prefix(&self, len: usize) -> D::View<'_, T> {
        D::view(&self.buf, 0..len)
    }

    /// The first `len` values, for writing.
    pub(crate) fn prefix_mut(&mut self, len: usize) -> D::ViewMut<'_, T> {
        D::view_mut(&mut self.buf, 0..len)
    }

    /// The first `len` values of row `row`.
    pub(crate) fn row(&self, row: usize, len: usize) -> D::View<'_, T> {
        D::view(&self.buf, row * self.cols..row * self.cols + len)
    }

    /// The first `len` values of row `row`, for writing.
    pub(crate) fn row_mut(&mut self, row: usize, len: usize) -> D::ViewMut<'_, T> {
        D::view_mut(&mut self.buf, row * self.cols..row * self.cols + len)
    }
}

/// One line of a memory plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedBuffer {
    /// Its name, by the place in the model.
    pub name: String,
    /// Its shape, row-major.
    pub shape: Vec<usize>,
    /// Its size.
    pub bytes: usize,
}

/// Takes memory for buffers and writes down what it took.
///
/// A dry allocator takes none: its buffers are empty, its list is the memory plan.
pub(crate) struct Allocator<'a, D: Device> {
    dev: &'a D,
    dry: bool,
    list: Vec<PlannedBuffer>,
}

impl<'a, D: Device> Allocator<'a, D> {
    /// An allocator on a device.
    pub(crate) fn new(dev: &'a D, dry: bool) -> Self {
        Self { dev, dry, list: Vec::new() }
    }

    /// A buffer of `rows` rows of `cols` values.
    pub(crate) fn rows<T: Elem>(
        &mut self,
        name: impl Into<String>,
        rows: usize,
        cols: usize,
    ) -> Result<Rows<D, T>> {
        let bytes = rows * cols * T::DTYPE.size();
        self.list.push(PlannedBuffer { name: name.into(), shape: vec![rows, cols], bytes });
        let len = if self.dry { 0 } else { rows * cols };
        Ok(Rows { buf: self.dev.zeros(len)?, cols })
    }

    /// A buffer that holds these values.
    pub(crate) fn filled<T: Elem>(
        &mut self,
        name: impl Into<String>,
        rows: usize,
        cols: usize,
        values: &[T],
    ) -> Result<Rows<D, T>> {
        let mut buffer = self.rows(name, rows, cols)?;
        if !self.dry {
            self.dev.upload(buffer.view_mut(rows), values)?;
        }
        Ok(buffer)
    }

    /// Everything that was asked for, in order.
    pub(crate) fn into_list(self) -> Vec<PlannedBuffer> {
        self.list
    }
}
