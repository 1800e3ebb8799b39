//! T5 v1.1 / Flan-T5: the encoder and the decoder, between embeddings and hidden states.
//!
//! The token embedding and the head are not part of this: the Grad-Transformer puts
//! projections of its own in their place. What T5 v1.1 is: pre-norm sublayers with RMS
//! layer norms, no biases, scores that are not scaled, one trained bias table of
//! relative positions per stack, gated GELU (tanh form).
//!
//! * [`T5Config`]: sizes, from `config.json` or a preset.
//! * [`Stack`]: encoder or decoder over flat parameters; [`StackActs`] its buffers.
//! * [`DecodeCache`]: decoding position by position.
//! * [`weights`]: loading and random initial values.

mod acts;
mod attention;
mod backward;
mod buckets;
mod config;
mod decode;
mod feed_forward;
mod pass;
mod scratch;
mod stack;
pub mod weights;

pub use acts::{Keep, StackActs};
pub use buckets::bucket_map;
pub(crate) use config::MAX_PARAMETERS;
pub use config::T5Config;
pub use decode::DecodeCache;
pub use pass::{Grads, OnReady, Pass};
pub use scratch::StackShape;
pub use stack::{Side, Stack};
