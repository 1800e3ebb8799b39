//! Which examples a job sees at which optimizer step.

use crate::{Error, Result};
use gradtx_kernels::rng::{Stream, derive};

/// The order of a job's examples: one random permutation per epoch, one after the
/// other, cut into steps of `batch` examples. A step may end one epoch and begin the
/// next, so every example is seen equally often.
///
/// A step's examples depend on the key and on the step only: a job that continues after
/// a crash, or on another rank, sees what it would have seen.
#[derive(Clone, Debug)]
pub struct Order {
    examples: usize,
    batch: usize,
    key: u64,
    /// The epoch that was asked for last, and its permutation.
    epoch: Option<(usize, Vec<usize>)>,
}

impl Order {
    /// The order of `examples` examples in steps of `batch`.
    pub fn new(examples: usize, batch: usize, key: u64) -> Result<Self> {
        if examples == 0 || batch == 0 {
            let why = format!("{examples} examples in steps of {batch} make no order");
            return Err(Error::invalid("training data", why));
        }
        Ok(Self { examples, batch, key, epoch: None })
    }

    /// Examples of a step, counted from 0.
    pub fn step(&mut self, step: usize) -> Vec<usize> {
        let first = step * self.batch;
        (first..first + self.batch).map(|place| self.at(place)).collect()
    }

    /// Epochs that `steps` steps go through.
    pub fn epochs(&self, steps: usize) -> f64 {
        (steps * self.batch) as f64 / self.examples as f64
    }

    fn at(&mut self, place: usize) -> usize {
        let (epoch, within) = (place / self.examples, place % self.examples);
        if let Some((cached, order)) = &self.epoch
            && *cached == epoch
        {
            return order[within];
        }
        let order = Stream::new(derive(self.key, epoch as u64)).permutation(self.examples);
        let found = order[within];
        self.epoch = Some((epoch, order));
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_holds_every_example_once() {
        let mut order = Order::new(7, 3, 5).unwrap();
        let seen: Vec<usize> = (0..14).flat_map(|s| order.step(s)).collect();
        let mut epochs: Vec<Vec<usize>> = seen.chunks(7).map(<[usize]>::to_vec).collect();
        assert!(epochs.windows(2).any(|w| w[0] != w[1]));
        for epoch in &mut epochs {
            epoch.sort_unstable();
            assert_eq!(*epoch, (0..7).collect::<Vec<_>>());
        }
        assert_eq!(order.epochs(14), 6.0);
    }

    #[test]
    fn a_step_depends_on_nothing_but_key_and_number() {
        let mut forward = Order::new(10, 4, 5).unwrap();
        let all: Vec<_> = (0..9).map(|s| forward.step(s)).collect();
        let mut backward = Order::new(10, 4, 5).unwrap();
        for s in (0..9).rev() {
            assert_eq!(backward.step(s), all[s]);
        }
        assert_ne!(Order::new(10, 4, 6).unwrap().step(0), all[0]);
        assert!(Order::new(0, 4, 5).is_err() && Order::new(4, 0, 5).is_err());
        assert_eq!(Order::new(2, 5, 1).unwrap().step(0).len(), 5);
    }
}
