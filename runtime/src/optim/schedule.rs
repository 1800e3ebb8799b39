//! Learning rate as a function of the optimizer step.

use crate::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the learning rate falls after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Decay {
    /// It stays the same.
    #[default]
    Constant,
    /// It falls along a line.
    Linear,
    /// It falls along half a cosine.
    Cosine,
}

/// Warm-up, then an optional hold at the peak, then decay to a fraction of the peak.
///
/// Steps count from 0. During `warmup` steps the rate is `peak · (step + 1) / warmup`,
/// so the first step already learns and the last of them is at the peak. After
/// `warmup + hold` steps the rate goes from `peak` towards `peak · final_fraction`,
/// which it would reach at step `steps` (one past the last) and keeps from there on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Highest learning rate.
    pub peak: f64,
    /// Form of the fall.
    #[serde(default)]
    pub decay: Decay,
    /// Steps of linear warm-up.
    #[serde(default)]
    pub warmup: u64,
    /// Steps at the peak between warm-up and decay.
    #[serde(default)]
    pub hold: u64,
    /// Steps in all.
    pub steps: u64,
    /// Where the decay ends, as a fraction of the peak.
    #[serde(default)]
    pub final_fraction: f64,
}

impl Schedule {
    /// The same rate at every step.
    pub fn constant(peak: f64, steps: u64) -> Self {
        Self { peak, decay: Decay::Constant, warmup: 0, hold: 0, steps, final_fraction: 0.0 }
    }

    /// Fails on numbers that make no schedule.
    pub fn check(&self) -> Result<()> {
        let bad = |why: String| Err(Error::invalid("learning-rate schedule", why));
        if !(self.peak.is_finite() && self.peak >= 0.0) {
            return bad(format!("peak {} is not a finite number of at least 0", self.peak));
        }
        if !(0.0..=1.0).contains(&self.final_fraction) {
            return bad(format!("final fraction {} is not between 0 and 1", self.final_fraction));
        }
        if self.steps == 0 {
            return bad("0 steps".into());
        }
        match self.warmup.checked_add(self.hold) {
            Some(before) if before <= self.steps => Ok(()),
            _ => bad(format!(
                "{} steps of warm-up and {} of hold do not fit into {} steps",
                self.warmup, self.hold, self.steps
            )),
        }
    }

    /// The learning rate of a step, counted from 0.
    pub fn lr(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        let start = self.warmup + self.hold;
        if step < start {
            return self.peak;
        }
        let length = self.steps.saturating_sub(start).max(1) as f64;
        let progress = ((step - start) as f64 / length).min(1.0);
        let left = match self.decay {
            Decay::Constant => return self.peak,
            Decay::Linear => 1.0 - progress,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.peak * (self.final_fraction + (1.0 - self.final_fraction) * left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-12, "{a} is not {b}");
    }

    #[test]
    fn warm_up_hold_and_decay_meet_at_the_peak() {
        for decay in [Decay::Linear, Decay::Cosine] {
            let s = Schedule { peak: 2.0, decay, warmup: 4, hold: 3, steps: 17, final_fraction: 0.1 };
            s.check().unwrap();
            near(s.lr(0), 0.5);
            near(s.lr(3), 2.0);
            near(s.lr(6), 2.0);
            near(s.lr(7), 2.0);
            near(s.lr(12), 0.2 + 1.8 * 0.5);
            near(s.lr(17), 0.2);
            near(s.lr(1000), 0.2);
            assert!((4..17).all(|t| s.lr(t + 1) <= s.lr(t)));
        }
    }

    #[test]
    fn linear_without_warm_up_is_the_common_one() {
        let s = Schedule { decay: Decay::Linear, ..Schedule::constant(1.0, 10) };
        (0..10).for_each(|t| near(s.lr(t), (10 - t) as f64 / 10.0));
        let constant = Schedule { warmup: 2, ..Schedule::constant(3.0, 10) };
        assert_eq!([0, 1, 2, 99].map(|t| constant.lr(t)), [1.5, 3.0, 3.0, 3.0]);
    }

    #[test]
    fn impossible_schedules_are_refused() {
        let good = Schedule::constant(1e-4, 10);
        good.check().unwrap();
        for bad in [
            Schedule { peak: f64::NAN, ..good },
            Schedule { peak: -1.0, ..good },
            Schedule { steps: 0, ..good },
            Schedule { warmup: 6, hold: 5, ..good },
            Schedule { warmup: u64::MAX, hold: 2, ..good },
            Schedule { final_fraction: 1.5, ..good },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }
}
