//! The models: each with its configuration, weights, activations, forward and backward.

pub mod decoder;
mod fields;
mod foreign;
pub mod grad_transformer;
pub mod gradot;
mod layer_file;
pub mod linalg;
pub mod lora;
mod rewrite;
pub mod t5;

pub use foreign::ignore_fields;
pub use layer_file::{LAYERS_FILE, LayerFile, is_layer_file, read_layers, write_layers};
