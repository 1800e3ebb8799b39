//! From files of examples to packed token streams on a device.
//!
//! file → [`Row`] → [`Record`] → text ([`Renderer`]) → [`Example`] → [`PackedBatch`] →
//! [`DeviceBatch`]. Beside it, who gets which rows ([`split`]) and in which order they
//! come ([`Order`]).

mod batch;
mod ends;
mod example;
mod load;
mod order;
mod prompt;
mod rows;
mod schema;
pub mod split;
mod template;
mod tokenize;

pub use batch::{BatchCapacity, DeviceBatch, Example, PackedBatch, SegmentInfo};
pub use ends::PromptCheck;
pub use example::{DataSummary, Dataset, build_examples, expect_vocabulary, prompt_tokens};
pub use load::{FormCount, Loaded, load};
pub use order::Order;
pub use prompt::{PromptForm, PromptSettings, Rendered, Renderer};
pub use rows::files::{Chosen, Purpose, Split as DataSplit, SplitChoice, choose};
pub use rows::{Budget, Origin, Row, Unit, data_files, each_row, read_rows};
pub use schema::{
    Choices, Columns, Content, FileFacts, Format, Instruction, Message, Metric, OnError, Reading, Record,
    Schema, Taken, TrainOn,
};
pub use template::{SERVER_ARGUMENT, isolate, serve};
pub use tokenize::{TextTokenizer, Tokens};
