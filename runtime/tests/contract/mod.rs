//! What every `Comm` must do, run by each rank.

use gradtx_kernels::rng::{Stream, derive};
use gradtx_runtime::comm::Comm;

/// Numbers of very different sizes, so that the order of a sum shows in its bits.
fn numbers(rank: usize, n: usize) -> Vec<f32> {
    let mut stream = Stream::new(derive(n as u64, rank as u64));
    (0..n).map(|_| (stream.normal() * 10f64.powi(stream.below(16) as i32 - 8)) as f32).collect()
}

fn sum_by_rank(size: usize, n: usize) -> Vec<f32> {
    let mut sum = numbers(0, n);
    for rank in 1..size {
        sum.iter_mut().zip(numbers(rank, n)).for_each(|(s, x)| *s += x);
    }
    sum
}

fn assert_bits(found: &[f32], want: &[f32], what: &str) {
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(found), bits(want), "{what}");
}

/// Every operation, at lengths that ranks do not divide and that none holds.
pub fn exercise(comm: &dyn Comm) {
    let (rank, size) = (comm.rank(), comm.size());
    assert!(rank < size);
    for n in [0, 1, 5, 123, 4096] {
        let mut values = numbers(rank, n);
        comm.all_reduce_sum(&mut values).unwrap();
        assert_bits(&values, &sum_by_rank(size, n), "all-reduce");

        let whole = numbers(rank, n * size);
        let mut share = vec![f32::NAN; n];
        comm.reduce_scatter_sum(&whole, &mut share).unwrap();
        assert_bits(&share, &sum_by_rank(size, n * size)[rank * n..][..n], "reduce-scatter");

        let mut all = vec![f32::NAN; n * size];
        comm.all_gather(&numbers(rank, n), &mut all).unwrap();
        let want: Vec<f32> = (0..size).flat_map(|r| numbers(r, n)).collect();
        assert_bits(&all, &want, "all-gather");

        let root = n % size;
        let mut values = numbers(rank, n);
        comm.broadcast(root, &mut values).unwrap();
        assert_bits(&values, &numbers(root, n), "broadcast");
    }
    for root in 0..size {
        let mut bytes = vec![rank as u8; 3 * rank + 1];
        comm.broadcast_bytes(root, &mut bytes).unwrap();
        assert_eq!(bytes, vec![root as u8; 3 * root + 1]);
        let found = comm.gather_bytes(root, &vec![rank as u8 + 7; 2 * rank]).unwrap();
        let want: Vec<Vec<u8>> = (0..size).map(|r| vec![r as u8 + 7; 2 * r]).collect();
        assert_eq!(found, (rank == root).then_some(want));
    }
    comm.barrier().unwrap();
    assert!(comm.all_gather(&[1.0], &mut vec![0.0; size + 1]).is_err());
    assert!(comm.reduce_scatter_sum(&vec![0.0; 2 * size + 1], &mut [0.0; 2]).is_err());
    assert!(comm.broadcast(size, &mut [1.0]).is_err());
    assert!(comm.gather_bytes(size, &[]).is_err());
    comm.barrier().unwrap();
}
