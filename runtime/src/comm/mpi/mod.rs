//! Ranks that are processes under MPI.
//!
//! MPI may add in any order, so sums are made of what it moves faithfully: every rank
//! receives its share from all, adds in the order of ranks, and for an all-reduce hands
//! its part of the sum to all. That moves as many bytes as a ring does: each rank sends
//! (N − 1)/N of the values for a reduce-scatter, twice that for an all-reduce.
//!
//! All waiting is done here and not inside MPI: requests are started and tested, with a
//! pause in between, so that a rank that waits leaves its core to others and moves on
//! what it started before.
//!
//! An error inside MPI ends the job, MPI's default: what it was about to write to could
//! not be given back safely. Two duplicates of the world keep collective operations and
//! messages apart.

mod abort;
mod mail;
mod requests;
mod sum;

use super::{
    Collective, Collectives, Comm, Idle, Kind, Launch, Message, RankInfo, Reduction, expect_parts,
    expect_root, ranges,
};
use crate::{Error, Result};
use mail::Mail;
use mpi::Threading;
use mpi::environment::Universe;
use mpi::traits::Communicator;
use requests::{Requests, Wire};
use std::time::{Duration, Instant};
use sum::Sums;

/// How much goes into one message, and how much memory sums may take.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Bytes of one message: MPI counts with 32 bits.
    message: usize,
    /// Bytes of a rank's share that a blocking sum works on at a time: it holds a copy for
    /// every rank.
    piece: usize,
}

const LIMITS: Limits = Limits { message: 1 << 30, piece: 4 << 20 };

/// How long the end of a rank waits for what it has sent to be taken.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// All ranks of an MPI job. MPI is finalised when it is dropped.
pub struct Mpi {
    wire: Wire,
    sums: Sums,
    mail: Mail,
    limits: Limits,
    place: RankInfo,
    // Dropped last: fields are dropped in order.
    _universe: Universe,
}

/// What the MPI library calls itself; may be asked before MPI is started.
pub fn library_version() -> String {
    // Libraries fill the end of their text with zero bytes or line ends.
    let text = mpi::environment::library_version().unwrap_or_else(|_| "unknown".into());
    text.trim_matches(['\0', '\n', ' ']).lines().next().unwrap_or("unknown").to_string()
}

impl Mpi {
    /// Starts MPI. From then on a panic in any thread of any rank ends the whole job: the
    /// other ranks would otherwise wait for that one without end.
    ///
    /// Fails if MPI is running already, or if as many processes were started as MPI does
    /// not see (a library built for another launcher).
    pub fn init() -> Result<Self> {
        // Before MPI adds to the environment.
        let launch = Launch::find();
        let (universe, threading) = mpi::initialize_with_threading(Threading::Funneled)
            .ok_or_else(|| Error::invalid("MPI", "it was already started in this process"))?;
        if threading < Threading::Funneled {
            return Err(Error::invalid("MPI", "this library does not bear a process with threads"));
        }
        let world = universe.world();
        let (rank, size) = (world.rank() as usize, world.size() as usize);
        launch.map_or(Ok(()), |launch| launch.check(size, &library_version()))?;
        let mut mpi = Self {
            wire: Wire::new(world.duplicate(), LIMITS.message),
            sums: Sums::default(),
            mail: Mail::new(world.duplicate(), LIMITS.message),
            limits: LIMITS,
            place: RankInfo::among(&vec![String::new(); size], rank),
            _universe: universe,
        };
        let nodes = mpi.all_gather_bytes(node_name().as_bytes())?;
        let nodes: Vec<String> = nodes.iter().map(|n| String::from_utf8_lossy(n).into_owned()).collect();
        mpi.place = RankInfo::among(&nodes, rank);
        abort::on_panic(format!("rank {rank} of {size} on {}", mpi.place.node));
        Ok(mpi)
    }

    /// Cuts messages at `message` bytes and works on `piece` bytes of a share at a time, for
    /// tests of what otherwise needs gigabytes. The same on all ranks, and before anything
    /// is sent.
    pub fn set_limits(&mut self, message: usize, piece: usize) {
        // A message's first part holds its length; numbers are not cut.
        let whole = |bytes: usize| (bytes / 8).max(2) * 8;
        self.limits = Limits { message: whole(message).min(LIMITS.message), piece: whole(piece) };
        self.wire.limit = self.limits.message;
        self.mail.set_limit(self.limits.message);
    }

    /// Waits until these requests are done, moving on everything else.
    fn finish(&self, mut requests: Requests) -> Result<()> {
        let mut idle = Idle::default();
        while !requests.done()? {
            self.progress();
            idle.pause();
        }
        Ok(())
    }

    fn progress(&self) {
        self.sums.progress(&self.wire);
        self.mail.progress();
    }
}

/// SLURM's name of the node, or else MPI's.
fn node_name() -> String {
    let of_mpi = || mpi::environment::processor_name().ok();
    let name = std::env::var("SLURMD_NODENAME").ok().or_else(of_mpi);
    name.unwrap_or_else(super::this_node).trim_matches(['\0', ' ', '\n']).to_string()
}

impl Drop for Mpi {
    fn drop(&mut self) {
        let begin = Instant::now();
        let mut idle = Idle::default();
        while !(self.sums.is_empty() && self.mail.is_empty()) {
            self.progress();
            if begin.elapsed() > LAST_WORDS {
                let (rank, node) = (self.wire.rank, &self.place.node);
                eprintln!("error: rank {rank} on {node} ends, but what it sent is not taken by anyone");
                abort::end_world(1);
            }
            idle.pause();
        }
    }
}

impl Comm for Mpi {
    fn rank(&self) -> usize {
        self.wire.rank
    }

    fn size(&self) -> usize {
        self.wire.size
    }

    fn place(&self) -> &RankInfo {
        &self.place
    }

    fn start_sum<'c>(
        &'c self,
        collective: Collective,
        kind: Kind,
        values: &[u8],
        lengths: &[usize],
    ) -> Result<Box<dyn Reduction + 'c>> {
        let shares = match collective {
            Collective::AllReduce => even_shares(values.len(), kind, self.size()),
            Collective::ReduceScatter => {
                let own = lengths.get(self.rank()).copied().unwrap_or(0);
                expect_parts("reduce-scatter", values.len(), lengths, self.rank(), self.size(), own)?;
                lengths.to_vec()
            }
        };
        let parts = ranges(&shares).into_iter().map(|range| &values[range]);
        let sum = self.sums.start(&self.wire, collective, kind, parts);
        Ok(Box::new(sum::Started { mpi: self, sum }))
    }

    fn sum_all(&self, kind: Kind, values: &mut [u8]) -> Result<()> {
        let size = self.size();
        let mut before: Option<(sum::Started<'_>, &mut [u8])> = None;
        for piece in values.chunks_mut(self.limits.piece * size) {
            let shares = ranges(&even_shares(piece.len(), kind, size));
            let parts = shares.into_iter().map(|range| &piece[range]);
            let sum = self.sums.start(&self.wire, Collective::AllReduce, kind, parts);
            // While one piece is added up, the next one is on its way.
            if let Some((sum, out)) = before.replace((sum::Started { mpi: self, sum }, piece)) {
                Box::new(sum).wait(out)?;
            }
        }
        before.map_or(Ok(()), |(sum, out)| Box::new(sum).wait(out))
    }

    fn sum_share(&self, kind: Kind, values: &[u8], lengths: &[usize], out: &mut [u8]) -> Result<()> {
        expect_parts("reduce-scatter", values.len(), lengths, self.rank(), self.size(), out.len())?;
        let shares = ranges(lengths);
        let mut before: Option<(sum::Started<'_>, &mut [u8])> = None;
        let mut rest = out;
        for start in (0..lengths.iter().copied().max().unwrap_or(0)).step_by(self.limits.piece) {
            let piece = |share: &std::ops::Range<usize>| {
                let from = (share.start + start).min(share.end);
                &values[from..(from + self.limits.piece).min(share.end)]
            };
            let sum = self.sums.start(&self.wire, Collective::ReduceScatter, kind, shares.iter().map(piece));
            let (own, after) = rest.split_at_mut(piece(&shares[self.rank()]).len());
            rest = after;
            if let Some((sum, out)) = before.replace((sum::Started { mpi: self, sum }, own)) {
                Box::new(sum).wait(out)?;
            }
        }
        before.map_or(Ok(()), |(sum, out)| Box::new(sum).wait(out))
    }

    fn gather_all(&self, part: &[u8], lengths: &[usize], out: &mut [u8]) -> Result<()> {
        let (rank, size) = (self.rank(), self.size());
        expect_parts("all-gather", out.len(), lengths, rank, size, part.len())?;
        let places = ranges(lengths);
        out[places[rank].clone()].copy_from_slice(part);
        let mut requests = Requests::default();
        let tag = self.wire.next_tag();
        let at = out.as_mut_ptr();
        for (to, from) in self.wire.partners() {
            let place = places[from].clone();
            // SAFETY: places of ranks do not overlap and lie in `out`; `out` and `part` are
            // borrowed until this function ends, and `finish` ends only with the requests.
            unsafe {
                self.wire.receive(&mut requests, from, tag, at.add(place.start), place.len());
                self.wire.send(&mut requests, to, tag, part);
            }
        }
        self.finish(requests)
    }

    fn broadcast_exact(&self, root: usize, bytes: &mut [u8]) -> Result<()> {
        expect_root("broadcast", root, self.size())?;
        let mut requests = Requests::default();
        // SAFETY: `bytes` is borrowed until this function ends, after the requests.
        unsafe { self.wire.broadcast(&mut requests, root, bytes) };
        self.finish(requests)
    }

    fn broadcast_bytes(&self, root: usize, bytes: &mut Vec<u8>) -> Result<()> {
        let mut length = [bytes.len() as u64];
        self.broadcast(root, &mut length)?;
        bytes.resize(length[0] as usize, 0);
        self.broadcast_exact(root, bytes)
    }

    fn gather_bytes(&self, root: usize, bytes: &[u8]) -> Result<Option<Vec<Vec<u8>>>> {
        let (rank, size) = (self.rank(), self.size());
        expect_root("gather", root, size)?;
        let mut lengths = vec![0u64; size];
        self.all_gather(&[bytes.len() as u64], &mut lengths)?;
        let mut requests = Requests::default();
        let tag = self.wire.next_tag();
        if rank != root {
            // SAFETY: `bytes` is borrowed until this function ends, after the request.
            unsafe { self.wire.send(&mut requests, root, tag, bytes) };
            self.finish(requests)?;
            return Ok(None);
        }
        let mut all: Vec<Vec<u8>> = lengths.iter().map(|&l| vec![0; l as usize]).collect();
        all[root].copy_from_slice(bytes);
        for (_, from) in self.wire.partners() {
            let part = &mut all[from];
            // SAFETY: `part` stays where it is until this function ends, after the request.
            unsafe { self.wire.receive(&mut requests, from, tag, part.as_mut_ptr(), part.len()) };
        }
        self.finish(requests)?;
        Ok(Some(all))
    }

    fn barrier(&self) -> Result<()> {
        let mut requests = Requests::default();
        self.wire.barrier(&mut requests);
        self.finish(requests)
    }

    fn send(&self, to: usize, tag: u8, bytes: &[u8]) -> Result<()> {
        super::expect_peer("send", to, self.rank(), self.size())?;
        self.mail.send(to, tag, bytes);
        Ok(())
    }

    fn try_receive(&self, from: Option<usize>, tag: u8) -> Result<Option<Message>> {
        from.map_or(Ok(()), |from| super::expect_peer("receive", from, self.rank(), self.size()))?;
        self.progress();
        let Some((from, bytes, requests)) = self.mail.first_part(from, tag) else { return Ok(None) };
        self.finish(requests)?;
        let (message, requests) = self.mail.rest(from, tag, bytes)?;
        self.finish(requests)?;
        Ok(Some(message))
    }

    fn poll(&self) -> Result<()> {
        self.progress();
        Ok(())
    }

    fn abort(&self, code: u8) -> ! {
        abort::end_world(code)
    }
}

/// Bytes of every rank's share of `bytes`, as even as numbers of this kind can be dealt out.
fn even_shares(bytes: usize, kind: Kind, size: usize) -> Vec<usize> {
    let numbers = bytes / kind.bytes();
    let end = |rank: usize| numbers * rank / size;
    (0..size).map(|rank| (end(rank + 1) - end(rank)) * kind.bytes()).collect()
}
