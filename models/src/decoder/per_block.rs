//! [`PerBlock`]: a buffer of which every block has a part of its own, or all share one.

use gradtx_kernels::{Buffer, Device, Elem};
use gradtx_runtime::Result;
use gradtx_runtime::buffers::Allocator;

/// A buffer of every block: a part for each, or one that they share.
pub(super) struct PerBlock<D: Device, T: Elem> {
    buf: D::Buf<T>,
    /// Where each block's part begins; none where all share one.
    starts: Vec<usize>,
}

impl<D: Device, T: Elem> PerBlock<D, T> {
    /// A part for each of these shapes of blocks if backward reads it (`is_kept`); otherwise one of the largest
    /// shape.
    pub(super) fn allocate(
        alloc: &mut Allocator<'_, D>,
        name: &str,
        is_kept: bool,
        shapes: impl IntoIterator<Item = Vec<usize>>,
    ) -> Result<Self> {
        let shapes: Vec<Vec<usize>> = shapes.into_iter().collect();
        let largest = shapes.iter().max_by_key(|shape| elements(shape)).cloned().unwrap_or_default();
        if !is_kept {
            return Ok(Self { buf: alloc.buffer(name, &largest)?, starts: vec![] });
        }
        let mut end = 0usize;
        let starts = shapes.iter().map(|shape| {
            let start = end;
            end = end.saturating_add(elements(shape));
            start
        });
        let starts = starts.collect();
        let is_uniform = shapes.iter().all(|shape| *shape == largest);
        let whole = match shapes.len() {
            1 => largest,
            blocks if is_uniform => [&[blocks], &largest[..]].concat(),
            _ => vec![end],
        };
        Ok(Self { buf: alloc.buffer(name, &whole)?, starts })
    }

    fn start(&self, block: usize) -> usize {
        if self.starts.is_empty() { 0 } else { self.starts[block] }
    }

    /// The first `len` elements of a block's part.
    pub(super) fn get(&self, block: usize, len: usize) -> D::View<'_, T> {
        let start = self.start(block);
        self.buf.view(start..start + len)
    }

    /// The same for writing.
    pub(super) fn get_mut(&mut self, block: usize, len: usize) -> D::ViewMut<'_, T> {
        let start = self.start(block);
        self.buf.view_mut(start..start + len)
    }
}

fn elements(shape: &[usize]) -> usize {
    shape.iter().fold(1, |elements, &n| elements.saturating_mul(n))
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::cpu::Cpu;
    use gradtx_runtime::plan::Purpose;

    fn allocate(is_kept: bool, widths: &[usize]) -> (PerBlock<Cpu, f32>, Vec<usize>) {
        let shapes = || widths.iter().map(|&width| vec![3, width]);
        let plan = Allocator::<Cpu>::plan_sizes(Purpose::Activations, |alloc| {
            PerBlock::<Cpu, f32>::allocate(alloc, "rows", is_kept, shapes())
        });
        let cpu = Cpu::new(1);
        let mut alloc = Allocator::new(&cpu, Purpose::Activations);
        let buffer = PerBlock::allocate(&mut alloc, "rows", is_kept, shapes()).unwrap();
        (buffer, plan.entries()[0].shape.clone())
    }

    #[test]
    fn kept_parts_of_different_sizes_lie_apart() {
        let (mut buffer, shape) = allocate(true, &[4, 2, 5]);
        assert_eq!(shape, [33]);
        for (block, width) in [4, 2, 5].into_iter().enumerate() {
            buffer.get_mut(block, 3 * width).fill(block as f32 + 1.0);
        }
        for (block, width) in [4, 2, 5].into_iter().enumerate() {
            assert!(buffer.get(block, 3 * width).iter().all(|&x| x == block as f32 + 1.0), "{block}");
        }
        assert_eq!(allocate(true, &[4, 4]).1, [2, 3, 4]);
        assert_eq!(allocate(true, &[4]).1, [3, 4]);
    }

    #[test]
    fn a_shared_part_has_room_for_the_largest() {
        let (mut buffer, shape) = allocate(false, &[4, 2, 5]);
        assert_eq!(shape, [3, 5]);
        buffer.get_mut(0, 6).fill(7.0);
        assert!(buffer.get(2, 6).iter().all(|&x| x == 7.0), "all blocks share it");
        assert_eq!(buffer.get(1, 15).len(), 15);
    }
}
