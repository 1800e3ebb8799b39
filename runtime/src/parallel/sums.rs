//! [`GradientSums`]: gradients become sums over ranks, bucket by bucket.

use super::{Readiness, Shards, overlap};
use crate::comm::{Collectives, Comm, Pending};
use crate::{Error, Result};
use gradtx_kernels::{Device, Elem};
use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

/// The gradients of one step after the other, on their way between ranks. All memory is on
/// the host: communication is between host buffers.
pub struct GradientSums<'c> {
    comm: &'c dyn Comm,
    shards: Shards,
    readiness: Readiness,
    /// Gradients of each bucket that is not complete, once there are any.
    filling: Vec<Option<Vec<f32>>>,
    /// Memory of buckets that were sent.
    free: Vec<Vec<f32>>,
    /// Sums under way, by bucket, in the order in which they were started.
    pending: VecDeque<(usize, Pending<'c, f32>)>,
    /// Sums of this rank's share of each bucket.
    sums: Vec<Vec<f32>>,
    /// Time spent here.
    time: Duration,
}

impl<'c> GradientSums<'c> {
    /// For a backward pass on each rank of `comm`, which must be as many as those of `shards`.
    pub fn new(comm: &'c dyn Comm, shards: Shards) -> Self {
        assert_eq!(comm.size(), shards.ranks(), "shards are made for the ranks that there are");
        let sums = shards.buckets().iter().map(|b| vec![0.0; b.share(comm.rank()).len()]).collect();
        Self {
            comm,
            readiness: Readiness::new(&shards),
            filling: vec![None; shards.buckets().len()],
            free: vec![],
            pending: VecDeque::new(),
            sums,
            shards,
            time: Duration::ZERO,
        }
    }

    /// Which elements each rank owns.
    pub fn shards(&self) -> &Shards {
        &self.shards
    }

    /// Seconds spent in communication since this was last asked: starting, moving on, waiting.
    pub fn take_seconds(&mut self) -> f64 {
        std::mem::take(&mut self.time).as_secs_f64()
    }

    /// Takes note that this rank's gradients of a range are final, and starts the sums of the
    /// buckets that are complete with it. All ranks must report the same ranges in the same
    /// order.
    pub fn ready<D: Device>(
        &mut self,
        device: &D,
        range: &Range<usize>,
        gradients: D::View<'_, f32>,
    ) -> Result<()> {
        let begin = Instant::now();
        // From the back to the front, as backward passes go.
        for i in (0..self.shards.buckets().len()).rev() {
            let bucket = &self.shards.buckets()[i];
            let part = overlap(range, &bucket.range());
            if part.is_empty() {
                continue;
            }
            let place = part.start - bucket.range().start..part.end - bucket.range().start;
            let filling = self.filling[i].get_or_insert_with(|| {
                let mut memory = self.free.pop().unwrap_or_default();
                memory.clear();
                // Gaps between groups must not bring anything into the sums.
                memory.resize(bucket.range().len(), 0.0);
                memory
            });
            let view = D::slice(gradients, part.start - range.start..part.end - range.start);
            device.download(&mut filling[place], view)?;
            if self.readiness.note(&self.shards, i, &part)? {
                self.start(i)?;
            }
        }
        self.comm.poll()?;
        self.take_finished()?;
        self.time += begin.elapsed();
        Ok(())
    }

    fn start(&mut self, bucket: usize) -> Result<()> {
        let lengths = self.shards.buckets()[bucket].lengths();
        let values = self.filling[bucket].take();
        let values = values.ok_or_else(|| Error::invalid("gradients", "a bucket was complete twice"))?;
        self.pending.push_back((bucket, self.comm.start_reduce_scatter_sum(&values, &lengths)?));
        self.free.push(values);
        Ok(())
    }

    /// Puts sums that are done where they belong, which frees the memory of others' shares.
    fn take_finished(&mut self) -> Result<()> {
        while let Some((_, sum)) = self.pending.front_mut() {
            if !sum.poll()? {
                break;
            }
            self.take_first()?;
        }
        Ok(())
    }

    fn take_first(&mut self) -> Result<()> {
        if let Some((bucket, sum)) = self.pending.pop_front() {
            sum.wait(&mut self.sums[bucket])?;
        }
        Ok(())
    }

    /// After the backward pass: waits for all sums. In `gradients`, the whole flat buffer, what
    /// this rank owns becomes the sum over all ranks; the rest stays what it was. Then
    /// everything is ready for the next step.
    pub fn finish<D: Device>(&mut self, device: &D, gradients: &mut D::Buf<f32>) -> Result<()> {
        let begin = Instant::now();
        self.readiness.expect_all()?;
        while !self.pending.is_empty() {
            self.take_first()?;
        }
        self.readiness = Readiness::new(&self.shards);
        for (bucket, sums) in self.shards.buckets().iter().zip(&self.sums) {
            device.upload(D::view_mut(gradients, bucket.share(self.comm.rank())), sums)?;
        }
        self.time += begin.elapsed();
        Ok(())
    }

    /// Every rank has new values of what it owns; afterwards `values`, the whole flat buffer,
    /// has the new values of all.
    pub fn gather<X: Elem, D: Device>(&mut self, device: &D, values: &mut D::Buf<X>) -> Result<()> {
        let begin = Instant::now();
        let mut whole = vec![];
        for bucket in self.shards.buckets() {
            let own = device.to_host(D::view(values, bucket.share(self.comm.rank())))?;
            whole.resize(bucket.range().len(), X::zeroed());
            self.comm.all_gather_parts(&own, &bucket.lengths(), &mut whole)?;
            device.upload(D::view_mut(values, bucket.range()), &whole)?;
        }
        self.time += begin.elapsed();
        Ok(())
    }
}

/// Every rank has values of what it owns, one after the other: on rank 0 they all come to
/// where they belong in the flat buffer, on the others nothing comes of it.
pub fn gather_on_first(comm: &dyn Comm, shards: &Shards, own: &[f32]) -> Result<Option<Vec<f32>>> {
    let Some(parts) = comm.gather_bytes(0, bytemuck::cast_slice(own))? else { return Ok(None) };
    let mut all = vec![0.0f32; shards.total()];
    for (rank, part) in parts.iter().enumerate() {
        let mut rest = &part[..];
        for range in shards.owned(rank) {
            let (values, after) = rest.split_at(size_of::<f32>() * range.len());
            bytemuck::cast_slice_mut(&mut all[range]).copy_from_slice(values);
            rest = after;
        }
    }
    Ok(Some(all))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{layout, passes};
    use super::*;
    use crate::comm::{Local, local};
    use crate::optim::FlatAdamW;
    use gradtx_kernels::cpu::Cpu;
    use gradtx_kernels::ops::AdamWStep;
    use gradtx_kernels::rng::Stream;

    /// What every rank of `ranks` does, on a thread of its own.
    fn on_ranks<T: Send>(ranks: usize, work: impl Fn(Local) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let work = &work;
            let ranks: Vec<_> =
                local(ranks).into_iter().map(|rank| scope.spawn(move || work(rank))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    fn random(n: usize, key: u64) -> Vec<f32> {
        let mut stream = Stream::new(key);
        (0..n).map(|_| stream.normal() as f32).collect()
    }

    /// Gradients of a rank in a step; gaps, which no pass writes to, are zero.
    fn gradients(rank: usize, step: u32) -> Vec<f32> {
        let mut all = vec![0.0; layout().total()];
        for param in layout().params() {
            let values = random(param.len(), (rank as u64 * 100 + step as u64) * 1000 + param.offset as u64);
            all[param.range()].copy_from_slice(&values);
        }
        all
    }

    fn step(number: u32) -> AdamWStep {
        AdamWStep { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: number }
    }

    /// Three steps on one rank, with sums over the contributions of `parts` ranks.
    fn alone(parts: usize) -> (Vec<f32>, Vec<f64>) {
        let cpu = Cpu::new(1);
        let total = layout().total();
        let mut values = random(total, 1);
        let mut optimizer = FlatAdamW::<Cpu, f32>::new(&cpu, 1, total).unwrap();
        let norms = (1..=3).map(|number| {
            let mut sum = vec![0.0; total];
            for rank in 0..parts {
                sum.iter_mut().zip(gradients(rank, number)).for_each(|(s, g)| *s += g);
            }
            optimizer.step(&cpu, &mut values, &sum, step(number), Some(1.0)).unwrap()[0]
        });
        let norms = norms.collect();
        (values, norms)
    }

    /// The same on as many ranks.
    fn together(ranks: usize, bucket: usize) -> Vec<(Vec<f32>, Vec<f64>)> {
        on_ranks(ranks, |comm| {
            let (cpu, layout) = (Cpu::new(1), layout());
            let shards = Shards::new(&layout, ranks, bucket);
            let mut optimizer =
                FlatAdamW::<Cpu, f32>::over_ranges(&cpu, layout.total(), shards.owned(comm.rank())).unwrap();
            let mut sums = GradientSums::new(&comm, shards);
            let mut values = cpu.buffer_from(&random(layout.total(), 1)).unwrap();
            let mut norms = vec![];
            for number in 1..=3 {
                let mut grads = cpu.buffer_from(&gradients(comm.rank(), number)).unwrap();
                for range in passes().iter().rev() {
                    sums.ready(&cpu, range, &grads[range.clone()]).unwrap();
                }
                sums.finish(&cpu, &mut grads).unwrap();
                let mut squares = vec![0.0; ranks];
                comm.all_gather(&[optimizer.sum_squares(&cpu, &grads).unwrap()], &mut squares).unwrap();
                let total = squares.iter().sum();
                let norm =
                    optimizer.step_with(&cpu, &mut values, &grads, step(number), Some(1.0), total).unwrap();
                norms.push(norm);
                sums.gather(&cpu, &mut values).unwrap();
            }
            assert!(sums.take_seconds() > 0.0 && sums.take_seconds() == 0.0);
            (values.to_vec(), norms)
        })
    }

    #[test]
    fn ranks_together_make_the_steps_of_one() {
        for (ranks, bucket) in [(1, 200), (2, 5000), (2, 200), (3, 100), (5, 64)] {
            let (values, norms) = alone(ranks);
            let found = together(ranks, bucket);
            for (rank, (own_values, own_norms)) in found.iter().enumerate() {
                let say = format!("rank {rank} of {ranks}, buckets of {bucket}");
                assert_eq!((own_values, own_norms), (&found[0].0, &found[0].1), "{say}: as rank 0");
                for (a, b) in own_norms.iter().zip(&norms) {
                    assert!((a - b).abs() <= 1e-6 * b, "{say}: norms {a} and {b}");
                }
                let worst = own_values.iter().zip(&values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(worst <= 1e-5, "{say}: values differ by {worst}");
            }
            assert_eq!(together(ranks, bucket), found, "the same bits again");
        }
        // Another rank's contribution more changes the result.
        let difference = alone(2).0.iter().zip(&alone(3).0).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference > 1e-3, "{difference}");
    }

    #[test]
    fn what_all_own_comes_together_on_rank_0() {
        let all = random(layout().total(), 3);
        let found = on_ranks(3, |comm| {
            let shards = Shards::new(&layout(), 3, 200);
            let own: Vec<f32> = shards.owned(comm.rank()).into_iter().flat_map(|r| all[r].to_vec()).collect();
            gather_on_first(&comm, &shards, &own).unwrap()
        });
        assert_eq!(found, [Some(all), None, None]);
    }

    #[test]
    fn a_pass_that_forgets_gradients_is_found_out() {
        let errors = on_ranks(2, |comm| {
            let (cpu, layout) = (Cpu::new(1), layout());
            let mut sums = GradientSums::new(&comm, Shards::new(&layout, 2, 300));
            let mut grads = cpu.buffer_from(&gradients(comm.rank(), 1)).unwrap();
            for range in passes().iter().skip(1).rev() {
                sums.ready(&cpu, range, &grads[range.clone()]).unwrap();
            }
            sums.finish(&cpu, &mut grads).unwrap_err().to_string()
        });
        assert!(errors.iter().all(|e| e.contains("141 elements")), "{errors:?}");
    }
}
