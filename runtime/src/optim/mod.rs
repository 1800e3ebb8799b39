//! Optimizers over flat buffers, and learning-rate schedules.
//!
//! In: parameters and gradients as views of one flat buffer. Out: the parameters,
//! changed in place, and the gradient norms of the step. A gradient that is not
//! finite is an error *before* anything changes, so the state on disk and in memory
//! stays the one of the last good step.

mod adamw;
mod config;
mod muon;
mod schedule;
mod store;

pub use adamw::FlatAdamW;
pub use config::{AdamWConfig, OptimizerConfig};
pub use muon::{Matrix, Muon, MuonStep};
pub use schedule::{Decay, Schedule};
pub use store::{ParamStore, Trained};

use crate::{Error, Result};

/// Norms from sums of squares; fails on the first that is not finite.
fn finite_norms<A: gradtx_kernels::Real>(
    sums: &[A],
    step: impl std::fmt::Display,
    name: impl Fn(usize) -> String,
) -> Result<Vec<f64>> {
    let norms: Vec<f64> = sums.iter().map(|s| s.to_f64().sqrt()).collect();
    match norms.iter().position(|n| !n.is_finite()) {
        None => Ok(norms),
        Some(at) => {
            let why = format!("its norm is {} at {step}; nothing was updated", norms[at]);
            Err(Error::invalid(format!("gradient of {}", name(at)), why))
        }
    }
}
