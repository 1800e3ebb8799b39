//! Named activation buffers: allocated once, and listed for the memory plan.

use gradtx_kernels::{AsyncCopy, Buffer, Device, Elem};
use gradtx_runtime::Result;
use gradtx_runtime::plan::{MemoryPlan, Purpose};

/// A buffer of rows of `cols` values; the first rows are lent, as many as a batch has.
pub(crate) struct Rows<D: Device, T: Elem> {
    buf: D::Buf<T>,
    cols: usize,
}

impl<D: Device, T: Elem> Rows<D, T> {
    /// The first `rows` rows.
    pub(crate) fn view(&self, rows: usize) -> D::View<'_, T> {
        self.part(0, rows * self.cols)
    }

    /// The first `rows` rows, for writing.
    pub(crate) fn view_mut(&mut self, rows: usize) -> D::ViewMut<'_, T> {
        self.part_mut(0, rows * self.cols)
    }

    /// `len` values from the value at `start`.
    pub(crate) fn part(&self, start: usize, len: usize) -> D::View<'_, T> {
        self.buf.view(start..start + len)
    }

    /// `len` values from the value at `start`, for writing.
    pub(crate) fn part_mut(&mut self, start: usize, len: usize) -> D::ViewMut<'_, T> {
        self.buf.view_mut(start..start + len)
    }
}

/// Takes memory for buffers and writes down what it took.
///
/// A dry allocator takes none: its buffers are empty, its record is the memory plan.
pub(crate) struct Allocator<'a, D: Device> {
    dev: &'a D,
    dry: bool,
    purpose: Purpose,
    taken: Vec<Taken>,
}

/// Buffers of one name and shape, such as every block's.
struct Taken {
    purpose: Purpose,
    name: String,
    shape: [usize; 2],
    size: usize,
    copies: usize,
}

impl<'a, D: Device> Allocator<'a, D> {
    /// An allocator on a device, for buffers of this purpose until told otherwise.
    pub(crate) fn new(dev: &'a D, dry: bool, purpose: Purpose) -> Self {
        Self { dev, dry, purpose, taken: Vec::new() }
    }

    /// A stream of copies into and from some of the buffers.
    pub(crate) fn copy_stream(&self) -> Result<D::CopyStream>
    where
        D: AsyncCopy,
    {
        Ok(self.dev.copy_stream()?)
    }

    /// Sets what the next buffers are for; returns what the last ones were for.
    pub(crate) fn set_purpose(&mut self, purpose: Purpose) -> Purpose {
        std::mem::replace(&mut self.purpose, purpose)
    }

    /// A buffer of `rows` rows of `cols` values.
    pub(crate) fn rows<T: Elem>(
        &mut self,
        name: impl Into<String>,
        rows: usize,
        cols: usize,
    ) -> Result<Rows<D, T>> {
        let (name, purpose, shape, size) = (name.into(), self.purpose, [rows, cols], T::DTYPE.size());
        let same = |t: &&mut Taken| t.name == name && t.purpose == purpose && t.shape == shape;
        match self.taken.iter_mut().find(same) {
            Some(taken) => taken.copies += 1,
            None => self.taken.push(Taken { purpose, name, shape, size, copies: 1 }),
        }
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

    /// Everything that was asked for, in order; buffers of one name are one entry.
    pub(crate) fn into_plan(self) -> MemoryPlan {
        let mut plan = MemoryPlan::new();
        for Taken { purpose, name, shape: [rows, cols], size, copies } in self.taken {
            let shape = [copies, rows, cols];
            let shape = if copies == 1 { &shape[1..] } else { &shape[..] };
            plan.add_pieces(purpose, name, shape, size, copies);
        }
        plan
    }
}
