//! From files of examples to packed token streams on a device.
//!
//! file → [`Record`] → text ([`Renderer`]) → [`Example`] → [`PackedBatch`] → [`DeviceBatch`].
//! Beside it, who gets which rows ([`split`]) and in which order they come ([`Order`]).

mod batch;
mod example;
mod order;
mod prompt;
mod read;
pub mod split;
mod tokenize;

pub use batch::{BatchCapacity, DeviceBatch, Example, PackedBatch, SegmentInfo};
pub use example::{DataSummary, Dataset, build_examples, expect_vocabulary, prompt_tokens};
pub use order::Order;
pub use prompt::{CHATML_SYSTEM, PromptForm, Rendered, Renderer};
pub use read::{Content, Message, Origin, Record, Schema, read_jsonl};
pub use tokenize::{TextTokenizer, Tokens};
