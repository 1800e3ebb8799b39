//! Number types of the CUDA device.

use crate::{Real, bf16};

/// Number types with kernels: `f32` and `bf16`, accumulating in f32.
pub trait CudaReal: Real<Acc = f32> {
    /// End of the names of its kernels.
    const SUFFIX: &'static str;
}

impl CudaReal for f32 {
    const SUFFIX: &'static str = "f32";
}
impl CudaReal for bf16 {
    const SUFFIX: &'static str = "bf16";
}
