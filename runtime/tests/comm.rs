//! Ranks within one process keep the contract of `Comm`.

// Tests fail by panicking.
#![allow(clippy::unwrap_used)]

mod contract;

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
