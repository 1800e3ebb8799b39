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
