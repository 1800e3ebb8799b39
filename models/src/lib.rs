//! The models: each with its configuration, weights, activations, forward and backward.

pub mod decoder;
pub mod grad_transformer;
pub mod lora;
pub mod t5;
