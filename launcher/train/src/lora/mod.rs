//! LoRA training: [`trainer`] has the loop, [`private`] that of differentially private training, [`checkpoint`] what
//! is kept of them on the way, and [`schedule`] the order in which groups of jobs are handed out.

pub mod checkpoint;
pub mod private;
pub mod schedule;
pub mod trainer;
