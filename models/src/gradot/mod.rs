//! GradOT (arXiv 2507.04455): which parts of the middle layers of an LLM an emulator leaves out, so that the gradient
//! of the edge layers stays what it is.
//!
//! In: the matrices of a layer, and the sums over public data of [`crate::decoder::ProductStatistics`]. Out: what each
//! component of an attention matrix and each channel of an MLP costs to leave out ([`components`], [`channels`]),
//! which of them stay ([`choose_components`], [`choose_channels`]), and the tensors of the emulator ([`Compressed`]).
//!
//! For a change Δ of a matrix W in `y = W a`, with K-FAC's factors `A = E[a aᵀ]` and `G = E[g gᵀ]` of the Hessian, and
//! the gradient `D = E[g aᵀ]`:
//!
//! ```text
//! GCS(Δ) = ‖G Δ A‖₁ − λ ⟨D, Δ⟩                 Δ = −σ u vᵀ:  ‖G Δ A‖₁ = σ ‖G u‖₁ ‖A v‖₁,  ⟨D, Δ⟩ = −σ uᵀ D v
//! ```
//!
//! Formulas that are ours and not the paper's: docs/gradot.md. All is computed in f64, each sum by one thread in one
//! order.

mod compress;
mod first_order;
mod scores;
mod selection;

pub use compress::{Choice, Compressed};
pub use first_order::{correlation, first_order_of_channels, first_order_of_components};
pub use scores::{Candidates, Score, Term, channels, components, gradient_shift, lambda};
pub use selection::{Allocate, Matrix, choose_channels, choose_components};
