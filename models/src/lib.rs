//! The models: each with its configuration, weights, activations, forward and backward.

pub mod decoder;
mod fields;
mod foreign;
pub mod grad_transformer;
pub mod gradot;
pub mod linalg;
pub mod lora;
pub mod t5;

pub use foreign::ignore_fields;
