//! The Grad-Transformer: from a student's update vector to a teacher's, block by block.
//!
//! In training it reads tuples (student update `[L_S, d_S]`, teacher update `[L_T, d_T]`
//! of the same shadow subset) and learns to predict each teacher block from the student
//! and the teacher blocks before it. In translation it is fed its own predictions.
//!
//! * [`GradTransformer`]: configuration, parameters, forward and backward pass, files.
//! * [`Trainer`]: gradient accumulation and AdamW, on batches that may be staged ([`StagedTuples`]).
//! * [`Generator`]: cached autoregressive generation.
//! * [`Normalization`]: the units that the model works in.
//! * [`Targets`]: what the teacher's blocks mean; [`Components`]: coordinates in the place of updates.

mod acts;
mod components;
mod config;
mod files;
mod generate;
mod model;
mod normalize;
mod staged;
mod targets;
mod train;

pub use acts::{Activations, Tuples};
pub use components::Components;
pub use config::{GradTransformerConfig, StartToken};
pub use generate::Generator;
pub use model::GradTransformer;
pub use normalize::{FitPart, Normalization, NormalizationFit, NormalizationMode};
pub use staged::{Batch, StagedMut, StagedPart, StagedTuples};
pub use targets::Targets;
pub use train::{StepReport, Trainer};
