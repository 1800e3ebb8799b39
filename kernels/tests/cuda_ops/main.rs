//! The CUDA device without a GPU: its own code for the host, unmodified, on a stand-in driver
//! that runs the kernels of `kernels/cu` on the CPU (see `kernels/emu/README.md`). Every
//! operation must agree with the CPU's in f64, in three orders of threads and under a
//! checker of data races; planted faults must be caught. Models and the program on the same
//! stand-ins: `tests/cuda_emulated`.

mod attention;
mod captures;
mod common;
mod flat;
mod host;
mod layernorm;
mod lora;
mod matrix;
mod planted;
mod rmsnorm;
mod rows;
mod signatures;
mod t5_attention;
