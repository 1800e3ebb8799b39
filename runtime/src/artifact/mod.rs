//! What is on disk: read by memory map, written atomically.

mod atomic;
mod tensors;

pub use atomic::write_atomic;
pub use tensors::{NewTensor, TensorData, TensorFile, TensorSource, write_tensors};
