//! From rows to [`Record`]s: what the columns of a row mean.
//!
//! A [`Schema`] is recognised by its columns, or named ([`Format`]). Columns that do not
//! belong to it are kept (`Record::extra`), for grouping by task or for metrics.
//!
//! * mod: the schemas, their columns and names, prompts and conversations.
//! * tasks: the published data sets that have a form of their own.

mod tasks;

use super::rows::{Origin, Row, kind};
use crate::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

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
    /// Columns beyond those of its schema.
    pub extra: Map<String, Value>,
}

/// The forms of rows, told apart by their columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Schema {
    /// A prompt and a response.
    Pair,
    /// A conversation: a list of `role`, `content`.
    Messages,
    /// AQuA-RAT: algebra with five options, a rationale and a letter.
    AquaRat,
    /// CommonsenseQA: a question with five choices and a letter.
    CommonsenseQa,
    /// DROP: a passage, a question and spans of text, numbers or dates.
    Drop,
    /// DialogSum: a spoken dialogue and its summary.
    Dialogsum,
    /// SAMSum: a chat and its summary.
    Samsum,
    /// GSM8K: a word problem and its solution, which ends in `#### number`.
    Gsm8k,
}

/// How answers to a schema's questions are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Right or wrong.
    ExactMatch,
    /// F1 of the words that a text and its reference share (ROUGE-1, stemmed).
    Rouge1,
}

impl Metric {
    /// What a reader calls it.
    pub fn label(self) -> &'static str {
        match self {
            Self::ExactMatch => "exact match",
            Self::Rouge1 => "ROUGE-1",
        }
    }
}

impl Schema {
    /// All schemas, in the order in which they are tried.
    pub const ALL: [Self; 8] = [
        Self::Pair,
        Self::Messages,
        Self::AquaRat,
        Self::CommonsenseQa,
        Self::Drop,
        Self::Dialogsum,
        Self::Samsum,
        Self::Gsm8k,
    ];

    /// Its name in the configuration, and the task of rows that have no column for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pair => "pair",
            Self::Messages => "messages",
            Self::AquaRat => "aqua_rat",
            Self::CommonsenseQa => "commonsense_qa",
            Self::Drop => "drop",
            Self::Dialogsum => "dialogsum",
            Self::Samsum => "samsum",
            Self::Gsm8k => "gsm8k",
        }
    }

    /// The columns that make a row one of this schema: any of these sets. The first is
    /// that of the Hugging Face hub, others are those of the original releases.
    pub fn columns(self) -> &'static [&'static [&'static str]] {
        match self {
            Self::Pair => &[&["prompt", "response"]],
            Self::Messages => &[&["messages"]],
            Self::AquaRat => &[&["question", "options", "rationale", "correct"]],
            Self::CommonsenseQa => &[&["question", "choices", "answerKey"], &["question", "answerKey"]],
            Self::Drop => &[&["passage", "question", "answers_spans"], &["passage", "question", "answer"]],
            Self::Dialogsum => &[
                &["dialogue", "summary", "topic"],
                &["fname", "dialogue", "summary"],
                &["fname", "dialogue", "summary1"],
            ],
            Self::Samsum => &[&["dialogue", "summary"]],
            Self::Gsm8k => &[&["question", "answer"]],
        }
    }

    /// How its answers are scored.
    pub fn metric(self) -> Metric {
        match self {
            Self::Dialogsum | Self::Samsum => Metric::Rouge1,
            _ => Metric::ExactMatch,
        }
    }

    /// True if a row has its columns.
    pub fn fits(self, row: &Map<String, Value>) -> bool {
        self.columns().iter().any(|set| set.iter().all(|c| row.contains_key(*c)))
    }

    /// The first schema that fits a row.
    pub fn recognise(row: &Map<String, Value>) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.fits(row))
    }

    /// Its sets of columns as text.
    fn wanted(self) -> String {
        let sets: Vec<String> = self.columns().iter().map(|set| format!("[{}]", set.join(", "))).collect();
        sets.join(" or ")
    }

    /// Takes this schema's columns out of a row; the error says which is wrong.
    fn take(self, row: &mut Map<String, Value>, instruction: Instruction) -> Taken<Content> {
        match self {
            Self::Pair => {
                Ok(Content::Pair { prompt: text(row, "prompt")?, response: text(row, "response")? })
            }
            Self::Messages => messages(row.shift_remove("messages")),
            task => {
                let (question, response) = tasks::take(task, row)?;
                let prompt = match instruction {
                    Instruction::Published => [tasks::instruction(task), &question].concat(),
                    Instruction::None => question,
                };
                Ok(Content::Pair { prompt, response })
            }
        }
    }
}

/// How rows are read: by a schema of this name, or by the first that fits (`auto`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Format(pub Option<Schema>);

const AUTO: &str = "auto";

impl TryFrom<String> for Format {
    type Error = String;

    fn try_from(name: String) -> std::result::Result<Self, String> {
        let found = Schema::ALL.into_iter().find(|s| s.name() == name);
        if found.is_some() || name == AUTO {
            return Ok(Self(found));
        }
        let known: Vec<&str> = Schema::ALL.into_iter().map(Schema::name).collect();
        Err(format!("unknown format `{name}`, expected {AUTO}, {}", known.join(", ")))
    }
}

impl From<Format> for String {
    fn from(format: Format) -> Self {
        format.0.map_or(AUTO, Schema::name).into()
    }
}

/// What is put before the question of a published data set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Instruction {
    /// The instruction that the method's authors put there.
    #[default]
    Published,
    /// Nothing, for models that know the task already.
    None,
}

/// How rows become records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Which columns they have.
    pub format: Format,
    /// What is put before the questions of published data sets.
    pub instruction: Instruction,
}

impl Reading {
    /// The record of a row.
    pub fn record(&self, row: Row) -> Result<Record> {
        let Row { origin, columns: mut extra } = row;
        let found = || extra.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let schema = match self.format.0 {
            Some(schema) if schema.fits(&extra) => schema,
            Some(schema) => {
                let (name, wanted) = (schema.name(), schema.wanted());
                return Err(origin.error(format!("columns [{}]; the format {name} has {wanted}", found())));
            }
            None => Schema::recognise(&extra).ok_or_else(|| {
                let known = Schema::ALL.map(|s| format!("\n  {}: {}", s.name(), s.wanted())).concat();
                origin.error(format!("columns [{}] are those of no known format:{known}", found()))
            })?,
        };
        let content = schema
            .take(&mut extra, self.instruction)
            .map_err(|why| origin.error(format!("{} row: {why}", schema.name())))?;
        Ok(Record { origin, schema, content, extra })
    }
}

/// A part of a row, or which column is wrong.
type Taken<T> = std::result::Result<T, String>;

/// Takes out a column that must be a string.
fn text(row: &mut Map<String, Value>, name: &str) -> Taken<String> {
    match row.shift_remove(name) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("`{name}` should be a string, found {}", kind(&other))),
        None => Err(format!("there is no `{name}`")),
    }
}

fn messages(value: Option<Value>) -> Taken<Content> {
    let Some(Value::Array(items)) = value else {
        return Err("`messages` should be a list".into());
    };
    let mut messages = Vec::with_capacity(items.len());
    for (i, item) in items.into_iter().enumerate() {
        let Value::Object(mut item) = item else {
            return Err(format!("message {i} should be an object, found {}", kind(&item)));
        };
        let role = text(&mut item, "role").map_err(|e| format!("message {i}: {e}"))?;
        let content = text(&mut item, "content").map_err(|e| format!("message {i}: {e}"))?;
        // Tables have a column for what only some messages have; there it is null.
        if let Some((key, _)) = item.iter().find(|(_, value)| !value.is_null()) {
            return Err(format!("message {i} has `{key}`, which is not supported"));
        }
        messages.push(Message { role, content });
    }
    match messages.last() {
        Some(last) if last.role == "assistant" && messages.len() > 1 => Ok(Content::Chat(messages)),
        _ => Err("`messages` should end with an `assistant` message that answers another one".into()),
    }
}

#[cfg(test)]
pub(in crate::data) mod tests {
    use super::super::rows::Unit;
    use super::*;
    use std::sync::Arc;

    pub(in crate::data) fn origin() -> Origin {
        Origin { file: Arc::new("d.jsonl".into()), line: 4, unit: Unit::Line }
    }

    /// The record of a row in JSON.
    pub(super) fn read(row: &str, format: &str, instruction: Instruction) -> Result<Record> {
        let format = Format::try_from(format.to_string()).unwrap();
        let columns = serde_json::from_str(row).unwrap();
        Reading { format, instruction }.record(Row { origin: origin(), columns })
    }

    fn auto(row: &str) -> Result<Record> {
        read(row, AUTO, Instruction::Published)
    }

    #[test]
    fn pairs_and_conversations_are_told_apart_by_their_columns() {
        let pair = auto(r#"{"prompt": "1+1?", "response": "2", "task": "sum"}"#).unwrap();
        assert_eq!(pair.content, Content::Pair { prompt: "1+1?".into(), response: "2".into() });
        assert_eq!((&pair.extra["task"], pair.schema), (&Value::from("sum"), Schema::Pair));
        let chat = r#"{"messages": [{"role": "user", "content": "Grüße", "name": null},
            {"role": "assistant", "content": "Hallo"}]}"#;
        let chat = auto(chat).unwrap();
        assert_eq!((chat.content.answer(), chat.schema), ("Hallo", Schema::Messages));
        assert!(chat.extra.is_empty());
    }

    #[test]
    fn errors_name_the_row_and_what_was_expected() {
        for (bad, say) in [
            (r#"{"question": "a"}"#, "columns [question] are those of no known format"),
            (r#"{"prompt": "a", "response": 3}"#, "`response` should be a string, found a number"),
            (r#"{"messages": {}}"#, "a list"),
            (r#"{"messages": [{"role": "user", "content": "a"}]}"#, "end with"),
            (r#"{"messages": [{"role": "assistant", "content": "a"}]}"#, "end with"),
            (r#"{"messages": [{"role": "user"}]}"#, "message 0: there is no `content`"),
            (r#"{"messages": [{"role": "user", "content": "a", "tool_calls": []}]}"#, "tool_calls"),
        ] {
            let message = auto(bad).unwrap_err().to_string();
            assert!(message.contains("d.jsonl:4: ") && message.contains(say), "{message}");
        }
        // The list of formats has those of the original releases as well.
        let message = auto("{}").unwrap_err().to_string();
        assert!(message.contains("drop: [passage, question, answers_spans] or [passage"), "{message}");
    }

    #[test]
    fn a_named_format_must_fit_and_wins() {
        let row = r#"{"question": "q", "answer": "a", "prompt": "p", "response": "r"}"#;
        assert_eq!(auto(row).unwrap().schema, Schema::Pair);
        assert_eq!(read(row, "gsm8k", Instruction::None).unwrap().content.answer(), "a");
        let message = read(row, "aqua_rat", Instruction::None).unwrap_err().to_string();
        for part in ["columns [question, answer, prompt, response]", "aqua_rat has [question, options,"] {
            assert!(message.contains(part), "{message}");
        }
        for schema in Schema::ALL {
            let format = Format::try_from(schema.name().to_string()).unwrap();
            assert_eq!((format.0, String::from(format)), (Some(schema), schema.name().to_string()));
        }
        assert!(Format::try_from("gsm9k".to_string()).unwrap_err().contains("gsm8k"));
    }
}
