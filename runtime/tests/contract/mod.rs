//! What every `Comm` must do, run by each rank.

use bytemuck::cast_slice;
use gradtx_kernels::rng::{Stream, derive};
use gradtx_runtime::comm::{Collectives, Comm, Number};
use half::bf16;
use std::fmt::Debug;

/// A number drawn at random.
pub trait Draw: Number + Debug + PartialEq {
    fn draw(stream: &mut Stream) -> Self;
    /// What the sum over ranks must be, written the plain way.
    fn sum(values: &[Self]) -> Self;
}

/// Of very different sizes, so that the order of a sum shows in its bits.
fn uneven(stream: &mut Stream, decades: usize) -> f32 {
    (stream.normal() * 10f64.powi(stream.below(decades) as i32 - decades as i32 / 2)) as f32
}

impl Draw for f32 {
    fn draw(stream: &mut Stream) -> Self {
        uneven(stream, 16)
    }

    fn sum(values: &[Self]) -> Self {
        values[1..].iter().fold(values[0], |sum, x| sum + x)
    }
}

impl Draw for bf16 {
    fn draw(stream: &mut Stream) -> Self {
        Self::from_f32(uneven(stream, 6))
    }

    fn sum(values: &[Self]) -> Self {
        Self::from_f32(values[1..].iter().fold(values[0].to_f32(), |sum, x| sum + x.to_f32()))
    }
}

impl Draw for u64 {
    fn draw(stream: &mut Stream) -> Self {
        stream.next_u64()
    }

    fn sum(values: &[Self]) -> Self {
        values.iter().fold(0, |sum, x| sum.wrapping_add(*x))
    }
}

/// What rank `rank` brings to the exchange called `key`.
fn numbers<T: Draw>(key: u64, rank: usize, n: usize) -> Vec<T> {
    let mut stream = Stream::new(derive(derive(key, n as u64), rank as u64));
    (0..n).map(|_| T::draw(&mut stream)).collect()
}

fn sum_by_rank<T: Draw>(key: u64, size: usize, n: usize) -> Vec<T> {
    let all: Vec<Vec<T>> = (0..size).map(|rank| numbers(key, rank, n)).collect();
    (0..n).map(|i| T::sum(&all.iter().map(|of| of[i]).collect::<Vec<_>>())).collect()
}

fn assert_bits<T: Draw>(found: &[T], want: &[T], what: &str) {
    // Bytes, for -0 and 0 are equal.
    assert!(cast_slice::<T, u8>(found) == cast_slice::<T, u8>(want), "{what}: {found:?}, not {want:?}");
}

/// Lengths of parts by rank that differ, some of them 0.
fn unequal(size: usize, n: usize) -> Vec<usize> {
    (0..size).map(|rank| if (rank + n) % 3 == 1 { 0 } else { n / 2 + 3 * rank }).collect()
}

/// Other numbers in every run; printed, since a failure shows only the key's numbers.
pub fn fresh_key() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let key = now.as_nanos() as u64;
    println!("key of the numbers: {key}");
    key
}

/// Every operation. `key` makes the numbers; it is the same on all ranks.
pub fn exercise(comm: &dyn Comm, key: u64) {
    assert!(comm.rank() < comm.size());
    let place = comm.place();
    assert!(place.local_rank < place.local_size && place.local_size <= comm.size());
    assert!(!place.node.is_empty());
    for n in [0, 1, 5, 123, 4099] {
        sums::<f32>(comm, key, n);
        sums::<bf16>(comm, derive(key, 1), n);
        sums::<u64>(comm, derive(key, 2), n);
        moves(comm, key, n);
    }
    started(comm, key);
    messages(comm, key);
    refusals(comm);
    comm.barrier().unwrap();
}

fn sums<T: Draw>(comm: &dyn Comm, key: u64, n: usize) {
    let (rank, size) = (comm.rank(), comm.size());
    let nan = || numbers::<T>(!key, size, n);
    let mut values: Vec<T> = numbers(key, rank, n);
    comm.all_reduce_sum(&mut values).unwrap();
    assert_bits(&values, &sum_by_rank(key, size, n), "all-reduce");

    let whole: Vec<T> = numbers(key, rank, n * size);
    let mut share = nan();
    comm.reduce_scatter_sum(&whole, &mut share).unwrap();
    assert_bits(&share, &sum_by_rank(key, size, n * size)[rank * n..][..n], "reduce-scatter");

    let lengths = unequal(size, n);
    let whole: Vec<T> = numbers(key, rank, lengths.iter().sum());
    let start: usize = lengths[..rank].iter().sum();
    let mut share: Vec<T> = numbers(!key, rank, lengths[rank]);
    comm.reduce_scatter_sum_parts(&whole, &lengths, &mut share).unwrap();
    let want = &sum_by_rank(key, size, whole.len())[start..][..lengths[rank]];
    assert_bits(&share, want, "reduce-scatter of unequal parts");
}

fn moves(comm: &dyn Comm, key: u64, n: usize) {
    let (rank, size) = (comm.rank(), comm.size());
    let mut all: Vec<f32> = numbers(!key, rank, n * size);
    comm.all_gather(&numbers(key, rank, n), &mut all).unwrap();
    let want: Vec<f32> = (0..size).flat_map(|r| numbers(key, r, n)).collect();
    assert_bits(&all, &want, "all-gather");

    let lengths = unequal(size, n);
    let mut all: Vec<bf16> = numbers(!key, rank, lengths.iter().sum());
    comm.all_gather_parts(&numbers(key, rank, lengths[rank]), &lengths, &mut all).unwrap();
    let want: Vec<bf16> = (0..size).flat_map(|r| numbers(key, r, lengths[r])).collect();
    assert_bits(&all, &want, "all-gather of unequal parts");

    let root = n % size;
    let mut values: Vec<u64> = numbers(key, rank, n);
    comm.broadcast(root, &mut values).unwrap();
    assert_bits(&values, &numbers(key, root, n), "broadcast");

    // Bytes, of lengths that the other ranks do not know.
    let bytes = |rank: usize| cast_slice::<u64, u8>(&numbers(key, rank, n * rank % 7 + n / 3)).to_vec();
    let all: Vec<Vec<u8>> = (0..size).map(bytes).collect();
    let mut own = bytes(rank);
    comm.broadcast_bytes(root, &mut own).unwrap();
    assert_eq!(own, all[root], "broadcast of bytes");
    assert_eq!(comm.all_gather_bytes(&bytes(rank)).unwrap(), all, "all-gather of bytes");
    let found = comm.gather_bytes(root, &bytes(rank)).unwrap();
    assert_eq!(found, (rank == root).then_some(all), "gather of bytes");
}

/// Sums that are under way together, waited for in another order, and one that is not.
fn started(comm: &dyn Comm, key: u64) {
    let (rank, size) = (comm.rank(), comm.size());
    let lengths = unequal(size, 100);
    let (n, m) = (1001, lengths.iter().sum::<usize>());
    let one = comm.start_all_reduce_sum(&numbers::<f32>(key, rank, n)).unwrap();
    let mut values: Vec<bf16> = numbers(key, rank, m);
    let mut two = comm.start_reduce_scatter_sum(&values, &lengths).unwrap();
    values.fill(bf16::NAN); // It has a copy.
    drop(comm.start_all_reduce_sum(&[rank as u64; 33]).unwrap());
    let three = comm.start_all_reduce_sum(&numbers::<u64>(key, rank, 3)).unwrap();
    let empty = comm.start_all_reduce_sum::<f32>(&[]).unwrap();
    comm.barrier().unwrap();

    let mut out = [0; 3];
    three.wait(&mut out).unwrap();
    assert_bits(&out, &sum_by_rank(key, size, 3), "third sum");
    while !two.poll().unwrap() {
        std::thread::yield_now();
    }
    let mut share: Vec<bf16> = numbers(!key, rank, lengths[rank]);
    two.wait(&mut share).unwrap();
    let start: usize = lengths[..rank].iter().sum();
    assert_bits(&share, &sum_by_rank(key, size, m)[start..][..lengths[rank]], "second sum");
    let mut out = vec![f32::NAN; n];
    one.wait(&mut out).unwrap();
    assert_bits(&out, &sum_by_rank(key, size, n), "first sum");
    empty.wait(&mut []).unwrap();
    let wrong = comm.start_all_reduce_sum(&[1.0f32; 3]).unwrap();
    assert!(wrong.wait(&mut [0.0; 2]).is_err(), "three sums do not go into two places");
}

/// What `from` gives `to` in message `number`.
fn letter(key: u64, from: usize, to: usize, number: usize) -> Vec<u8> {
    let n = [0, 1, 37, 5000][number % 4] + from;
    cast_slice::<u64, u8>(&numbers(derive(key, number as u64), 100 * from + to, n)).to_vec()
}

fn messages(comm: &dyn Comm, key: u64) {
    let (rank, size) = (comm.rank(), comm.size());
    let others = || (0..size).filter(move |&r| r != rank);
    assert_eq!(comm.try_receive(None, 3).unwrap(), None, "nobody has sent anything");
    comm.barrier().unwrap();
    // Everyone to everyone, before anyone receives; two tags.
    for number in 0..8 {
        others().for_each(|to| comm.send(to, (number % 2) as u8, &letter(key, rank, to, number)).unwrap());
    }
    for number in [1, 0, 3, 5, 2, 4, 6, 7] {
        for from in others() {
            let found = comm.receive(Some(from), (number % 2) as u8).unwrap();
            assert!(found.bytes == letter(key, from, rank, number) && found.from == from, "message {number}");
        }
    }
    // Rank 0 hands out what the others ask for, while it does something else.
    let jobs = 20;
    if rank == 0 {
        let (mut next, mut told, mut polls) = (0u64, 0, 0u64);
        while told + 1 < size {
            polls += 1;
            let Some(asked) = comm.try_receive(None, 200).unwrap() else {
                std::thread::yield_now();
                continue;
            };
            let answer: Vec<u8> = if next < jobs { next.to_le_bytes().to_vec() } else { vec![] };
            (next, told) = (next + 1, told + usize::from(answer.is_empty()));
            comm.send(asked.from, 201, &answer).unwrap();
        }
        assert!(size == 1 || (next == jobs + size as u64 - 1 && polls >= next));
    } else {
        let mut last = None;
        loop {
            comm.send(0, 200, &[]).unwrap();
            let answer = comm.receive(Some(0), 201).unwrap().bytes;
            let Ok(job) = <[u8; 8]>::try_from(&answer[..]) else { break };
            assert!(last < Some(job), "jobs are handed out once, in order");
            last = Some(job);
        }
    }
    comm.barrier().unwrap();
    assert_eq!(comm.try_receive(None, 200).unwrap(), None, "all messages were taken");
    if size == 1 {
        assert!(comm.receive(None, 0).is_err(), "nobody could ever send something");
    }
}

/// Refused before anyone is told, so by all ranks alike.
fn refusals(comm: &dyn Comm) {
    let (rank, size) = (comm.rank(), comm.size());
    assert!(comm.all_gather(&[1.0f32], &mut vec![0.0; size + 1]).is_err());
    assert!(comm.all_gather_parts(&[1u64], &vec![1; size + 1], &mut vec![0; size + 1]).is_err());
    assert!(comm.all_gather_parts(&[1u64], &vec![2; size], &mut vec![0; 2 * size]).is_err());
    assert!(comm.reduce_scatter_sum(&vec![0.0f32; 2 * size + 1], &mut [0.0; 2]).is_err());
    assert!(comm.start_reduce_scatter_sum(&vec![0u64; 2 * size + 1], &vec![2; size]).is_err());
    assert!(comm.start_reduce_scatter_sum(&[0u64; 1], &[]).is_err());
    assert!(comm.broadcast(size, &mut [1.0f32]).is_err());
    assert!(comm.broadcast_bytes(size, &mut vec![]).is_err());
    assert!(comm.gather_bytes(size, &[]).is_err());
    for no_peer in [rank, size] {
        assert!(comm.send(no_peer, 0, &[]).is_err());
        assert!(comm.try_receive(Some(no_peer), 0).is_err());
    }
}
