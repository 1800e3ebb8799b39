//! The CUDA device: memory, and the operations as kernels of our own (`kernels/cu`).
//!
//! Nothing is linked. The driver is found at run time, so the same program starts on a
//! machine without one and says there what is missing ([`devices`]); a kernel is loaded
//! from a cubin that is part of the program, lies in a cache, or is compiled when it is
//! first needed ([`cubin`]).
//!
//! Operations go through one stream, in order, or through two, ordered by events; uploads that need not wait for them through another
//! beside it (`copy_stream.rs`). An operation checks its arguments on the
//! host and returns when its kernels are queued. Numbers that only the device sees (token
//! ids, positions) are checked by the kernels, which refuse them and leave a note that the
//! next [`download`](crate::Device::download) or [`synchronize`](crate::Device::synchronize) turns into an error (`fault.rs`).
//!
//! Sums are always taken in the same order, without floating-point atomics, so results do
//! not depend on timing. Sums between the devices of several ranks are NCCL's ([`NcclGroup`]), on
//! a stream of their own.

mod activation;
mod adamw;
mod algorithms;
mod attention;
mod buffer;
mod copy_stream;
pub mod cubin;
mod cublaslt;
mod decode;
mod device;
mod driver_error;
mod dropout;
mod elementwise;
mod embedding;
mod fault;
mod functions;
mod gate;
mod gemm;
mod graph;
mod launch;
mod layernorm;
mod library;
mod limits;
mod lm_head;
mod lora;
mod lora_rows;
mod memory;
mod mse;
mod nccl;
mod nccl_library;
mod nvrtc;
mod pinned;
mod probe;
mod product;
mod profile;
mod real;
mod relu;
mod residual;
mod rmsnorm;
mod rope;
pub mod signature;
mod stream;
mod t5_attention;
mod t5_tiles;
mod timing;

pub use buffer::{CudaBuf, CudaView, CudaViewMut};
pub use copy_stream::{CudaCopyStream, CudaEvent};
pub use cublaslt::CublasLt;
pub use device::Cuda;
pub use graph::CudaGraph;
pub use nccl::NcclGroup;
pub use nccl_library::{nccl_environment, nccl_version};
pub use pinned::CudaPinned;
pub use probe::{CudaDevice, devices};
pub use profile::OperationTime;
pub use real::CudaReal;

use driver_error::failed;
