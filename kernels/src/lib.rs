//! What one operation is, and how each device does it.
//!
//! * [`dtype`]: the element types ([`Elem`]) and the arithmetic ones ([`Real`]).
//! * [`device`]: [`Device`], whose buffers ([`Buffer`]) are lent as views ([`View`], [`ViewMut`]).
//! * [`streams`]: what goes on beside operations: copies ([`AsyncCopy`]), a second queue ([`Queues`]), captured work
//!   ([`GraphCapture`]).
//! * [`collective`]: [`Collective`], devices of several ranks that exchange values without their
//!   hosts.
//! * [`ops`]: one file per operation with its contract: shapes, formulas, and for
//!   every output whether it is assigned or added to. [`Backend`] is their sum.
//! * [`cpu`]: the same names on the CPU, readable and fast.
//! * [`rng`]: the counter generator behind every random number of the system.
//!
//! Shapes in comments are row-major; `[T, H]` is T rows of H values. Nothing here
//! allocates on behalf of a caller except [`Device::zeros`].

pub mod collective;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod dtype;
pub mod error;
pub mod ops;
pub mod rng;
pub mod streams;

pub use collective::Collective;
pub use device::{Buffer, Device, View, ViewMut};
pub use dtype::{Complex64, DType, Elem, Real, bf16, f16};
pub use error::{Error, Result};
pub use ops::Backend;
pub use streams::{AsyncCopy, CopyStream, GraphCapture, Pinned, Queues};
