//! Operations on the CPU: the readable form of every contract, and the fast one.
//!
//! Code is generic over [`CpuReal`]; `f32` is the type that must be fast, `f64` and
//! complex run the same lines to check gradients. Work is split over a thread pool
//! of the device's own by rows or heads of the *output*; no sum is split between
//! threads, so results do not depend on their number.

mod activation;
mod adamw;
mod attention;
mod collective;
mod device;
mod dropout;
mod elementwise;
mod embedding;
mod gemm;
mod layernorm;
mod linear;
mod lm_head;
mod lora;
mod lora_loops;
mod mask;
mod math;
mod matrix;
mod memory;
mod mse;
mod normals;
mod parallel;
mod product;
mod profile;
mod real;
mod relu;
mod residual;
mod rmsnorm;
mod rope;
mod scratch;
pub mod simd;
#[cfg(target_arch = "x86_64")]
mod skinny;
mod softmax;
mod streams;
mod sums;
mod t5_attention;

pub use device::Cpu;
pub use elementwise::narrow;
pub use memory::CpuBuf;
pub use normals::add_normals;
pub use profile::OpTime;
pub use real::CpuReal;
