//! The cost model: what a run will take, before anything runs.
//!
//! In: a configuration, the sizes of two base models (their `config.json` is enough), the
//! lengths of examples, and a cluster. Out: a [`Prediction`]: memory per rank, time and GPU
//! hours of every stage, who waits for whom, and for every number whether the rates behind
//! it were measured or are assumed. `docs/cost-model.md` has the formulas and their sources.
//!
//! * device: what a device could reach, and the links between devices.
//! * rates: what part of that our work reaches, assumed or [`calibrate`]d from benchmarks.
//! * tokens: lengths of examples.
//! * work: operations and bytes of a step of each kind of work.
//! * memory: the stages' own memory plans, in the device's types.
//! * simulate: groups of shadow jobs over ranks, as [`gradtx_train::lora::schedule`] hands them out.
//! * products: translation by products, and refinement.
//! * emulate: statistics for an emulator (GradOT).
//! * predict: all of it together, as a [`prediction`].
//! * recommend: nodes and sizes of groups with the shortest time to the end.

pub mod calibrate;
pub mod device;
pub mod emulate;
pub mod memory;
pub mod predict;
pub mod prediction;
pub mod products;
pub mod rates;
mod recommend;
pub mod simulate;
pub mod tokens;
pub mod work;

pub use device::{Cluster, Gpu};
pub use predict::{Question, predict};
pub use prediction::{Prediction, Recommendation};
pub use rates::Rates;
pub use tokens::Lengths;

#[cfg(test)]
mod tests;
