//! [`DataParallel`]: one training on several ranks.
//!
//! Rank r of n has a part of every step's tuples, and owns a part of the parameters (see
//! [`gradtx_runtime::parallel`]). In every step its gradients go into the sums, it gives all
//! others a [`LocalStep`], and what all agree on comes out ([`GlobalStep`]); then it updates what it
//! owns and gets the rest. Sums and values may go from device to device: that is over, on every
//! rank's host, before ranks exchange anything else. One rank alone does nothing of this
//! that costs time.

use anyhow::Result;
use gradtx_kernels::{Backend, Buffer, Collective, Real};
use gradtx_models::grad_transformer::{Batch, GradTransformer, Trainer};
use gradtx_runtime::comm::{Collectives, Comm};
use gradtx_runtime::parallel::{GradientSums, Shards, gather_on_first, share};
use gradtx_runtime::params::ParamLayout;
use gradtx_runtime::plan::{MemoryPlan, Purpose};
use std::ops::Range;
use std::time::Instant;

/// This rank and the others in a training.
pub struct DataParallel<'c, D: Collective> {
    comm: &'c dyn Comm,
    shards: Shards,
    /// None for one rank: its gradients are the sums.
    sums: Option<GradientSums<'c, D>>,
    /// Seconds of other communication.
    seconds: f64,
}

/// What a rank gives all others between gradients and update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LocalStep {
    /// Sum of squared errors of its tuples.
    pub error: f64,
    /// Sum of squares of the gradients that it owns, summed over ranks.
    pub squares: f64,
    /// Exit code of an end that somebody asked it for.
    pub asked: Option<u8>,
    /// Whether it is time for a checkpoint by its clock.
    pub due: bool,
    /// The newest step whose checkpoint it has written its part of; 0 for none.
    pub written: u64,
}

/// The same on all ranks, in the same bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GlobalStep {
    /// Sum of squared errors of all tuples of the step.
    pub error: f64,
    /// Sum of squares of the whole gradient.
    pub squares: f64,
    /// Exit code of an end that somebody asked for.
    pub asked: Option<u8>,
    /// Whether to write a checkpoint after this step: what rank 0's clock says.
    pub due: bool,
    /// The newest step whose checkpoint is whole; 0 for none.
    pub written: u64,
}

const WORDS: usize = 5;

impl LocalStep {
    fn numbers(self) -> [u64; WORDS] {
        let asked = self.asked.unwrap_or(0);
        [self.error.to_bits(), self.squares.to_bits(), asked.into(), self.due.into(), self.written]
    }
}

/// Sums are taken in the order of ranks.
fn agree(words: &[u64]) -> GlobalStep {
    let of = |i: usize| words.iter().skip(i).step_by(WORDS).copied();
    let sum = |i: usize| of(i).map(f64::from_bits).sum();
    GlobalStep {
        error: sum(0),
        squares: sum(1),
        asked: of(2).max().filter(|code| *code > 0).map(|code| code as u8),
        due: of(3).next() == Some(1),
        written: of(4).min().unwrap_or(0),
    }
}

impl<'c, D: Collective> DataParallel<'c, D> {
    /// For a model's parameters, in buckets of at least `bucket` elements. All ranks must call
    /// this.
    pub fn new(comm: &'c dyn Comm, device: &D, layout: &ParamLayout, bucket: usize) -> Result<Self> {
        let shards = Shards::new(layout, comm.size(), bucket);
        let sums = match comm.size() {
            1 => None,
            _ => Some(GradientSums::new(comm, device, shards.clone())?),
        };
        Ok(Self { comm, shards, sums, seconds: 0.0 })
    }

    /// What the ranks exchange with.
    pub fn comm(&self) -> &'c dyn Comm {
        self.comm
    }

    /// Whether this rank writes what is not per rank.
    pub fn is_first(&self) -> bool {
        self.comm.rank() == 0
    }

    /// This rank's part of `count` things in a row.
    pub fn part(&self, count: usize) -> Range<usize> {
        share(self.comm.rank(), self.comm.size(), count)
    }

    /// The parameters that this rank owns.
    pub fn owned(&self) -> Vec<Range<usize>> {
        self.shards.owned(self.comm.rank())
    }

    /// Whether devices exchange values among themselves.
    pub(crate) fn are_between_devices(&self) -> bool {
        self.sums.as_ref().is_some_and(GradientSums::is_between_devices)
    }

    /// Buffers on the host for the sums and for a checkpoint on its way, in bytes of `value` per
    /// value. What devices exchange among themselves has none.
    pub fn plan(&self, value: usize) -> MemoryPlan {
        let mut plan = MemoryPlan::new();
        let own: usize = self.owned().iter().map(Range::len).sum();
        plan.add(Purpose::Scratch, "a checkpoint being written", &[3, own], 4);
        if self.sums.is_some() && !self.are_between_devices() {
            let bucket = self.shards.buckets().iter().map(|b| b.range().len()).max().unwrap_or(0);
            // Filled, sent, and received from all others.
            plan.add(Purpose::Scratch, "gradients between ranks", &[3, bucket], 4);
            plan.add(Purpose::Scratch, "sums of own gradients", &[own], 4);
            plan.add(Purpose::Scratch, "values between ranks", &[bucket], value);
        }
        plan
    }

    /// Gradients of this rank's tuples, and starts to sum them over all ranks. Returns the sum of
    /// squared errors of its tuples.
    pub fn gradients<'t, X: Real<Acc = f32>>(
        &mut self,
        model: &GradTransformer<D, X>,
        trainer: &mut Trainer<D, X>,
        tuples: impl Into<Batch<'t, D, X>>,
        scale: f64,
    ) -> Result<f64>
    where
        D: Backend<X>,
    {
        let Some(sums) = &mut self.sums else {
            return Ok(trainer.gradients_alone(model, tuples, scale)?);
        };
        let device = model.device();
        Ok(trainer.gradients_of(model, tuples, scale, &mut |range, gradients| {
            sums.ready(device, &range, gradients)
        })?)
    }

    /// After [`Self::gradients`]: waits until those that this rank owns are the sums over all ranks.
    pub fn finish_gradients<X: Real<Acc = f32>>(
        &mut self,
        model: &GradTransformer<D, X>,
        trainer: &mut Trainer<D, X>,
    ) -> Result<()>
    where
        D: Backend<X>,
    {
        match &mut self.sums {
            Some(sums) => Ok(sums.finish(model.device(), trainer.gradients_mut())?),
            None => Ok(()),
        }
    }

    /// Every rank gives its local, and all come to the same.
    pub fn exchange(&mut self, local: LocalStep) -> Result<GlobalStep> {
        let begin = Instant::now();
        let mut all = vec![0; WORDS * self.comm.size()];
        self.comm.all_gather(&local.numbers(), &mut all)?;
        self.seconds += begin.elapsed().as_secs_f64();
        Ok(agree(&all))
    }

    /// After every rank has updated the values that it owns: gets those of the others.
    pub fn gather_values<X: Real<Acc = f32>>(&mut self, model: &mut GradTransformer<D, X>) -> Result<()>
    where
        D: Backend<X>,
    {
        let device = model.device().clone();
        match &mut self.sums {
            Some(sums) => Ok(sums.gather(&device, model.values_mut())?),
            None => Ok(()),
        }
    }

    /// All master values in the order of the flat buffer, on rank 0; what others get is of no
    /// use. All ranks must call this.
    pub fn masters_on_first<X: Real<Acc = f32>>(
        &self,
        model: &GradTransformer<D, X>,
        trainer: &Trainer<D, X>,
    ) -> Result<Vec<f32>>
    where
        D: Backend<X>,
    {
        if trainer.values_are_masters() {
            let all = model.values().view(0..if self.is_first() { model.layout().total() } else { 0 });
            let all = model.device().to_host(all)?;
            return Ok(all.iter().map(|x| x.to_f64() as f32).collect());
        }
        let own = trainer.master_values(model)?;
        Ok(gather_on_first(self.comm, &self.shards, &own)?.unwrap_or_default())
    }

    /// What rank 0 has, on all ranks.
    pub(crate) fn values_of_first(&self, mut values: Vec<f32>) -> Result<Vec<f32>> {
        let mut count = [values.len() as u64];
        self.comm.broadcast(0, &mut count)?;
        values.resize(count[0] as usize, 0.0);
        self.comm.broadcast(0, &mut values)?;
        Ok(values)
    }

    /// Ends the exchange of gradients and values after the last step. All ranks must call this. What was
    /// computed is safe before, so a failure is reported, and no error.
    pub fn close(&mut self, device: &D) {
        if let Some(Err(error)) = self.sums.take().map(|sums| sums.close(device)) {
            tracing::warn!("the devices of the ranks did not part in order: {error}");
        }
    }

    /// Seconds spent in communication since this was last asked.
    pub fn take_seconds(&mut self) -> f64 {
        let sums = self.sums.as_mut().map_or(0.0, GradientSums::take_seconds);
        std::mem::take(&mut self.seconds) + sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::cpu::Cpu;
    use gradtx_runtime::comm::local;

    #[test]
    fn ranks_agree_on_sums_and_on_the_most_urgent() {
        let words = [
            LocalStep { error: 1e16, squares: 0.25, asked: None, due: true, written: 40 },
            LocalStep { error: 1.0, squares: 0.5, asked: Some(75), due: false, written: 30 },
            LocalStep { error: -1e16, squares: 4.0, asked: None, due: false, written: 40 },
        ];
        let mut layout = ParamLayout::new();
        layout.push([("w", vec![100])]);
        let found: Vec<GlobalStep> = std::thread::scope(|scope| {
            let exchange = |comm: gradtx_runtime::comm::Local| {
                let mut ranks = DataParallel::new(&comm, &Cpu::new(1), &layout, 10).unwrap();
                ranks.exchange(words[comm.rank()]).unwrap()
            };
            let ranks: Vec<_> = local(3).into_iter().map(|c| scope.spawn(move || exchange(c))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        let want = GlobalStep { error: 0.0, squares: 4.75, asked: Some(75), due: true, written: 30 };
        assert_eq!(found, [want; 3], "1e16 + 1 is 1e16, from the left");
        let nan = LocalStep { squares: f64::NAN, asked: None, due: false, ..words[1] };
        let mut numbers = words[0].numbers().to_vec();
        numbers.extend(nan.numbers());
        let agreed = agree(&numbers);
        assert!(agreed.squares.is_nan() && agreed.asked.is_none() && agreed.due);
        numbers.rotate_left(WORDS);
        assert!(!agree(&numbers).due, "rank 0's clock counts");
    }
}
