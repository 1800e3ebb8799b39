//! The CUDA emulator for tests: stand-ins for the driver, cuBLASLt and NCCL, and the kernels of
//! `kernels/cu` compiled for the host (see `kernels/emu/README.md`).
//!
//! [`device`] is a device of the program's own code on these stand-ins; with `GRADTX_TEST_ON_DEVICE` it is
//! this machine's GPU, and what only stand-ins can do is left out ([`on_device`]).

#![cfg(feature = "cuda")]

mod objects;
mod places;
mod record;
mod stand_ins;

pub use objects::{Plant, Variant, copy_parts, library_files, nccl_file};
pub use places::gpu_check;
pub use record::record;
pub use stand_ins::*;
