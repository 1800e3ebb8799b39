//! CUDA devices, found at run time: nothing is linked, so the same program starts
//! on a machine without a driver and says there what is missing.

mod probe;

pub use probe::{CudaDevice, devices};
