//! The models: each with its configuration, weights, activations, forward and backward.

pub mod t5;
