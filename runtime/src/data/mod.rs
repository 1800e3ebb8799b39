//! From files of examples to packed token streams on a device.

mod batch;

pub use batch::{BatchCapacity, DeviceBatch, Example, PackedBatch, SegmentInfo};
