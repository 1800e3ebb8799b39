//! Models and the program on a CUDA device without a GPU: on the stand-ins of `kernels/emu`. Single
//! operations are tested in `kernels/tests/cuda_ops`.

mod bench;
mod demo;
mod doctor;
mod emulators;
mod gpu_check;
mod memory;
mod models;
mod nccl;
mod places;
mod statistics;
