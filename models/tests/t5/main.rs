//! T5 stacks and the Grad-Transformer: gradients by complex step, parity with transformers.
#![allow(clippy::unwrap_used)]

mod common;
mod gradients;
mod parity;
