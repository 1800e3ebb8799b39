//! Everything that is not the mathematics of a model.
//!
//! * [`data`]: from files of examples to packed token streams on a device.
//! * [`artifact`]: what is on disk, read by memory map and written atomically.
//! * [`params`]: names, shapes and places of parameters in one flat buffer.
//! * [`optim`]: optimizers over flat buffers, and learning-rate schedules.

pub mod artifact;
pub mod data;
pub mod error;
pub mod optim;
pub mod params;

pub use error::{Error, Result};
