//! Tests of decoders and their adapters on the CPU.

// Helpers of tests may unwrap, as tests may.
#![allow(clippy::unwrap_used)]

mod common;
mod emulator;
mod files;
mod fisher;
mod generation;
mod gradients;
mod layers;
mod parity;
mod per_example;
mod statistics;
mod streams;
mod training;
