//! The two training loops of gradtx.
//!
//! [`lora`] trains adapters of a language model, many jobs at once, on the examples that
//! [`examples`] reads and [`prompts`] makes tokens of. [`translator`] trains the
//! Grad-Transformer on the updates that came of them. [`products`] translates in
//! another way, [`shadows`] measures how far a client is from what all of them have seen, and
//! [`baselines`] are what both are compared with. [`step_log`] writes what the loops
//! say of every step. [`audit`] attacks what came of it.
//! [`emulator`] counts what an emulator takes.

pub mod audit;
pub mod baselines;
pub mod describe;
pub mod emulator;
pub mod examples;
pub mod linalg;
pub mod lora;
pub mod model_spec;
pub mod privacy;
pub mod products;
pub mod prompts;
pub mod shadows;
pub mod step_log;
pub mod translator;
