//! [`HostSums`]: gradients become sums over ranks by way of the host.

use super::Shards;
use crate::comm::{Collectives, Comm, Pending};
use crate::{Error, Result};
use gradtx_kernels::{Buffer, Device, Elem};
use std::collections::VecDeque;
use std::ops::Range;

/// Gradients on their way between ranks, all on the host.
pub(super) struct HostSums<'c> {
    comm: &'c dyn Comm,
    /// Gradients of each bucket that is not complete, once there are any.
    filling: Vec<Option<Vec<f32>>>,
    /// Memory of buckets that were sent.
    free: Vec<Vec<f32>>,
    /// Sums under way, by bucket, in the order in which they were started.
    pending: VecDeque<(usize, Pending<'c, f32>)>,
    /// Sums of this rank's share of each bucket.
    sums: Vec<Vec<f32>>,
}

impl<'c> HostSums<'c> {
    pub fn new(comm: &'c dyn Comm, shards: &Shards) -> Self {
        let sums = shards.buckets().iter().map(|b| vec![0.0; b.share(comm.rank()).len()]).collect();
        let filling = vec![None; shards.buckets().len()];
        Self { comm, filling, free: vec![], pending: VecDeque::new(), sums }
    }

    /// Takes gradients of `part` of the flat buffer, which lies in a bucket.
    pub fn take<D: Device>(
        &mut self,
        device: &D,
        shards: &Shards,
        bucket: usize,
        part: &Range<usize>,
        gradients: D::View<'_, f32>,
    ) -> Result<()> {
        let whole = shards.buckets()[bucket].range();
        let filling = self.filling[bucket].get_or_insert_with(|| {
            let mut memory = self.free.pop().unwrap_or_default();
            memory.clear();
            // Gaps between groups must not bring anything into the sums.
            memory.resize(whole.len(), 0.0);
            memory
        });
        let place = part.start - whole.start..part.end - whole.start;
        Ok(device.download(&mut filling[place], gradients)?)
    }

    /// Starts the sums of a bucket whose gradients have all been taken.
    pub fn start(&mut self, shards: &Shards, bucket: usize) -> Result<()> {
        let lengths = shards.buckets()[bucket].lengths();
        let values = self.filling[bucket].take();
        let values = values.ok_or_else(|| Error::invalid("gradients", "a bucket was complete twice"))?;
        self.pending.push_back((bucket, self.comm.start_reduce_scatter_sum(&values, &lengths)?));
        self.free.push(values);
        Ok(())
    }

    /// Moves sums on, and puts those that are done where they belong, which frees the memory of
    /// others' shares.
    pub fn poll(&mut self) -> Result<()> {
        self.comm.poll()?;
        while let Some((_, sum)) = self.pending.front_mut() {
            if !sum.poll()? {
                break;
            }
            self.take_first()?;
        }
        Ok(())
    }

    fn take_first(&mut self) -> Result<()> {
        if let Some((bucket, sum)) = self.pending.pop_front() {
            sum.wait(&mut self.sums[bucket])?;
        }
        Ok(())
    }

    /// Waits for all sums; in `gradients` those of this rank's shares take their place.
    pub fn finish<D: Device>(
        &mut self,
        device: &D,
        shards: &Shards,
        gradients: &mut D::Buf<f32>,
    ) -> Result<()> {
        while !self.pending.is_empty() {
            self.take_first()?;
        }
        for (bucket, sums) in shards.buckets().iter().zip(&self.sums) {
            device.upload(gradients.view_mut(bucket.share(self.comm.rank())), sums)?;
        }
        Ok(())
    }

    /// `values` gets every rank's shares.
    pub fn gather<X: Elem, D: Device>(
        &self,
        device: &D,
        shards: &Shards,
        values: &mut D::Buf<X>,
    ) -> Result<()> {
        let mut whole = vec![];
        for bucket in shards.buckets() {
            let own = device.to_host(values.view(bucket.share(self.comm.rank())))?;
            whole.resize(bucket.range().len(), X::zeroed());
            self.comm.all_gather_parts(&own, &bucket.lengths(), &mut whole)?;
            device.upload(values.view_mut(bucket.range()), &whole)?;
        }
        Ok(())
    }
}
