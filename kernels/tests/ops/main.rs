//! Tests of the operations on the CPU, one module per operation: gradients by complex
//! step, `f32` against `f64`, any number of threads, `=` and `+=`, and refused shapes.
//!
//! One program rather than many, so that it links once and all of [`common`] is used.

mod activation;
mod adamw;
mod attention;
mod common;
mod dropout;
mod elementwise;
mod embedding;
mod gemm;
mod harness;
mod layernorm;
mod linear;
mod lm_head;
mod lora;
mod mse;
mod relu;
mod residual;
mod rmsnorm;
mod rope;
mod t5_attention;
