//! [`Privacy`]: what an update says about what protects the examples that it was trained on.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The privacy guarantee of an update with respect to one example of its private set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "method", deny_unknown_fields)]
pub enum Privacy {
    /// There is none.
    #[default]
    None,
    /// Differentially private SGD: (ε, δ) by noise σC on gradients clipped to norm C,
    /// over Poisson-sampled batches.
    DpSgd {
        /// ε
        epsilon: f64,
        /// δ
        delta: f64,
        /// σ, noise as a multiple of C.
        sigma: f64,
        /// q, probability of an example to be in a batch.
        sampling_rate: f64,
        /// Optimizer steps.
        steps: u64,
        /// C, the norm that per-example gradients are clipped to.
        clip_norm: f64,
        /// Which data sets are hard to tell apart.
        neighbours: Neighbours,
        /// How ε was computed: `pld` or `rdp`.
        accountant: String,
        /// Where the random numbers are from.
        generator: Generator,
    },
}

/// The relation of two data sets that the guarantee is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Neighbours {
    /// One has one more example than the other.
    #[default]
    AddOrRemoveOneExample,
}

/// Where the random numbers of sampling and noise are from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Generator {
    /// ChaCha20, seeded by the operating system.
    #[default]
    ChaCha20,
    /// A seed that somebody chose, for tests: there is no privacy.
    Insecure,
}

impl fmt::Display for Privacy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::DpSgd {
            epsilon, delta, sigma, sampling_rate, steps, clip_norm, accountant, generator, ..
        } = self
        else {
            return f.write_str("no guarantee");
        };
        if *generator == Generator::Insecure {
            f.write_str("NOT PRIVATE, a test with a chosen seed; otherwise ")?;
        }
        write!(
            f,
            "ε {epsilon:.4}, δ {delta:e}, for one example added or removed; DP-SGD of {steps} steps, sampling rate \
             {sampling_rate:.6}, noise multiplier {sigma}, clipped to {clip_norm}, accountant {accountant}"
        )
    }
}
