//! Ranks within one process keep the contract of `Comm`, and the contract notices ranks
//! that do not.

// Tests fail by panicking.
#![allow(clippy::unwrap_used)]

mod contract;

use gradtx_runtime::Result;
use gradtx_runtime::comm::{
    Collective, Collectives, Comm, Kind, Local, Message, RankInfo, Reduction, Solo, local,
};
use half::bf16;

/// Runs `work` on every rank, each in a thread; returns what they returned, by rank.
fn on_ranks<T: Send>(size: usize, work: impl Fn(Local) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = local(size).into_iter().map(|comm| scope.spawn(|| work(comm))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

#[test]
fn one_rank() {
    let key = contract::fresh_key();
    contract::exercise(&Solo::default(), key);
    on_ranks(1, |comm| contract::exercise(&comm, key));
}

#[test]
fn several_ranks() {
    let key = contract::fresh_key();
    for size in 2..=4 {
        on_ranks(size, |comm| contract::exercise(&comm, key));
    }
}

#[test]
fn a_rank_that_ends_makes_the_others_fail() {
    let found = on_ranks(3, |comm| {
        comm.barrier().unwrap();
        let sum = comm.start_all_reduce_sum(&[1.0f32]).unwrap();
        if comm.rank() == 1 {
            return None;
        }
        // It took part in this one, so its end does no harm.
        sum.wait(&mut [0.0]).unwrap();
        let message = comm.receive(Some(1), 0).unwrap_err().to_string();
        assert!(message.contains("has ended"), "{message}");
        Some(comm.all_reduce_sum(&mut [1.0f32]))
    });
    for (rank, result) in found.into_iter().enumerate() {
        if let Some(result) = result {
            let message = result.unwrap_err().to_string();
            assert!(rank != 1 && message.contains("has ended"), "{message}");
        }
    }
}

#[test]
fn ranks_that_call_different_operations_fail() {
    let found = on_ranks(2, |comm| match comm.rank() {
        0 => comm.all_reduce_sum(&mut [1.0f32, 2.0]),
        _ => comm.all_reduce_sum(&mut [1.0f32]),
    });
    for result in found {
        assert!(result.unwrap_err().to_string().contains("all-reduce of 8"));
    }
}

/// What a careless implementation might do.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Adds from the last rank to the first.
    Order,
    /// Rounds bf16 after every addition.
    Rounding,
    /// Gives every rank the first share.
    Share,
    /// Leaves out what was brought by ranks with nothing for rank 0.
    Gather,
    /// Delivers the newest message first.
    Newest,
    /// Takes messages of any tag.
    Tag,
}

struct Broken {
    comm: Local,
    fault: Fault,
    pile: std::cell::RefCell<Vec<Message>>,
}

/// A sum that is there.
struct There(Vec<u8>);

impl Reduction for There {
    fn poll(&mut self) -> Result<bool> {
        Ok(true)
    }

    fn wait(self: Box<Self>, out: &mut [u8]) -> Result<()> {
        if out.len() != self.0.len() {
            return Err(gradtx_runtime::Error::invalid("sum", "length"));
        }
        out.copy_from_slice(&self.0);
        Ok(())
    }
}

impl Comm for Broken {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn size(&self) -> usize {
        self.comm.size()
    }

    fn place(&self) -> &RankInfo {
        self.comm.place()
    }

    fn start_sum<'c>(
        &'c self,
        collective: Collective,
        kind: Kind,
        values: &[u8],
        lengths: &[usize],
    ) -> Result<Box<dyn Reduction + 'c>> {
        let all = |values: &[u8]| self.comm.all_gather_bytes(values);
        Ok(match (self.fault, collective, kind) {
            (Fault::Order, Collective::AllReduce, Kind::F32) => {
                let mut sum = vec![0f32; values.len() / 4];
                for part in all(values)?.iter().rev() {
                    let part = part.chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap()));
                    sum.iter_mut().zip(part).for_each(|(s, x)| *s += x);
                }
                Box::new(There(sum.iter().flat_map(|x| x.to_le_bytes()).collect()))
            }
            (Fault::Rounding, Collective::AllReduce, Kind::Bf16) => {
                let mut sum = vec![bf16::ZERO; values.len() / 2];
                for part in all(values)? {
                    let part = part.chunks_exact(2).map(|x| bf16::from_le_bytes(x.try_into().unwrap()));
                    sum.iter_mut().zip(part).for_each(|(s, x)| *s += x);
                }
                Box::new(There(sum.iter().flat_map(|x| x.to_le_bytes()).collect()))
            }
            (Fault::Share, Collective::ReduceScatter, Kind::U64)
                if lengths.iter().all(|&l| l == lengths[0] && l > 0) =>
            {
                let mut sum = values.to_vec();
                self.comm.sum_all(kind, &mut sum)?;
                Box::new(There(sum[..lengths[0]].to_vec()))
            }
            _ => self.comm.start_sum(collective, kind, values, lengths)?,
        })
    }

    fn gather_all(&self, part: &[u8], lengths: &[usize], out: &mut [u8]) -> Result<()> {
        let before = out.to_vec();
        self.comm.gather_all(part, lengths, out)?;
        if let (Fault::Gather, 0, Some(last)) = (self.fault, lengths[0], lengths.last()) {
            let at = out.len() - last;
            out[at..].copy_from_slice(&before[at..]);
        }
        Ok(())
    }

    fn broadcast_exact(&self, root: usize, bytes: &mut [u8]) -> Result<()> {
        self.comm.broadcast_exact(root, bytes)
    }

    fn broadcast_bytes(&self, root: usize, bytes: &mut Vec<u8>) -> Result<()> {
        self.comm.broadcast_bytes(root, bytes)
    }

    fn gather_bytes(&self, root: usize, bytes: &[u8]) -> Result<Option<Vec<Vec<u8>>>> {
        self.comm.gather_bytes(root, bytes)
    }

    fn barrier(&self) -> Result<()> {
        self.comm.barrier()
    }

    fn send(&self, to: usize, tag: u8, bytes: &[u8]) -> Result<()> {
        let tag = if matches!(self.fault, Fault::Tag) { 0 } else { tag };
        self.comm.send(to, tag, bytes)
    }

    fn try_receive(&self, from: Option<usize>, tag: u8) -> Result<Option<Message>> {
        let tag = if matches!(self.fault, Fault::Tag) { 0 } else { tag };
        if !matches!(self.fault, Fault::Newest) {
            return self.comm.try_receive(from, tag);
        }
        while let Some(message) = self.comm.try_receive(from, tag)? {
            self.pile.borrow_mut().push(message);
        }
        Ok(self.pile.borrow_mut().pop())
    }
}

#[test]
fn faults_are_noticed() {
    let key = contract::fresh_key();
    for fault in [Fault::Order, Fault::Rounding, Fault::Share, Fault::Gather, Fault::Newest, Fault::Tag] {
        let caught = on_ranks(3, |comm| {
            let broken = Broken { comm, fault, pile: vec![].into() };
            let work = std::panic::AssertUnwindSafe(move || contract::exercise(&broken, key));
            std::panic::catch_unwind(work).is_err()
        });
        assert!(caught.contains(&true), "{fault:?} is not noticed");
    }
}
