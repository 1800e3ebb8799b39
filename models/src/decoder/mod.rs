//! Decoder LLMs: Llama, Mistral, Qwen2, Qwen3 and OPT, with or without adapters.
//!
//! * [`DecoderConfig`]: what is computed, from `config.json`; [`BlockConfig`]: the parts of a block.
//! * [`Decoder`]: the weights, in one flat buffer.
//! * [`Activations`]: every buffer of a forward and backward pass, allocated once.
//! * [`Decoder::loss`] and [`Decoder::loss_and_gradient`]: the passes, over a packed
//!   token stream.
//! * [`Generator`]: greedy decoding with a key/value cache.
//! * [`FullTrainer`] and [`LayerTrainer`]: training of all parameters, and of the full weights of some layers.
//!
//! Layers of an emulator ([`Emulator`]) may be narrower than others, and their attention's matrices products of
//! two thin ones.
//!
//! Shapes: T tokens of the stream, S segments, M labels, H hidden, Q = heads · D,
//! R = Q + 2 · kv_heads · D (a fused q, k, v row), F intermediate, V vocabulary.
//!
//! A block, with `x` the residual stream and every product possibly adapted:
//!
//! ```text
//! q, k, v = rope([norm](rmsnorm(x) Wqkvᵀ + b))      x ← x + attention(q, k, v) Woᵀ
//! g, u    = rmsnorm(x) Wguᵀ                          x ← x + (silu(g) ⊙ u) Wdownᵀ
//! ```
//!
//! OPT's has layer norms in the place of RMS norms, biases in all products, learned positions that are added to the
//! token embedding in the place of rope, and `relu(u)` in the place of `silu(g) ⊙ u`.

mod acts;
mod adapters;
mod attention;
mod backward;
mod block_config;
mod config;
mod config_fields;
mod config_opt;
mod emulator;
mod factored;
mod family;
mod forward;
mod generate;
mod layer_params;
mod layer_trainer;
mod layout;
mod mlp;
mod mode;
mod module;
mod names;
mod norm;
mod pass;
mod per_block;
mod pretrain;
mod product;
mod rope;
mod sampling;
mod statistics;
mod weights;

pub use acts::Activations;
pub use adapters::AdapterView;
pub use block_config::{Activation, AttentionConfig, BlockConfig, MlpConfig, NormKind, Ranks};
pub use config::DecoderConfig;
pub use emulator::{Emulator, LayerShape};
pub use family::Family;
pub use generate::{Continuation, Decoding, GenerateLimits, Generator, Prompt};
pub use layer_params::LayerParams;
pub use layer_trainer::{LayerState, LayerTrainer};
pub use mode::Mode;
pub use module::Module;
pub use names::layer_of;
pub use pass::Gradients;
pub use pretrain::{FullTrainer, PretrainStep};
pub use rope::RopeScaling;
pub use sampling::{Sampling, drawn};
pub use statistics::{ProductStatistics, ProductSums, StatisticsKind, StatisticsOf};
pub use weights::{Decoder, InitialWeights};
