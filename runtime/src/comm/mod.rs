//! [`Comm`]: what ranks exchange.
//!
//! In: numbers and bytes of every rank. Out: sums, and the same numbers and bytes on
//! other ranks. [`Comm`] is what an implementation provides, in bytes, and can be used
//! as `&dyn Comm`; [`Collectives`] is the same with types, and what callers use.
//!
//! | implementation | ranks |
//! |---|---|
//! | [`Solo`] | one |
//! | [`local`] | several, in the threads of one process |
//! | `Mpi` (feature `mpi`) | several processes, on several nodes |
//!
//! **Order of sums.** Element by element, `((x₀ + x₁) + x₂) + …` in the order of ranks,
//! f32 in f32; bf16 is added in f32 in the same order and rounded once, at the end; u64
//! wraps. No sum depends on timing, on how messages are cut, or on whether it was started
//! or waited for, so all ranks get the same bits, and a repeated run of as many ranks gets
//! them again. Between different numbers of ranks: u64 sums and everything that only moves
//! are equal; sums of f32 and bf16 are equal up to rounding, since the same contributions
//! come in other groups.
//!
//! **Order of calls.** All ranks call the same collective operations, with the same
//! lengths, in the same order; the started ones count when they are started. Messages
//! ([`Comm::send`]) are apart from that.
//!
//! **Threads.** A `Comm` is used by the thread that made it (or was sent it) and by no
//! other; for `Mpi`, which is not `Send`, MPI is told so (`MPI_THREAD_FUNNELED`). Many
//! threads in MPI would cost locks in every call and are the least tested part of MPI
//! libraries. The price: messages move only while some rank's thread is inside an
//! operation, so whoever computes for long calls [`Comm::poll`] now and then.
//!
//! **Death.** An operation that waits for a rank that died does not return: its process
//! is ended with the whole job. See `Mpi::init`, and [`Comm::abort`]. Among [`local`]
//! ranks it fails.

mod agree;
mod collectives;
mod launch;
mod local;
#[cfg(feature = "mpi")]
mod mpi;
mod number;
mod solo;

pub use agree::agree;
pub use collectives::{Collectives, Pending};
pub use launch::{Launch, Starter};
pub use local::{Local, local};
#[cfg(feature = "mpi")]
pub use mpi::{Mpi, library_version};
pub use number::{Kind, Number};
pub use solo::Solo;

use crate::{Error, Result};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Where a rank runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankInfo {
    /// Name of the node, as SLURM or the system calls it.
    pub node: String,
    /// This rank among those of its node, from 0: which GPU is its own.
    pub local_rank: usize,
    /// Ranks of this node: how many share its cores.
    pub local_size: usize,
}

impl RankInfo {
    /// One of `size` ranks that all are in this process.
    fn here(rank: usize, size: usize) -> Self {
        Self::among(&vec![this_node(); size], rank)
    }

    /// By the names of all ranks' nodes.
    fn among(nodes: &[String], rank: usize) -> Self {
        let same = |range: Range<usize>| nodes[range].iter().filter(|&n| *n == nodes[rank]).count();
        Self { node: nodes[rank].clone(), local_rank: same(0..rank), local_size: same(0..nodes.len()) }
    }
}

/// Name of the machine that this process runs on.
fn this_node() -> String {
    let of_system = || std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    // SLURM's name first: it may run several nodes on one machine.
    let name = std::env::var("SLURMD_NODENAME").ok().or_else(of_system);
    name.map(|n| n.trim().to_string()).filter(|n| !n.is_empty()).unwrap_or_else(|| "localhost".into())
}

/// A message from one rank to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who sent it.
    pub from: usize,
    /// What was sent.
    pub bytes: Vec<u8>,
}

/// What a sum is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collective {
    /// The whole sum, on every rank.
    AllReduce,
    /// On every rank its share of the sum.
    ReduceScatter,
}

/// A sum that was started. Dropped before its end, it continues, and its result is lost.
pub trait Reduction {
    /// Moves it on without waiting; whether it is done.
    fn poll(&mut self) -> Result<bool>;

    /// Waits for it. `out` gets the sum (or this rank's share), as bytes.
    fn wait(self: Box<Self>, out: &mut [u8]) -> Result<()>;
}

/// One rank among `size`: the operations in bytes. Callers use [`Collectives`].
///
/// Numbers in bytes lie where numbers of their kind may lie (they were a slice of them).
pub trait Comm {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// Where this rank runs.
    fn place(&self) -> &RankInfo;

    /// Starts a sum of all ranks' `values`. `lengths` are the bytes of every rank's share of
    /// them, in the order of ranks; they count for [`Collective::ReduceScatter`] only. `values` may change
    /// once this returns.
    fn start_sum<'c>(
        &'c self,
        collective: Collective,
        kind: Kind,
        values: &[u8],
        lengths: &[usize],
    ) -> Result<Box<dyn Reduction + 'c>>;

    /// [`Collective::AllReduce`], in place; needs less memory than a started sum where values are many.
    fn sum_all(&self, kind: Kind, values: &mut [u8]) -> Result<()> {
        self.start_sum(Collective::AllReduce, kind, values, &[])?.wait(values)
    }

    /// [`Collective::ReduceScatter`]; needs less memory than a started sum where values are many.
    fn sum_share(&self, kind: Kind, values: &[u8], lengths: &[usize], out: &mut [u8]) -> Result<()> {
        self.start_sum(Collective::ReduceScatter, kind, values, lengths)?.wait(out)
    }

    /// `out` = the parts of all ranks, in their order; rank r's has `lengths[r]` bytes.
    fn gather_all(&self, part: &[u8], lengths: &[usize], out: &mut [u8]) -> Result<()>;

    /// `bytes` = those of rank `root`, on every rank; as many everywhere.
    fn broadcast_exact(&self, root: usize, bytes: &mut [u8]) -> Result<()>;

    /// `bytes` = those of rank `root`, of any length, on every rank.
    fn broadcast_bytes(&self, root: usize, bytes: &mut Vec<u8>) -> Result<()>;

    /// On rank `root` the bytes of all ranks, in their order; on the others nothing.
    fn gather_bytes(&self, root: usize, bytes: &[u8]) -> Result<Option<Vec<Vec<u8>>>>;

    /// Returns when every rank has come here.
    fn barrier(&self) -> Result<()>;

    /// Sends bytes to another rank, and returns without waiting for it to take them.
    /// Messages of one rank to another with the same tag arrive in their order.
    fn send(&self, to: usize, tag: u8, bytes: &[u8]) -> Result<()>;

    /// Takes a message with this tag, from rank `from` or from any, if one is there.
    fn try_receive(&self, from: Option<usize>, tag: u8) -> Result<Option<Message>>;

    /// Waits for a message with this tag, from rank `from` or from any.
    fn receive(&self, from: Option<usize>, tag: u8) -> Result<Message> {
        if self.size() == 1 {
            return Err(Error::invalid("receive", "there is no other rank that could send something"));
        }
        let mut idle = Idle::default();
        loop {
            match self.try_receive(from, tag)? {
                Some(message) => return Ok(message),
                None => idle.pause(),
            }
        }
    }

    /// Moves on what was started and sent. Long computations call this now and then.
    fn poll(&self) -> Result<()> {
        Ok(())
    }

    /// Ends the processes of all ranks with this exit code.
    fn abort(&self, code: u8) -> ! {
        std::process::exit(code.into())
    }
}

/// How to wait without taking the core from a rank that works: busily at first, since
/// most waits are short, then with naps.
#[derive(Debug, Default)]
struct Idle {
    since: Option<Instant>,
}

impl Idle {
    const BUSY: Duration = Duration::from_millis(5);
    const NAP: Duration = Duration::from_micros(100);

    fn pause(&mut self) {
        if self.since.get_or_insert_with(Instant::now).elapsed() < Self::BUSY {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Self::NAP);
        }
    }
}

/// One range per rank, one after the other from 0, with these lengths.
fn ranges(lengths: &[usize]) -> Vec<Range<usize>> {
    let starts = lengths.iter().scan(0, |end, &length| {
        *end += length;
        Some(*end - length..*end)
    });
    starts.collect()
}

/// `whole` values are one part per rank with these lengths, and `own` values the part of `rank`.
fn expect_parts(
    op: &str,
    whole: usize,
    lengths: &[usize],
    rank: usize,
    size: usize,
    own: usize,
) -> Result<()> {
    let total: usize = lengths.iter().sum();
    let why = if lengths.len() != size {
        format!("{} lengths for {size} rank(s)", lengths.len())
    } else if total != whole {
        format!("parts of {total} bytes in all for {whole}")
    } else if lengths[rank] != own {
        format!("rank {rank}'s part has {own} bytes, its length says {}", lengths[rank])
    } else {
        return Ok(());
    };
    Err(Error::invalid(op, why))
}

fn expect_length(op: &str, found: usize, want: usize) -> Result<()> {
    if found == want {
        return Ok(());
    }
    Err(Error::invalid(op, format!("there is room for {found} bytes, but the result has {want}")))
}

fn expect_root(op: &str, root: usize, size: usize) -> Result<()> {
    if root < size {
        return Ok(());
    }
    Err(Error::invalid(op, format!("there is no rank {root} among {size}")))
}

/// Messages go to other ranks.
fn expect_peer(op: &str, peer: usize, rank: usize, size: usize) -> Result<()> {
    expect_root(op, peer, size)?;
    if peer != rank {
        return Ok(());
    }
    Err(Error::invalid(op, format!("rank {rank} exchanges no messages with itself")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_a_node_are_numbered() {
        let nodes = ["a", "b", "a", "b", "b"].map(String::from);
        let local = |rank| {
            let RankInfo { node, local_rank, local_size } = RankInfo::among(&nodes, rank);
            (node, local_rank, local_size)
        };
        assert_eq!(local(2), ("a".into(), 1, 2));
        assert_eq!(local(1), ("b".into(), 0, 3));
        assert_eq!(local(4), ("b".into(), 2, 3));
    }

    #[test]
    fn ranges_follow_each_other() {
        assert_eq!(ranges(&[2, 0, 3]), [0..2, 2..2, 2..5]);
    }
}
