//! Data-parallel training: what every rank owns, and how gradients are added up while the
//! backward pass continues.
//!
//! In: a [`ParamLayout`], the number of ranks, and the gradients of a backward pass as they
//! become final. Out: on every rank the sum over all ranks of the gradients that it owns;
//! and, after it has updated what it owns, the updated values of all.
//!
//! [`Shards`] is the arithmetic. The flat buffer is cut into contiguous buckets, large
//! enough for a network to be fast, small enough that the first are on their way before
//! the backward pass ends. Every bucket is cut into one share per rank, in all buckets but the
//! last of the same length. What a rank owns is its share of every bucket: it alone keeps
//! masters and moments of those (ZeRO-1, Rajbhandari et al. 2020).
//!
//! [`GradientSums`] does it. Where the ranks' devices can be in a group, they exchange values
//! among themselves ([`Collective`](gradtx_kernels::Collective)); otherwise gradients and values
//! go through the host, over any [`Comm`](crate::comm::Comm).

mod group;
mod host;
mod sums;

pub use sums::{GradientSums, gather_on_first};

use crate::params::ParamLayout;
use crate::{Error, Result};
use std::ops::Range;

/// Bytes of a bucket of gradients at least.
pub const BUCKET_BYTES: usize = 16 << 20;

/// Shares begin at multiples of this many elements (256 bytes of f32), for vector loads.
const ALIGN: usize = 64;

/// A contiguous part of the flat buffer, which is summed at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    range: Range<usize>,
    /// One after the other, one per rank, perhaps empty.
    shares: Vec<Range<usize>>,
    /// Elements that are parameters; the others are gaps between groups.
    used: usize,
}

impl Bucket {
    /// Its elements of the flat buffer.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// The part of it that a rank owns, in elements of the flat buffer.
    pub fn share(&self, rank: usize) -> Range<usize> {
        self.shares[rank].clone()
    }

    /// What each rank owns of it, from the bucket's beginning.
    pub(crate) fn shares_within(&self) -> Vec<Range<usize>> {
        let start = self.range.start;
        self.shares.iter().map(|share| share.start - start..share.end - start).collect()
    }

    /// Elements that each rank owns.
    pub fn lengths(&self) -> Vec<usize> {
        self.shares.iter().map(Range::len).collect()
    }
}

/// Which elements of a flat buffer each rank owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shards {
    ranks: usize,
    buckets: Vec<Bucket>,
    /// Parameters, in increasing order.
    params: Vec<Range<usize>>,
}

impl Shards {
    /// Of a model's parameters between `ranks` ranks, in buckets of at least `elements`
    /// elements (or one bucket, if there are fewer).
    pub fn new(layout: &ParamLayout, ranks: usize, elements: usize) -> Self {
        let total = layout.total();
        let params: Vec<Range<usize>> = layout.params().iter().map(|param| param.range()).collect();
        // What a bucket with equal shares, each aligned, is a multiple of.
        let unit = ALIGN * ranks;
        let count = (total / elements.max(unit)).max(1);
        let end = |i: usize| if i == count { total } else { (total * i / count).next_multiple_of(unit) };
        let bucket = |i: usize| {
            let range = end(i)..end(i + 1);
            let cut = |rank: usize| match rank == ranks {
                true => range.end,
                false => (range.start + aligned(range.len() * rank / ranks)).min(range.end),
            };
            let shares = (0..ranks).map(|rank| cut(rank)..cut(rank + 1)).collect();
            Bucket { shares, used: used_in(&params, &range), range }
        };
        Self { ranks, buckets: (0..count).map(bucket).collect(), params }
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// The buckets, from the front of the buffer to its back.
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Elements of the flat buffer.
    pub fn total(&self) -> usize {
        self.buckets.last().map_or(0, |bucket| bucket.range.end)
    }

    /// What a rank owns: disjoint ranges, in increasing order, none empty.
    pub fn owned(&self, rank: usize) -> Vec<Range<usize>> {
        if self.ranks == 1 {
            // Whole, so that the optimizer's sums are those of a training without ranks.
            return std::iter::once(0..self.total()).filter(|range| !range.is_empty()).collect();
        }
        self.buckets.iter().map(|bucket| bucket.share(rank)).filter(|share| !share.is_empty()).collect()
    }
}

/// What falls to `rank` of `ranks` of `count` things in a row: differs by one at most.
pub fn share(rank: usize, ranks: usize, count: usize) -> Range<usize> {
    rank * count / ranks..(rank + 1) * count / ranks
}

fn aligned(element: usize) -> usize {
    element.next_multiple_of(ALIGN)
}

/// What two ranges have in common; empty if nothing.
fn overlap(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

/// Elements of a range that are parameters, which are in increasing order.
fn used_in(params: &[Range<usize>], range: &Range<usize>) -> usize {
    let first = params.partition_point(|param| param.end <= range.start);
    let within = params[first..].iter().take_while(|param| param.start < range.end);
    within.map(|param| overlap(param, range).len()).sum()
}

/// Which gradients are final, as a backward pass gives.
#[derive(Clone, Debug)]
struct Readiness {
    /// Parameters' elements of each bucket that are not final yet.
    missing: Vec<usize>,
}

impl Readiness {
    fn new(shards: &Shards) -> Self {
        Self { missing: shards.buckets.iter().map(|bucket| bucket.used).collect() }
    }

    /// Notes that the gradients of `part`, which lies in a bucket, are final; whether the
    /// whole bucket is now.
    fn note(&mut self, shards: &Shards, bucket: usize, part: &Range<usize>) -> Result<bool> {
        let new = used_in(&shards.params, part);
        let missing = &mut self.missing[bucket];
        *missing = missing.checked_sub(new).ok_or_else(|| {
            let why = format!("elements {part:?} were reported as final before");
            Error::invalid("gradients", why)
        })?;
        Ok(*missing == 0 && new > 0)
    }

    /// Fails unless all gradients are final.
    fn expect_all(&self) -> Result<()> {
        match self.missing.iter().sum::<usize>() {
            0 => Ok(()),
            n => Err(Error::invalid("gradients", format!("{n} elements were never reported as final"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Groups of odd sizes, with gaps between them: 1472 elements.
    pub(super) fn layout() -> ParamLayout {
        let mut layout = ParamLayout::new();
        for (i, len) in [130, 5, 700, 64, 333].into_iter().enumerate() {
            layout.push([(format!("{i}.a"), vec![len]), (format!("{i}.b"), vec![3])]);
        }
        layout
    }

    /// Ranges that a backward pass reports, from the front to the back: some of several groups,
    /// with the gaps between them.
    pub(super) fn passes() -> Vec<Range<usize>> {
        let at = |name: &str| layout().range(name).unwrap();
        vec![at("0.a").start..at("1.b").end, at("2.a"), at("2.b"), at("3.a").start..layout().total()]
    }

    #[test]
    fn buckets_and_shares_cover_everything_once() {
        let layout = layout();
        for (ranks, elements) in [(1, 100), (2, 100), (3, 500), (4, 1), (7, 600), (40, 5000), (2, 0)] {
            let shards = Shards::new(&layout, ranks, elements);
            let ends: Vec<usize> = shards.buckets().iter().map(|b| b.range().end).collect();
            assert_eq!(*ends.last().unwrap(), layout.total());
            let mut at = 0;
            for bucket in shards.buckets() {
                assert_eq!((bucket.range().start, bucket.lengths().len()), (at, ranks));
                for rank in 0..ranks {
                    assert_eq!(bucket.share(rank).start, at, "{ranks} ranks, {elements} elements");
                    at = bucket.share(rank).end;
                    let aligned = at.is_multiple_of(ALIGN) || at == bucket.range().end;
                    assert!(aligned, "{:?}", bucket.share(rank));
                }
                assert_eq!(bucket.range().end, at);
            }
            let owned: usize = (0..ranks).flat_map(|rank| shards.owned(rank)).map(|r| r.len()).sum();
            assert_eq!(owned, layout.total());
            let used: usize = shards.buckets().iter().map(|b| b.used).sum();
            assert_eq!(used, layout.count());
        }
        assert_eq!(Shards::new(&layout, 2, 700).buckets().len(), 2);
        assert_eq!(Shards::new(&layout, 2, 800).buckets().len(), 1, "not two that are too small");
        let all = 0..layout.total();
        assert_eq!(Shards::new(&layout, 1, 100).owned(0), [all]);
    }

    #[test]
    fn examples_are_dealt_out_in_their_order() {
        let of = |ranks: usize, batch: usize| -> Vec<Range<usize>> {
            (0..ranks).map(|rank| share(rank, ranks, batch)).collect()
        };
        assert_eq!(of(4, 7), [0..1, 1..3, 3..5, 5..7]);
        assert_eq!(of(3, 2), [0..0, 0..1, 1..2]);
        assert_eq!(share(0, 1, 5), 0..5);
    }

    #[test]
    fn buckets_are_ready_once_when_whole() {
        let layout = layout();
        let shards = Shards::new(&layout, 2, 400);
        let mut readiness = Readiness::new(&shards);
        let mut finished = vec![];
        for range in passes().into_iter().rev() {
            for (i, bucket) in shards.buckets().iter().enumerate().rev() {
                let part = overlap(&range, &bucket.range());
                if !part.is_empty() && readiness.note(&shards, i, &part).unwrap() {
                    finished.push(i);
                }
            }
        }
        assert_eq!(finished, (0..shards.buckets().len()).rev().collect::<Vec<_>>());
        readiness.expect_all().unwrap();
        let message = readiness.note(&shards, 1, &(500..501)).unwrap_err().to_string();
        assert!(message.contains("before"), "{message}");
        let message = Readiness::new(&shards).expect_all().unwrap_err().to_string();
        assert!(message.contains(&format!("{} elements", layout.count())), "{message}");
    }
}
