//! [`GradientSums`]: gradients become sums over ranks, bucket by bucket.

use super::host::HostSums;
use super::{Readiness, Shards, group, overlap};
use crate::Result;
use crate::comm::Comm;
use gradtx_kernels::{Buffer, Collective, Elem, View, ViewMut};
use std::ops::Range;
use std::time::{Duration, Instant};

/// The gradients of one step after the other, on their way between ranks.
pub struct GradientSums<'c, D: Collective> {
    shards: Shards,
    readiness: Readiness,
    way: Way<'c, D>,
    /// Time spent here.
    time: Duration,
}

/// How they go.
enum Way<'c, D: Collective> {
    Host(HostSums<'c>),
    /// In place, from device to device.
    Devices(D::Group),
}

impl<'c, D: Collective> GradientSums<'c, D> {
    /// For a backward pass on each rank of `comm`, which must be as many as those of `shards`.
    /// All ranks must call this: their devices form a group, if all can. If not, rank 0 logs
    /// why, and everything goes through the host.
    pub fn new(comm: &'c dyn Comm, device: &D, shards: Shards) -> Result<Self> {
        assert_eq!(comm.size(), shards.ranks(), "shards are made for the ranks that there are");
        let way = match group::form(comm, device)? {
            Some(group) => Way::Devices(group),
            None => Way::Host(HostSums::new(comm, &shards)),
        };
        Ok(Self { readiness: Readiness::new(&shards), way, shards, time: Duration::ZERO })
    }

    /// Which elements each rank owns.
    pub fn shards(&self) -> &Shards {
        &self.shards
    }

    /// Whether values go from device to device, so that the host needs no memory for them.
    pub fn is_between_devices(&self) -> bool {
        matches!(self.way, Way::Devices(_))
    }

    /// Seconds spent in communication since this was last asked: starting, moving on, waiting.
    /// What devices exchange while they compute costs no time that counts.
    pub fn take_seconds(&mut self) -> f64 {
        std::mem::take(&mut self.time).as_secs_f64()
    }

    /// Takes note that this rank's gradients of a range are final, and starts the sums of the
    /// buckets that are complete with it. `gradients` is the whole flat buffer; nobody may
    /// write to what is final before [`Self::finish`]. All ranks must report the same ranges
    /// in the same order.
    pub fn ready(
        &mut self,
        device: &D,
        range: &Range<usize>,
        mut gradients: D::ViewMut<'_, f32>,
    ) -> Result<()> {
        let begin = Instant::now();
        // From the back to the front, as backward passes go.
        for i in (0..self.shards.buckets().len()).rev() {
            let bucket = &self.shards.buckets()[i];
            let part = overlap(range, &bucket.range());
            if part.is_empty() {
                continue;
            }
            if let Way::Host(host) = &mut self.way {
                let view = gradients.freeze().slice(part.clone());
                host.take(device, &self.shards, i, &part, view)?;
            }
            if self.readiness.note(&self.shards, i, &part)? {
                match &mut self.way {
                    Way::Host(host) => host.start(&self.shards, i)?,
                    Way::Devices(group) => {
                        let whole = gradients.reborrow().slice(bucket.range());
                        device.start_sums(group, whole, &bucket.shares_within())?;
                    }
                }
            }
        }
        if let Way::Host(host) = &mut self.way {
            host.poll()?;
        }
        self.time += begin.elapsed();
        Ok(())
    }

    /// After the backward pass: waits for all sums. In `gradients`, the whole flat buffer, what
    /// this rank owns becomes the sum over all ranks; the rest stays what it was. Then
    /// everything is ready for the next step.
    pub fn finish(&mut self, device: &D, gradients: &mut D::Buf<f32>) -> Result<()> {
        self.readiness.expect_all()?;
        let begin = self.begin_wait(device)?;
        match &mut self.way {
            Way::Host(host) => host.finish(device, &self.shards, gradients)?,
            Way::Devices(group) => device.finish_group(group)?,
        }
        self.readiness = Readiness::new(&self.shards);
        self.time += begin.elapsed();
        Ok(())
    }

    /// Every rank has new values of what it owns; afterwards `values`, the whole flat buffer,
    /// has the new values of all.
    pub fn gather<X: Elem>(&mut self, device: &D, values: &mut D::Buf<X>) -> Result<()> {
        let begin = self.begin_wait(device)?;
        match &mut self.way {
            Way::Host(host) => host.gather(device, &self.shards, values)?,
            Way::Devices(group) => {
                for bucket in self.shards.buckets() {
                    let whole = values.view_mut(bucket.range());
                    device.start_gather(group, whole, &bucket.shares_within())?;
                }
                // Before the host says anything to other ranks: both at once may block each other.
                device.finish_group(group)?;
            }
        }
        self.time += begin.elapsed();
        Ok(())
    }

    /// Ends what this was made for, after the last step; all ranks must call this. Dropped instead, as after an
    /// error, it waits for no other rank.
    pub fn close(self, device: &D) -> Result<()> {
        match self.way {
            Way::Host(_) => Ok(()),
            Way::Devices(group) => Ok(device.close_group(group)?),
        }
    }

    /// When a wait for communication begins: devices that exchange values compute as well, and
    /// until they have done that nobody waits for communication.
    fn begin_wait(&self, device: &D) -> Result<Instant> {
        if self.is_between_devices() {
            device.synchronize()?;
        }
        Ok(Instant::now())
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
    use crate::comm::{Collectives, Local, local};
    use crate::optim::FlatAdamW;
    use gradtx_kernels::Device;
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
            let mut sums = GradientSums::new(&comm, &cpu, shards).unwrap();
            let mut values = cpu.buffer_from(&random(layout.total(), 1)).unwrap();
            let mut norms = vec![];
            for number in 1..=3 {
                let mut grads = cpu.buffer_from(&gradients(comm.rank(), number)).unwrap();
                for range in passes().iter().rev() {
                    sums.ready(&cpu, range, &mut grads).unwrap();
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
            let mut sums = GradientSums::new(&comm, &cpu, Shards::new(&layout, 2, 300)).unwrap();
            let mut grads = cpu.buffer_from(&gradients(comm.rank(), 1)).unwrap();
            for range in passes().iter().skip(1).rev() {
                sums.ready(&cpu, range, &mut grads).unwrap();
            }
            sums.finish(&cpu, &mut grads).unwrap_err().to_string()
        });
        assert!(errors.iter().all(|e| e.contains("141 elements")), "{errors:?}");
    }
}
