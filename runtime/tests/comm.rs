//! Ranks within one process keep the contract of `Comm`.

// Tests fail by panicking.
#![allow(clippy::unwrap_used)]

mod contract;

use gradtx_runtime::Result;
use gradtx_runtime::comm::{Comm, Local, Solo, local};

/// Runs `work` on every rank, each in a thread; returns what they returned, by rank.
fn on_ranks<T: Send>(size: usize, work: impl Fn(Local) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = local(size).into_iter().map(|comm| scope.spawn(|| work(comm))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

#[test]
fn one_rank() {
    contract::exercise(&Solo);
    on_ranks(1, |comm| contract::exercise(&comm));
}

#[test]
fn several_ranks() {
    for size in 2..=4 {
        on_ranks(size, |comm| contract::exercise(&comm));
    }
}

#[test]
fn a_rank_that_ends_makes_the_others_fail() {
    let found = on_ranks(3, |comm| {
        comm.barrier().unwrap();
        if comm.rank() == 1 { None } else { Some(comm.all_reduce_sum(&mut [1.0])) }
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
        0 => comm.all_reduce_sum(&mut [1.0, 2.0]),
        _ => comm.all_reduce_sum(&mut [1.0]),
    });
    for result in found {
        assert!(result.unwrap_err().to_string().contains("all-reduce of 2"));
    }
}

/// Adds from the last rank to the first.
struct WrongOrder(Local);

impl Comm for WrongOrder {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn size(&self) -> usize {
        self.0.size()
    }

    fn all_reduce_sum(&self, values: &mut [f32]) -> Result<()> {
        let n = values.len();
        let mut all = vec![0.0; n * self.size()];
        self.0.all_gather(values, &mut all)?;
        values.fill(0.0);
        for rank in (0..self.size()).rev() {
            values.iter_mut().zip(&all[rank * n..]).for_each(|(v, x)| *v += x);
        }
        Ok(())
    }

    fn reduce_scatter_sum(&self, values: &[f32], out: &mut [f32]) -> Result<()> {
        self.0.reduce_scatter_sum(values, out)
    }

    fn all_gather(&self, part: &[f32], out: &mut [f32]) -> Result<()> {
        self.0.all_gather(part, out)
    }

    fn broadcast(&self, root: usize, values: &mut [f32]) -> Result<()> {
        self.0.broadcast(root, values)
    }

    fn broadcast_bytes(&self, root: usize, bytes: &mut Vec<u8>) -> Result<()> {
        self.0.broadcast_bytes(root, bytes)
    }

    fn gather_bytes(&self, root: usize, bytes: &[u8]) -> Result<Option<Vec<Vec<u8>>>> {
        self.0.gather_bytes(root, bytes)
    }

    fn barrier(&self) -> Result<()> {
        self.0.barrier()
    }
}

#[test]
fn a_wrong_order_of_summation_is_noticed() {
    let caught = on_ranks(3, |comm| {
        let work = std::panic::AssertUnwindSafe(move || contract::exercise(&WrongOrder(comm)));
        std::panic::catch_unwind(work).is_err()
    });
    assert_eq!(caught, [true; 3]);
}
