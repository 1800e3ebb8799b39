//! Tests of decoders and their adapters on the CPU.

mod common;
mod files;
mod generation;
mod gradients;
mod parity;
mod streams;
mod training;
