//! Everything that is not the mathematics of a model.
//!
//! * [`data`]: from files of examples to packed token streams on a device.
//! * [`artifact`]: what is on disk, read by memory map and written atomically.
//! * [`checkpoint`]: everything needed to continue bit-identically.
//! * [`buffers`]: buffers that are described once, to be planned and to be taken.
//! * [`params`]: names, shapes and places of parameters in one flat buffer.
//! * [`plan`]: every buffer's shape and bytes, before the first step.
//! * [`optim`]: optimizers over flat buffers, and learning-rate schedules.
//! * [`comm`]: what ranks exchange.
//! * [`parallel`]: what each rank of a data-parallel training owns and adds up.
//! * [`metrics`]: what a run reports itself.
//! * [`tensorboard`]: the same for TensorBoard.
//! * [`text`]: text of files, made fit for a terminal.

pub mod artifact;
pub mod buffers;
pub mod checkpoint;
pub mod comm;
pub mod data;
pub mod error;
pub mod metrics;
pub mod optim;
pub mod parallel;
pub mod params;
pub mod plan;
pub mod tensorboard;
pub mod text;

pub use error::{Error, Result};
