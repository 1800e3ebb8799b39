//! From files to [`Record`]s: what a person wrote, and the line it stands on.
//!
//! One JSON object per line. Which columns it has tells what it is ([`Schema`]); the
//! columns that do not belong to the schema are kept (`Record::extra`), for grouping
//! by task or for metrics. Every error names file and line.

use crate::{Error, Result};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where a record stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub file: Arc<PathBuf>,
    /// Its line, from 1.
    pub line: usize,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

impl Origin {
    /// An error about this record.
    pub fn error(&self, why: impl Into<String>) -> Error {
        Error::invalid(self.to_string(), why)
    }
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
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

/// One example as it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Where it stands.
    pub origin: Origin,
    /// What it asks and answers.
    pub content: Content,
    /// Columns beyond those of its schema.
    pub extra: Map<String, Value>,
}

/// The forms of records, told apart by their columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schema {
    /// `prompt`, `response`
    Pair,
    /// `messages`: a list of `role`, `content`
    Messages,
}

impl Schema {
    /// All schemas, in the order in which they are tried.
    pub const ALL: [Self; 2] = [Self::Pair, Self::Messages];

    /// The columns that make a record one of this schema.
    pub fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Pair => &["prompt", "response"],
            Self::Messages => &["messages"],
        }
    }

    /// The first schema whose columns are all there.
    pub fn recognise(row: &Map<String, Value>) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.columns().iter().all(|c| row.contains_key(*c)))
    }

    /// Takes this schema's columns out of a row; the error says which is wrong.
    fn take(self, row: &mut Map<String, Value>) -> std::result::Result<Content, String> {
        match self {
            Self::Pair => Ok(Content::Pair {
                prompt: text(row.shift_remove("prompt"), "prompt")?,
                response: text(row.shift_remove("response"), "response")?,
            }),
            Self::Messages => messages(row.shift_remove("messages")),
        }
    }
}

fn text(value: Option<Value>, name: &str) -> std::result::Result<String, String> {
    match value {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("`{name}` should be a string, found {}", kind(&other))),
        None => Err(format!("there is no `{name}`")),
    }
}

fn messages(value: Option<Value>) -> std::result::Result<Content, String> {
    let Some(Value::Array(items)) = value else {
        return Err("`messages` should be a list".into());
    };
    let mut messages = Vec::with_capacity(items.len());
    for (i, item) in items.into_iter().enumerate() {
        let Value::Object(mut item) = item else {
            return Err(format!("message {i} should be an object, found {}", kind(&item)));
        };
        let role = text(item.remove("role"), "role").map_err(|e| format!("message {i}: {e}"))?;
        let content = text(item.remove("content"), "content").map_err(|e| format!("message {i}: {e}"))?;
        if let Some(key) = item.keys().next() {
            return Err(format!("message {i} has `{key}`, which is not supported"));
        }
        messages.push(Message { role, content });
    }
    match messages.last() {
        Some(last) if last.role == "assistant" && messages.len() > 1 => Ok(Content::Chat(messages)),
        _ => Err("`messages` should end with an `assistant` message that answers another one".into()),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Reads a JSONL file. Empty lines are skipped; a file without records is an error.
pub fn read_jsonl(path: &Path) -> Result<Vec<Record>> {
    let mut input = BufReader::new(File::open(path).map_err(|e| Error::io("open", path, e))?);
    let file = Arc::new(path.to_owned());
    let (mut records, mut line, mut bytes) = (vec![], 0, vec![]);
    loop {
        bytes.clear();
        if input.read_until(b'\n', &mut bytes).map_err(|e| Error::io("read", path, e))? == 0 {
            break;
        }
        line += 1;
        let origin = Origin { file: file.clone(), line };
        let text = std::str::from_utf8(&bytes).map_err(|e| origin.error(format!("not valid UTF-8: {e}")))?;
        // Some editors begin files with a byte-order mark.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text).trim();
        if !text.is_empty() {
            records.push(record(text, origin)?);
        }
    }
    if records.is_empty() {
        return Err(Error::file(path, "there is no example in this file"));
    }
    Ok(records)
}

fn record(text: &str, origin: Origin) -> Result<Record> {
    let value: Value =
        serde_json::from_str(text).map_err(|e| origin.error(format!("not valid JSON: {e}")))?;
    let Value::Object(mut extra) = value else {
        return Err(origin.error(format!("expected a JSON object, found {}", kind(&value))));
    };
    let Some(schema) = Schema::recognise(&extra) else {
        let known: Vec<String> = Schema::ALL.iter().map(|s| s.columns().join(", ")).collect();
        let found: Vec<&str> = extra.keys().map(String::as_str).collect();
        let why = format!("columns [{}]; expected one of [{}]", found.join(", "), known.join("] or ["));
        return Err(origin.error(why));
    };
    let content = schema.take(&mut extra).map_err(|why| origin.error(why))?;
    Ok(Record { origin, content, extra })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8]) -> Result<Vec<Record>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.jsonl");
        std::fs::write(&path, text).unwrap();
        read_jsonl(&path)
    }

    #[test]
    fn pairs_and_conversations_are_told_apart_by_their_columns() {
        let text = "\u{feff}{\"prompt\": \"1+1?\", \"response\": \"2\", \"task\": \"sum\"}\n\n\
            {\"messages\": [{\"role\": \"user\", \"content\": \"Grüße\"}, \
            {\"role\": \"assistant\", \"content\": \"Hallo\"}]}";
        let records = read(text.as_bytes()).unwrap();
        assert_eq!(records.len(), 2);
        assert_eq!(records[0].content, Content::Pair { prompt: "1+1?".into(), response: "2".into() });
        assert_eq!(records[0].extra["task"], "sum");
        assert_eq!(records[1].content.answer(), "Hallo");
        assert_eq!(records[1].origin.line, 3);
        assert!(records[1].extra.is_empty());
    }

    #[test]
    fn errors_name_file_and_line() {
        let good = "{\"prompt\": \"a\", \"response\": \"b\"}\n";
        for (bad, say) in [
            (&b"{\"prompt\": \"a\""[..], "not valid JSON"),
            (b"[1]", "a list"),
            (b"{\"question\": \"a\"}", "columns [question]"),
            (b"{\"prompt\": \"a\", \"response\": 3}", "`response` should be a string, found a number"),
            (b"{\"prompt\": \"\xff\", \"response\": \"b\"}", "UTF-8"),
            (b"{\"messages\": {}}", "a list"),
            (b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}", "end with"),
            (b"{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\"}]}", "end with"),
            (b"{\"messages\": [{\"role\": \"user\"}]}", "message 0: there is no `content`"),
            (b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\", \"tool_calls\": []}]}", "tool_calls"),
        ] {
            let message = read(&[good.as_bytes(), bad].concat()).unwrap_err().to_string();
            assert!(message.contains("d.jsonl:2: ") && message.contains(say), "{message}");
        }
        assert!(read(b"\n \n").unwrap_err().to_string().contains("no example"));
    }
}
