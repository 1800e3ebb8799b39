//! A rank that is alone and behaves as one of many: for dry runs.
//!
//! A plan for N ranks is walked through by one process; what its ranks would tell each
//! other is counted, for a cost model to price. Nothing is moved and nobody is waited
//! for: sums stay what this rank brought, parts of others of the same length are copies
//! of its own, and no message ever comes.

use super::solo::Copied;
use super::{Comm, Goal, Kind, Message, Place, Reduction, expect_parts, expect_peer, expect_root, ranges};
use crate::{Error, Result};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// How often an operation was called, and on how much.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Calls.
    pub calls: u64,
    /// Bytes of what the calls were about: the vector that is summed or broadcast, the whole
    /// that is gathered on all, this rank's part of what is gathered on one, the message.
    pub bytes: u64,
}

/// One of many ranks, without the others.
#[derive(Debug)]
pub struct Fake {
    rank: usize,
    size: usize,
    place: Place,
    traffic: RefCell<BTreeMap<&'static str, Traffic>>,
}

impl Fake {
    /// Rank `rank` of `size`, with `per_node` ranks on every node.
    pub fn new(rank: usize, size: usize, per_node: usize) -> Result<Self> {
        expect_root("fake ranks", rank, size)?;
        if per_node == 0 {
            return Err(Error::invalid("fake ranks", "a node has at least one rank"));
        }
        let node = rank / per_node;
        let place = Place {
            node: format!("node{node}"),
            local_rank: rank % per_node,
            local_size: per_node.min(size - node * per_node),
        };
        Ok(Self { rank, size, place, traffic: RefCell::default() })
    }

    /// What was called so far, by operation: `all-reduce`, `reduce-scatter`, `all-gather`,
    /// `broadcast`, `gather`, `barrier`, `send`.
    pub fn traffic(&self) -> BTreeMap<&'static str, Traffic> {
        self.traffic.borrow().clone()
    }

    fn count(&self, operation: &'static str, bytes: usize) {
        let mut traffic = self.traffic.borrow_mut();
        let of = traffic.entry(operation).or_default();
        of.calls += 1;
        of.bytes += bytes as u64;
    }

    fn own(&self, lengths: &[usize]) -> usize {
        lengths.get(self.rank).copied().unwrap_or(0)
    }
}

impl Comm for Fake {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn place(&self) -> &Place {
        &self.place
    }

    fn start_sum<'c>(
        &'c self,
        goal: Goal,
        _kind: Kind,
        values: &[u8],
        lengths: &[usize],
    ) -> Result<Box<dyn Reduction + 'c>> {
        if goal == Goal::All {
            self.count("all-reduce", values.len());
            return Ok(Box::new(Copied(values.to_vec())));
        }
        let op = "reduce-scatter";
        expect_parts(op, values.len(), lengths, self.rank, self.size, self.own(lengths))?;
        self.count(op, values.len());
        Ok(Box::new(Copied(values[ranges(lengths)[self.rank].clone()].to_vec())))
    }

    fn sum_all(&self, _kind: Kind, values: &mut [u8]) -> Result<()> {
        self.count("all-reduce", values.len());
        Ok(())
    }

    fn sum_share(&self, _kind: Kind, values: &[u8], lengths: &[usize], out: &mut [u8]) -> Result<()> {
        let op = "reduce-scatter";
        expect_parts(op, values.len(), lengths, self.rank, self.size, out.len())?;
        self.count(op, values.len());
        out.copy_from_slice(&values[ranges(lengths)[self.rank].clone()]);
        Ok(())
    }

    fn gather_all(&self, part: &[u8], lengths: &[usize], out: &mut [u8]) -> Result<()> {
        expect_parts("all-gather", out.len(), lengths, self.rank, self.size, part.len())?;
        self.count("all-gather", out.len());
        for range in ranges(lengths).into_iter().filter(|range| range.len() == part.len()) {
            out[range].copy_from_slice(part);
        }
        Ok(())
    }

    fn broadcast_exact(&self, root: usize, bytes: &mut [u8]) -> Result<()> {
        expect_root("broadcast", root, self.size)?;
        self.count("broadcast", bytes.len());
        Ok(())
    }

    fn broadcast_bytes(&self, root: usize, bytes: &mut Vec<u8>) -> Result<()> {
        self.broadcast_exact(root, bytes)
    }

    fn gather_bytes(&self, root: usize, bytes: &[u8]) -> Result<Option<Vec<Vec<u8>>>> {
        expect_root("gather", root, self.size)?;
        self.count("gather", bytes.len());
        Ok((self.rank == root).then(|| vec![bytes.to_vec(); self.size]))
    }

    fn barrier(&self) -> Result<()> {
        self.count("barrier", 0);
        Ok(())
    }

    fn send(&self, to: usize, _tag: u8, bytes: &[u8]) -> Result<()> {
        expect_peer("send", to, self.rank, self.size)?;
        self.count("send", bytes.len());
        Ok(())
    }

    fn try_receive(&self, from: Option<usize>, _tag: u8) -> Result<Option<Message>> {
        from.map_or(Ok(()), |from| expect_peer("receive", from, self.rank, self.size))?;
        Ok(None)
    }

    fn receive(&self, _from: Option<usize>, _tag: u8) -> Result<Message> {
        Err(Error::invalid("receive", "in a dry run no other rank sends anything"))
    }
}
