//! [`Allocator`]: the buffers of a model, a pass or a training, described once.
//!
//! A function asks an allocator for every buffer, by purpose, name and shape. With a device the allocator
//! takes them; without one it only writes down what was asked for, which is the [`MemoryPlan`]. So a plan
//! cannot differ from what is allocated, and no device need be there to make one.

use crate::Result;
use crate::plan::{MemoryPlan, Purpose};
use gradtx_kernels::{Buffer, Device, Elem};

/// Takes buffers from a device, or plans them.
pub struct Allocator<'a, D: Device> {
    /// None where buffers are only planned.
    device: Option<&'a D>,
    purpose: Purpose,
    plan: MemoryPlan,
}

impl<'a, D: Device> Allocator<'a, D> {
    /// An allocator on a device, for buffers of this purpose until [`Self::set_purpose`].
    pub fn new(device: &'a D, purpose: Purpose) -> Self {
        Self { device: Some(device), purpose, plan: MemoryPlan::new() }
    }

    /// The plan of all buffers that `allocate` asks for. The buffers that it is given have no elements.
    ///
    /// # Errors
    /// Those of `allocate`; the allocator itself has none here.
    pub fn plan<T>(
        purpose: Purpose,
        allocate: impl FnOnce(&mut Allocator<'_, D>) -> Result<T>,
    ) -> Result<MemoryPlan> {
        let mut planner = Allocator { device: None, purpose, plan: MemoryPlan::new() };
        allocate(&mut planner)?;
        Ok(planner.plan)
    }

    /// [`Self::plan`], where `allocate` goes by sizes alone and so cannot fail.
    ///
    /// # Panics
    /// If it fails all the same.
    pub fn plan_sizes<T>(
        purpose: Purpose,
        allocate: impl FnOnce(&mut Allocator<'_, D>) -> Result<T>,
    ) -> MemoryPlan {
        Self::plan(purpose, allocate).expect("planning asks no device for memory")
    }

    /// Sets what the next buffers are for; returns what the last ones were for.
    pub fn set_purpose(&mut self, purpose: Purpose) -> Purpose {
        std::mem::replace(&mut self.purpose, purpose)
    }

    /// A buffer of this shape, all zero. Several of one purpose, name and shape, such as those of every
    /// block, are one entry of the plan.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn buffer<T: Elem>(&mut self, name: impl Into<String>, shape: &[usize]) -> Result<D::Buf<T>> {
        self.plan.add_piece(self.purpose, name, shape, size_of::<T>());
        match self.device {
            None => Ok(D::Buf::default()),
            Some(device) => Ok(device.zeros(shape.iter().product())?),
        }
    }

    /// A buffer that holds these values, which are made only if it is taken.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn filled<T: Elem>(
        &mut self,
        name: impl Into<String>,
        shape: &[usize],
        values: impl FnOnce() -> Vec<T>,
    ) -> Result<D::Buf<T>> {
        let mut buffer = self.buffer(name, shape)?;
        if let Some(device) = self.device {
            device.upload(buffer.all_mut(), &values())?;
        }
        Ok(buffer)
    }

    /// A buffer of `rows` rows of `cols` values.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn rows<T: Elem>(&mut self, name: impl Into<String>, rows: usize, cols: usize) -> Result<Rows<D, T>> {
        Ok(Rows { buf: self.buffer(name, &[rows, cols])?, cols })
    }

    /// [`Self::rows`] that hold these values.
    ///
    /// # Errors
    /// If the device has no memory for it.
    pub fn filled_rows<T: Elem>(
        &mut self,
        name: impl Into<String>,
        rows: usize,
        cols: usize,
        values: impl FnOnce() -> Vec<T>,
    ) -> Result<Rows<D, T>> {
        Ok(Rows { buf: self.filled(name, &[rows, cols], values)?, cols })
    }

    /// Notes bytes that an operation takes by itself when it first runs, and that the device keeps.
    pub fn operation_scratch(&mut self, name: impl Into<String>, bytes: usize) {
        self.plan.add_piece(Purpose::Scratch, name, &[bytes], 1);
    }
}

/// A buffer of rows of equally many values; the first rows are lent, as many as a batch has.
pub struct Rows<D: Device, T: Elem> {
    buf: D::Buf<T>,
    cols: usize,
}

impl<D: Device, T: Elem> Rows<D, T> {
    /// The first `rows` rows.
    pub fn view(&self, rows: usize) -> D::View<'_, T> {
        self.part(0, rows * self.cols)
    }

    /// The first `rows` rows, for writing.
    pub fn view_mut(&mut self, rows: usize) -> D::ViewMut<'_, T> {
        self.part_mut(0, rows * self.cols)
    }

    /// `len` values from the value at `start`.
    pub fn part(&self, start: usize, len: usize) -> D::View<'_, T> {
        self.buf.view(start..start + len)
    }

    /// `len` values from the value at `start`, for writing.
    pub fn part_mut(&mut self, start: usize, len: usize) -> D::ViewMut<'_, T> {
        self.buf.view_mut(start..start + len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::cpu::Cpu;

    struct Buffers {
        stream: Vec<Rows<Cpu, f32>>,
        table: <Cpu as Device>::Buf<u32>,
        empty: <Cpu as Device>::Buf<f32>,
    }

    fn allocate(alloc: &mut Allocator<'_, Cpu>) -> Result<Buffers> {
        let stream = vec![alloc.rows("stream", 3, 5)?, alloc.rows("stream", 3, 5)?];
        let before = alloc.set_purpose(Purpose::Scratch);
        let table = alloc.filled("table", &[2, 2], || vec![4, 3, 2, 1])?;
        alloc.set_purpose(before);
        alloc.operation_scratch("sums", 100);
        Ok(Buffers { stream, table, empty: alloc.buffer("empty", &[0, 7])? })
    }

    #[test]
    fn what_is_planned_is_what_is_taken() {
        let plan = Allocator::<Cpu>::plan(Purpose::Activations, allocate).unwrap();
        let entries: Vec<_> = plan
            .entries()
            .iter()
            .map(|e| (e.purpose, e.name.as_str(), e.shape.as_slice(), e.bytes, e.pieces))
            .collect();
        assert_eq!(
            entries,
            [
                (Purpose::Activations, "stream", &[2, 3, 5][..], 120, 2),
                (Purpose::Scratch, "table", &[2, 2], 16, 1),
                (Purpose::Scratch, "sums", &[100], 100, 1),
            ]
        );
        let cpu = Cpu::new(1);
        let mut alloc = Allocator::new(&cpu, Purpose::Activations);
        let taken = allocate(&mut alloc).unwrap();
        assert_eq!(alloc.plan, plan);
        assert_eq!(taken.stream.iter().map(|rows| rows.view(3).len()).sum::<usize>(), 30);
        assert_eq!((&*taken.table, taken.empty.len()), (&[4, 3, 2, 1][..], 0));
    }

    #[test]
    fn planning_takes_no_memory_and_makes_no_values() {
        let mut held = usize::MAX;
        let plan = Allocator::<Cpu>::plan(Purpose::Cache, |alloc| {
            let huge = alloc.buffer::<f32>("huge", &[1 << 40, 1 << 40])?;
            held = huge.len();
            alloc.filled::<f32>("table", &[9], || unreachable!("nothing is filled"))
        });
        assert_eq!((held, plan.unwrap().entries().len()), (0, 2));
    }
}
