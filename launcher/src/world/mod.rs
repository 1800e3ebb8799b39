//! A miniature world in which the whole method runs in minutes on a laptop.
//!
//! A family of little tasks ([`tasks`]), a tokenizer for them ([`tokenizer`]), and two
//! base models that are pretrained on the family until they are as able as they should
//! be ([`pretrain`]): the LLM knows every operation, the TinyLM about half of them. What
//! differs between tasks is a preference that only fine-tuning can instil, so that an
//! update has something to carry.

pub mod pretrain;
pub mod tasks;
pub mod tokenizer;

/// Clients of the world.
pub const CLIENTS: usize = 4;
/// Tasks that public data has; the others occur in pretraining only.
pub const PUBLIC_TASKS: usize = 27;
/// Public examples of one task.
pub const PUBLIC_EXAMPLES: usize = 512;
/// Private training examples of one client.
pub const PRIVATE_EXAMPLES: usize = 256;
/// Private test examples of one client.
pub const TEST_EXAMPLES: usize = 250;
/// The run file in the world's directory.
pub const RUN_FILE_OF_WORLD: &str = "mixed.toml";
/// Its settings, less the seed.
pub const RUN_SETTINGS: &str = include_str!("mixed.toml");
