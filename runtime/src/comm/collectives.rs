//! The operations of a [`Comm`] with types.

use super::{Collective, Comm, Number, Reduction};
use crate::Result;
use bytemuck::{Pod, cast_slice, cast_slice_mut};
use std::marker::PhantomData;

/// Collective operations on numbers; every [`Comm`] has them.
pub trait Collectives: Comm {
    /// `values = Σ_r values of rank r`, on every rank.
    fn all_reduce_sum<T: Number>(&self, values: &mut [T]) -> Result<()> {
        self.sum_all(T::KIND, cast_slice_mut(values))
    }

    /// `out = Σ_r (values of rank r)[own share]`. `values` is one equal share per rank, in
    /// the order of ranks.
    fn reduce_scatter_sum<T: Number>(&self, values: &[T], out: &mut [T]) -> Result<()> {
        self.reduce_scatter_sum_parts(values, &vec![out.len(); self.size()], out)
    }

    /// The same with shares of any lengths, in elements, by rank.
    fn reduce_scatter_sum_parts<T: Number>(
        &self,
        values: &[T],
        lengths: &[usize],
        out: &mut [T],
    ) -> Result<()> {
        self.sum_share(T::KIND, cast_slice(values), &bytes_of::<T>(lengths), cast_slice_mut(out))
    }

    /// Starts an all-reduce. `values` may change once this returns: they are copied.
    fn start_all_reduce_sum<T: Number>(&self, values: &[T]) -> Result<Pending<'_, T>> {
        let sum = self.start_sum(Collective::AllReduce, T::KIND, cast_slice(values), &[])?;
        Ok(Pending { sum, of: PhantomData })
    }

    /// Starts a reduce-scatter of shares of any lengths, in elements, by rank. `values` may
    /// change once this returns: they are copied.
    fn start_reduce_scatter_sum<T: Number>(&self, values: &[T], lengths: &[usize]) -> Result<Pending<'_, T>> {
        let sum =
            self.start_sum(Collective::ReduceScatter, T::KIND, cast_slice(values), &bytes_of::<T>(lengths))?;
        Ok(Pending { sum, of: PhantomData })
    }

    /// `out` = the parts of all ranks, in their order; parts are equally long.
    fn all_gather<T: Pod>(&self, part: &[T], out: &mut [T]) -> Result<()> {
        self.all_gather_parts(part, &vec![part.len(); self.size()], out)
    }

    /// The same with parts of any lengths, in elements, by rank.
    fn all_gather_parts<T: Pod>(&self, part: &[T], lengths: &[usize], out: &mut [T]) -> Result<()> {
        self.gather_all(cast_slice(part), &bytes_of::<T>(lengths), cast_slice_mut(out))
    }

    /// The bytes of all ranks on every rank, in the order of ranks; of any lengths, which
    /// the others need not know.
    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut lengths = vec![0u64; self.size()];
        self.all_gather(&[bytes.len() as u64], &mut lengths)?;
        let lengths: Vec<usize> = lengths.iter().map(|&l| l as usize).collect();
        let mut all = vec![0; lengths.iter().sum()];
        self.gather_all(bytes, &lengths, &mut all)?;
        Ok(super::ranges(&lengths).into_iter().map(|range| all[range].to_vec()).collect())
    }

    /// `values` = those of rank `root`, on every rank; as many everywhere.
    fn broadcast<T: Pod>(&self, root: usize, values: &mut [T]) -> Result<()> {
        self.broadcast_exact(root, cast_slice_mut(values))
    }
}

impl<C: Comm + ?Sized> Collectives for C {}

fn bytes_of<T>(lengths: &[usize]) -> Vec<usize> {
    lengths.iter().map(|length| length * size_of::<T>()).collect()
}

/// A sum that was started; see [`Reduction`]. Several may be under way.
pub struct Pending<'c, T> {
    sum: Box<dyn Reduction + 'c>,
    of: PhantomData<T>,
}

impl<T: Number> Pending<'_, T> {
    /// Moves all sums of this rank on without waiting; whether this one is done.
    pub fn poll(&mut self) -> Result<bool> {
        self.sum.poll()
    }

    /// Waits for it. `out` gets the sum, or this rank's share of it.
    pub fn wait(self, out: &mut [T]) -> Result<()> {
        self.sum.wait(cast_slice_mut(out))
    }
}
