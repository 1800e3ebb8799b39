//! [`Record`]: an example as its row says it; and texts in columns.

use super::choices::Choices;
use super::forms::Schema;
use crate::data::rows::{Origin, kind};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use xxhash_rust::xxh3::Xxh3;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the model's template knows.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// What is asked and what is to be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// An instruction and the answer to learn.
    Pair {
        /// What is asked.
        prompt: String,
        /// The answer.
        response: String,
    },
    /// A conversation; its last message is the assistant's answer to learn.
    Chat(Vec<Message>),
}

impl Content {
    /// The answer to learn.
    pub fn answer(&self) -> &str {
        match self {
            Self::Pair { response, .. } => response,
            Self::Chat(messages) => messages.last().map_or("", |m| &m.content),
        }
    }

    /// Tells contents apart: the same for the same texts in the same roles.
    pub fn digest(&self) -> u128 {
        self.hashed(usize::MAX)
    }

    /// The same without the answer to learn.
    pub fn prompt_digest(&self) -> u128 {
        match self {
            Self::Pair { .. } => self.hashed(1),
            Self::Chat(messages) => self.hashed(messages.len().saturating_sub(1)),
        }
    }

    /// A hash of the first messages.
    fn hashed(&self, count: usize) -> u128 {
        let mut hash = Xxh3::new();
        let mut add = |text: &str| {
            hash.update(&(text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        };
        match self {
            Self::Pair { prompt, response } => {
                [("user", prompt), ("assistant", response)].iter().take(count).for_each(|(role, text)| {
                    add(role);
                    add(text);
                });
            }
            Self::Chat(messages) => messages.iter().take(count).for_each(|message| {
                add(&message.role);
                add(&message.content);
            }),
        }
        hash.digest128()
    }

    /// Whether anything but answers is said.
    pub(super) fn asks(&self) -> bool {
        match self {
            Self::Pair { prompt, .. } => !prompt.trim().is_empty(),
            Self::Chat(messages) => {
                messages.iter().any(|m| m.role != "assistant" && !m.content.trim().is_empty())
            }
        }
    }
}

/// One example.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Where it stands.
    pub origin: Origin,
    /// What its columns are.
    pub schema: Schema,
    /// What it asks and answers.
    pub content: Content,
    /// The possible answers, where the data set has several; the right one is the content's.
    pub choices: Option<Choices>,
    /// Messages of a conversation before its last that are learned as well, by their number
    /// from 0.
    pub learned: Vec<usize>,
    /// Columns beyond those of its schema.
    pub extra: Map<String, Value>,
}

/// A part of a row, or which column is wrong.
pub(super) type Part<T> = std::result::Result<T, String>;

/// Takes out a column that must be text. Numbers and `true` or `false` become the text that
/// JSON has for them.
pub(super) fn text(row: &mut Map<String, Value>, name: &str) -> Part<String> {
    match row.shift_remove(name) {
        Some(value) => as_text(value, name),
        None => Err(format!("there is no `{name}`")),
    }
}

pub(super) fn as_text(value: Value, name: &str) -> Part<String> {
    match value {
        Value::String(text) => Ok(text),
        // A number of more digits than f64 has is not the one that stands in the file.
        Value::Number(number) if number.is_f64() && number.as_f64().is_some_and(|x| x.abs() >= 1e15) => {
            Err(format!("`{name}` is a number too large to be exact; write it as a string"))
        }
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(value) => Ok(value.to_string()),
        Value::Null => Err(format!("`{name}` is null")),
        other => Err(format!("`{name}` should be a string, found {}", kind(&other))),
    }
}

/// Whether a value says nothing at all.
pub(super) fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}
