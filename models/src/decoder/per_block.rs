//! [`PerBlock`]: a buffer of which blocks have parts of their own, or share one.

use gradtx_kernels::{Buffer, Device, Elem};
use gradtx_runtime::Result;
use gradtx_runtime::buffers::Allocator;

/// A buffer of every block: a part for each that is kept, and one that the others share.
pub(super) struct PerBlock<D: Device, T: Elem> {
    buf: D::Buf<T>,
    /// Where each block's part begins.
    starts: Vec<usize>,
}

impl<D: Device, T: Elem> PerBlock<D, T> {
    /// A part of its shape for each block that backward reads (`is_kept`), and before them one of the largest shape
    /// of the others, which these share.
    pub(super) fn allocate(
        alloc: &mut Allocator<'_, D>,
        name: &str,
        is_kept: impl Fn(usize) -> bool,
        shapes: impl IntoIterator<Item = Vec<usize>>,
    ) -> Result<Self> {
        let shapes: Vec<(usize, Vec<usize>)> = shapes.into_iter().enumerate().collect();
        let (kept, others): (Vec<_>, Vec<_>) = shapes.iter().partition(|(block, _)| is_kept(*block));
        let shared = others.iter().map(|(_, shape)| shape).max_by_key(|shape| elements(shape));
        let mut end = shared.map_or(0, |shape| elements(shape));
        let mut starts = vec![0; shapes.len()];
        for (block, shape) in &kept {
            starts[*block] = end;
            end = end.saturating_add(elements(shape));
        }
        let parts: Vec<&Vec<usize>> = shared.into_iter().chain(kept.iter().map(|(_, shape)| shape)).collect();
        let whole = match parts.as_slice() {
            [] => vec![],
            [only] => (*only).clone(),
            [first, rest @ ..] if rest.iter().all(|shape| shape == first) => {
                [&[parts.len()], first.as_slice()].concat()
            }
            _ => vec![end],
        };
        Ok(Self { buf: alloc.buffer(name, &whole)?, starts })
    }

    /// The first `len` elements of a block's part.
    pub(super) fn get(&self, block: usize, len: usize) -> D::View<'_, T> {
        let start = self.starts[block];
        self.buf.view(start..start + len)
    }

    /// The same for writing.
    pub(super) fn get_mut(&mut self, block: usize, len: usize) -> D::ViewMut<'_, T> {
        let start = self.starts[block];
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

    fn allocate(kept: &[usize], widths: &[usize]) -> (PerBlock<Cpu, f32>, Vec<usize>) {
        let is_kept = |block: usize| kept.contains(&block);
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
        let (mut buffer, shape) = allocate(&[0, 1, 2], &[4, 2, 5]);
        assert_eq!(shape, [33]);
        for (block, width) in [4, 2, 5].into_iter().enumerate() {
            buffer.get_mut(block, 3 * width).fill(block as f32 + 1.0);
        }
        for (block, width) in [4, 2, 5].into_iter().enumerate() {
            assert!(buffer.get(block, 3 * width).iter().all(|&x| x == block as f32 + 1.0), "{block}");
        }
        assert_eq!(allocate(&[0, 1], &[4, 4]).1, [2, 3, 4]);
        assert_eq!(allocate(&[0], &[4]).1, [3, 4]);
    }

    #[test]
    fn a_shared_part_has_room_for_the_largest() {
        let (mut buffer, shape) = allocate(&[], &[4, 2, 5]);
        assert_eq!(shape, [3, 5]);
        buffer.get_mut(0, 6).fill(7.0);
        assert!(buffer.get(2, 6).iter().all(|&x| x == 7.0), "all blocks share it");
        assert_eq!(buffer.get(1, 15).len(), 15);
    }

    #[test]
    fn blocks_that_are_not_kept_share_a_part_of_their_own() {
        let (mut buffer, shape) = allocate(&[1, 3], &[4, 2, 5, 3]);
        assert_eq!(shape, [15 + 6 + 9]);
        buffer.get_mut(1, 6).fill(1.0);
        buffer.get_mut(3, 9).fill(3.0);
        buffer.get_mut(0, 12).fill(7.0);
        assert!(buffer.get(2, 12).iter().all(|&x| x == 7.0) && buffer.get(2, 15).len() == 15);
        assert!(buffer.get(1, 6).iter().all(|&x| x == 1.0) && buffer.get(3, 9).iter().all(|&x| x == 3.0));
        assert_eq!(allocate(&[1], &[4, 4, 4]).1, [2, 3, 4]);
    }
}
