//! LoRA training: [`trainer`] has the loop, [`checkpoint`] what is kept of it on the way, and
//! [`schedule`] the order in which groups of jobs are handed out.

pub mod checkpoint;
pub mod schedule;
pub mod trainer;
