//! Low-rank adapters: where their values lie, how they start, how they are trained
//! many at a time, how their products are summed, how they are exchanged with PEFT, and how they
//! become part of a model.
//!
//! An adapter of a model is one flat matrix `[L, d]`: L blocks, and per block the
//! A and B of every adapted module in a fixed order. [`BlockLayout`] is the table of
//! places; what moves through the pipeline (adapters, gradients, moments, update
//! vectors) are rows of that shape.

mod inner_products;
mod layout;
mod merge;
mod module;
mod multi;
mod peft;
mod peft_config;
mod peft_targets;
mod per_example;
mod products;
mod stacked;

pub use crate::decoder::Module;
pub use inner_products::BlockProducts;
pub use layout::{BlockLayout, Factor, LoraConfig, MAX_RANK, Slice, initial_adapter};
pub use merge::merge;
pub use module::Projection;
pub use multi::{JobsStep, MultiLora};
pub use peft::{
    PeftAdapter, PeftMatrix, peft_matrices, peft_note, read_peft, write_peft, write_peft_with_notes,
};
pub use per_example::{ExampleGradients, PerExampleLora};
pub use products::Products;
pub use stacked::Stacked;
