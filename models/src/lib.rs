//! The models: each with its configuration, weights, activations, forward and backward.

pub mod grad_transformer;
pub mod t5;
