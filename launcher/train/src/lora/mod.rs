//! Fine-tuning: [`trainer`] has the loop of LoRA adapters, [`private`] that of differentially private training,
//! [`layers`] that of the full weights of some layers, [`checkpoint`] what is kept of them on the way, and [`schedule`]
//! the order in which groups of jobs are handed out.

pub mod checkpoint;
pub mod layers;
pub mod private;
pub mod schedule;
mod streams;
pub mod trainer;
