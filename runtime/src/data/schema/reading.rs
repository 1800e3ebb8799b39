//! The settings that say how rows become records.

use super::forms::{Candidate, Schema};
use schemars::{JsonSchema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::borrow::Cow;

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

impl JsonSchema for Format {
    fn schema_name() -> Cow<'static, str> {
        "Format".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> schemars::Schema {
        let names: Vec<&str> = std::iter::once(AUTO).chain(Schema::ALL.map(Schema::name)).collect();
        json_schema!({ "type": "string", "enum": names })
    }
}

/// What is put before the question.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub enum Instruction {
    /// For published data sets, the instruction that the method's authors put there.
    #[default]
    Published,
    /// Nothing, for models that know the task already.
    None,
    /// This text and a line break, before the prompt or the first message of the user.
    Text(String),
}

impl TryFrom<String> for Instruction {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        match text.as_str() {
            "published" => return Ok(Self::Published),
            "none" | "" => return Ok(Self::None),
            _ => {}
        }
        // An instruction has several words; one that is nearly a name is a mistyped name.
        let far = |name| strsim::damerau_levenshtein(&text.to_lowercase(), name);
        match ["published", "none"].into_iter().find(|name| far(name) <= name.len() / 3) {
            Some(meant) => Err(format!("unknown instruction `{text}`; did you mean `{meant}`?")),
            None => Ok(Self::Text(text)),
        }
    }
}

impl From<Instruction> for String {
    fn from(instruction: Instruction) -> Self {
        match instruction {
            Instruction::Published => "published".into(),
            Instruction::None => "none".into(),
            Instruction::Text(text) => text,
        }
    }
}

/// Which answers of a conversation are learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrainOn {
    /// The last one.
    #[default]
    Last,
    /// All answers of the assistant, but for messages of `weight` 0.
    All,
}

/// What is done with rows that cannot be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// Reading ends with an error that names them.
    #[default]
    Fail,
    /// They are left out and counted, if they are at most half of all rows.
    Skip,
}

/// Columns by their names in a file; empty for those that are known by their own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Columns {
    /// What is asked.
    pub prompt: String,
    /// The answer to learn.
    pub response: String,
    /// A system message before the prompt or the conversation.
    pub system: String,
    /// Text that belongs to the prompt and follows it on a line of its own.
    pub input: String,
    /// A conversation, in the place of `prompt` and `response`.
    pub messages: String,
    /// Says whether the answer is liked: rows in which it is false, 0, -1 or `rejected` are
    /// left out. Empty: the column `label`, where its values say so; `none`: no column.
    pub label: String,
}

/// Column that says whether an answer is liked, where no other is named.
const LABEL: &str = "label";
/// The value of [`Columns::label`] for data without such a column.
const NO_LABEL: &str = "none";

impl Columns {
    /// Whether the columns to learn from are named.
    pub(crate) fn are_named(&self) -> bool {
        !(self.prompt.is_empty() && self.response.is_empty() && self.messages.is_empty())
    }

    /// What is wrong with these names.
    pub fn check(&self) -> std::result::Result<(), &'static str> {
        let Self { prompt, response, system, input, messages, .. } = self;
        let conversation = !messages.is_empty();
        if conversation && !(prompt.is_empty() && response.is_empty() && input.is_empty()) {
            Err("expected either messages, or prompt and response")
        } else if !conversation && prompt.is_empty() != response.is_empty() {
            Err("expected both prompt and response")
        } else if !self.are_named() && (!system.is_empty() || !input.is_empty()) {
            Err("system and input need prompt and response beside them, or messages")
        } else {
            Ok(())
        }
    }

    /// The column that says which answers are liked.
    pub(super) fn label_column(&self) -> &str {
        if self.label.is_empty() { LABEL } else { &self.label }
    }

    /// Whether that column was named, so that its values need not be guessed.
    pub(super) fn label_is_named(&self) -> bool {
        !self.label.is_empty() && self.label != NO_LABEL
    }

    /// Whether there is no such column.
    pub(super) fn label_is_ignored(&self) -> bool {
        self.label == NO_LABEL
    }

    /// The form of a row that has all named columns; the error says which is missing.
    pub(super) fn form(&self, row: &Map<String, Value>) -> std::result::Result<Candidate, String> {
        let names = [
            ("prompt", &self.prompt),
            ("response", &self.response),
            ("system", &self.system),
            ("input", &self.input),
            ("messages", &self.messages),
        ];
        if let Some((key, name)) = names.iter().find(|(_, name)| !name.is_empty() && !row.contains_key(*name))
        {
            let similar = row.keys().map(|column| (strsim::damerau_levenshtein(column, name), column));
            let meant = similar.filter(|(far, _)| *far <= (name.chars().count() / 3).max(1)).min();
            let meant = meant.map_or(String::new(), |(_, column)| format!("; did you mean `{column}`?"));
            let found = row.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            return Err(format!("data.columns.{key}: there is no column `{name}` among [{found}]{meant}"));
        }
        let schema = if self.messages.is_empty() { Schema::Pair } else { Schema::Messages };
        Ok(Candidate { schema, columns: &[] })
    }
}

/// How rows become records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Which columns they have.
    pub format: Format,
    /// What is put before the questions.
    pub instruction: Instruction,
    /// Names of columns.
    pub columns: Columns,
    /// Which answers of a conversation are learned.
    pub train_on: TrainOn,
    /// What is done with rows that cannot be used.
    pub on_error: OnError,
    /// MiB that rows may take in memory; None for the bounds of [`super::super::rows::Budget`].
    pub limit_mib: Option<u64>,
}
