//! Prompts, shared by ranks.
//!
//! In: a number of prompts, work on some of them. Out: the results of all, in their order, on rank 0.
//!
//! Prompts are cut into chunks by the settings alone, and ranks take chunks in turn: on a device whose
//! products depend on how many rows they have, an answer depends on its chunk, and never on the number
//! of ranks.

use anyhow::Result;
use gradtx_runtime::comm::Comm;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::ops::Range;

/// Chunks at most. More would occupy more ranks; fewer fill a batch better, in which the next prompt
/// takes the place of one that has ended.
const CHUNKS: usize = 8;

/// The ranks, and how many prompts a batch has.
#[derive(Clone, Copy)]
pub(super) struct Shares<'a> {
    pub(super) comm: &'a dyn Comm,
    /// Prompts that are answered at once.
    pub(super) batch: usize,
}

impl Shares<'_> {
    /// Chunks of whole batches.
    fn chunks(&self, count: usize) -> Vec<Range<usize>> {
        let batch = self.batch.max(1);
        let size = count.div_ceil(CHUNKS).next_multiple_of(batch).max(1);
        (0..count).step_by(size).map(|first| first..(first + size).min(count)).collect()
    }

    /// Does this rank's part of `count` prompts; `work` gives a result for each of those that it is
    /// given. On rank 0 the results of all.
    pub(super) fn gather<T: Serialize + DeserializeOwned>(
        &self,
        count: usize,
        mut work: impl FnMut(Range<usize>) -> Result<Vec<T>>,
    ) -> Result<Option<Vec<T>>> {
        let chunks = self.chunks(count);
        let (rank, ranks) = (self.comm.rank(), self.comm.size());
        let own = chunks.iter().skip(rank).step_by(ranks).cloned();
        let own: Vec<Vec<T>> = own.map(&mut work).collect::<Result<_>>()?;
        if ranks == 1 {
            return Ok(Some(own.into_iter().flatten().collect()));
        }
        let Some(all) = self.comm.gather_bytes(0, &serde_json::to_vec(&own)?)? else { return Ok(None) };
        let all = all.iter().map(|bytes| Ok(serde_json::from_slice::<Vec<Vec<T>>>(bytes)?.into_iter()));
        let mut all: Vec<std::vec::IntoIter<Vec<T>>> = all.collect::<Result<_>>()?;
        let in_order = (0..chunks.len()).filter_map(|chunk| all[chunk % ranks].next());
        Ok(Some(in_order.flatten().collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_runtime::comm::{Solo, local};

    #[test]
    fn chunks_are_of_whole_batches_and_cover_everything() {
        let comm = Solo::default();
        for (batch, count) in [(32, 384), (128, 384), (3, 12), (1, 1), (5, 0), (64, 1000)] {
            let chunks = Shares { comm: &comm, batch }.chunks(count);
            let covered: Vec<usize> = chunks.iter().cloned().flatten().collect();
            assert!(covered.iter().copied().eq(0..count), "{chunks:?}");
            assert!(chunks.len() <= CHUNKS);
            assert!(chunks.iter().rev().skip(1).all(|chunk| chunk.len() % batch == 0), "{chunks:?}");
        }
    }

    #[test]
    fn any_number_of_ranks_gathers_the_same_in_order() {
        for ranks in [1, 2, 3, 7] {
            let found: Vec<Option<Vec<usize>>> = std::thread::scope(|scope| {
                let started: Vec<_> = local(ranks)
                    .into_iter()
                    .map(|comm| {
                        scope.spawn(move || {
                            let shares = Shares { comm: &comm, batch: 2 };
                            shares.gather(17, |chunk| Ok(chunk.map(|i| i * i).collect())).unwrap()
                        })
                    })
                    .collect();
                started.into_iter().map(|rank| rank.join().unwrap()).collect()
            });
            assert_eq!(found[0], Some((0..17).map(|i| i * i).collect()), "{ranks} ranks");
            assert!(found[1..].iter().all(Option::is_none));
        }
    }
}
