//! Time of work on a device: samples, and what they report together.
//!
//! Work is queued, and the device waited for once per sample. A sample of a single operation
//! is many calls back to back, so that neither the wait nor the launch of a call counts; a
//! sample of a step is one step, which waits by itself.

use anyhow::Result;
use gradtx_kernels::Device;
use serde_json::{Value, json};
use std::time::Instant;

/// Seconds that a sample of a single operation takes at least.
const SAMPLE: f64 = 0.02;
/// Calls of a sample at most.
const MAX_CALLS: usize = 1000;

/// Samples and warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repeats {
    /// Samples that are not counted.
    pub warmup: usize,
    /// Samples that are counted; at least one.
    pub runs: usize,
}

/// Seconds of one call.
#[derive(Clone, Debug, PartialEq)]
pub struct Times {
    /// Samples, in increasing order.
    samples: Vec<f64>,
    /// Calls of each sample.
    pub calls: usize,
}

impl Times {
    /// Of samples in any order, at least one.
    pub fn new(mut samples: Vec<f64>, calls: usize) -> Self {
        samples.sort_by(f64::total_cmp);
        Self { samples, calls }
    }

    /// Number of samples.
    pub fn runs(&self) -> usize {
        self.samples.len()
    }

    /// The sample below which the part `q` of all lies, between two samples by their distance.
    pub fn quantile(&self, q: f64) -> f64 {
        let at = q * (self.samples.len() - 1) as f64;
        let (low, high) = (self.samples[at.floor() as usize], self.samples[at.ceil() as usize]);
        low + (high - low) * at.fract()
    }

    /// Seconds of all samples.
    pub fn total(&self) -> f64 {
        self.samples.iter().sum::<f64>() * self.calls as f64
    }

    /// The middle sample.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// What this takes longer than another: each sample less the other's fastest, which holds the
    /// least of what does not belong to either.
    pub fn beyond(&self, other: &Times) -> Self {
        let fastest = other.quantile(0.0);
        Self { samples: self.samples.iter().map(|s| s - fastest).collect(), calls: self.calls }
    }

    /// Each sample divided among so many equal parts.
    pub fn by(&self, parts: usize) -> Self {
        Self { samples: self.samples.iter().map(|s| s / parts as f64).collect(), calls: self.calls }
    }
}

/// Samples of an operation, which only queues its work.
pub fn operation<D: Device>(
    device: &D,
    repeats: Repeats,
    mut call: impl FnMut() -> Result<()>,
) -> Result<Times> {
    let mut sample = |calls: usize| -> Result<f64> {
        device.synchronize()?;
        let begin = Instant::now();
        for _ in 0..calls {
            call()?;
        }
        device.synchronize()?;
        Ok(begin.elapsed().as_secs_f64())
    };
    // The first call may compile, and the second says how long one takes.
    sample(1)?;
    let one = sample(1)?;
    let calls = ((SAMPLE / one.max(1e-9)).ceil() as usize).clamp(1, MAX_CALLS);
    for _ in 0..repeats.warmup {
        sample(calls)?;
    }
    let samples = (0..repeats.runs).map(|_| Ok(sample(calls)? / calls as f64)).collect::<Result<_>>()?;
    Ok(Times::new(samples, calls))
}

/// Samples of a step, one call each.
pub fn step<D: Device>(device: &D, repeats: Repeats, mut call: impl FnMut() -> Result<()>) -> Result<Times> {
    let mut samples = Vec::with_capacity(repeats.runs);
    for run in 0..repeats.warmup + repeats.runs {
        device.synchronize()?;
        let begin = Instant::now();
        call()?;
        device.synchronize()?;
        if run >= repeats.warmup {
            samples.push(begin.elapsed().as_secs_f64());
        }
    }
    Ok(Times::new(samples, 1))
}

/// Five significant digits.
pub fn rounded(x: f64) -> Value {
    json!(format!("{x:.4e}").parse::<f64>().unwrap_or(x))
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_kernels::cpu::Cpu;
    use std::time::Duration;

    #[test]
    fn quantiles_lie_between_samples() {
        let times = Times::new(vec![4.0, 1.0, 2.0, 3.0], 1);
        assert_eq!([0.0, 0.5, 1.0].map(|q| times.quantile(q)), [1.0, 2.5, 4.0]);
        assert_eq!(times.quantile(0.25), 1.75);
        assert_eq!(times.beyond(&Times::new(vec![0.5, 0.75], 1)).median(), 2.0);
        assert_eq!(times.by(2).median(), 1.25);
    }

    #[test]
    fn a_sample_is_one_step_or_many_calls() {
        let cpu = Cpu::new(1);
        let repeats = Repeats { warmup: 1, runs: 3 };
        let mut count = 0;
        let nap = Duration::from_millis(4);
        let times = operation(&cpu, repeats, || {
            count += 1;
            std::thread::sleep(nap);
            Ok(())
        });
        let times = times.unwrap();
        assert_eq!((times.runs(), count), (3, 2 + 4 * times.calls));
        assert!((2..=5).contains(&times.calls) && times.median() >= 0.004, "{times:?}");
        let mut count = 0;
        let times = step(&cpu, repeats, || {
            count += 1;
            Ok(())
        });
        assert_eq!((times.unwrap().runs(), count), (3, 4));
    }
}
