//! Prompts and responses: pairs under several names, instructions with an input, and the
//! columns that settings name.

use super::chat::{Chat, Turn, message, turns};
use super::forms::CONTEXT;
use super::reading::Columns;
use super::record::{Message, Part, as_text, says_nothing, text};
use serde_json::{Map, Value};

/// Columns with a system message, where there is one.
const SYSTEM: [&str; 2] = ["system", "system_prompt"];

/// `prompt` and `response`, under these names. Either may be a list of messages, as TRL
/// writes them. Questions may have a text that they are about.
pub(super) fn pair(columns: &[&str], row: &mut Map<String, Value>) -> Part<Chat> {
    let [asked, answered] = columns else { return Err("expected two columns".into()) };
    let system = system(row)?;
    let mut prompt = side(row, asked)?;
    if matches!(*asked, "question" | "query") {
        for name in CONTEXT {
            if let Some(context) = optional(row, name)? {
                prompt = prompt.after(&context);
            }
        }
    }
    prompt.answered(answer_in(row, answered)?).map(|chat| chat.with_system(system))
}

/// `instruction`, perhaps `input` (or `context`), and `output`; `history` has pairs of what was
/// asked and answered before.
pub(super) fn alpaca(columns: &[&str], row: &mut Map<String, Value>) -> Part<Chat> {
    let [asked, answered] = columns else { return Err("expected two columns".into()) };
    let system = system(row)?;
    let mut prompt = text(row, asked)?;
    for name in ["input", "context"] {
        if let Some(input) = optional(row, name)? {
            prompt = followed_by(&prompt, &input);
        }
    }
    let before = history(row)?;
    let chat = Side::Text(prompt).answered(answer_in(row, answered)?)?;
    Ok(chat.with_history(before).with_system(system))
}

/// The columns that the settings name; the row has them.
pub(super) fn own(columns: &Columns, row: &mut Map<String, Value>) -> Part<Chat> {
    let system = match columns.system.as_str() {
        "" => None,
        name => optional(row, name)?,
    };
    if !columns.messages.is_empty() {
        return Ok(super::chat::messages_of(&columns.messages, row)?.with_system(system));
    }
    let response = answer_in(row, &columns.response)?;
    let mut prompt = side(row, &columns.prompt)?;
    if !columns.input.is_empty()
        && let Some(input) = optional(row, &columns.input)?
    {
        prompt = prompt.before(&input);
    }
    prompt.answered(response).map(|chat| chat.with_system(system))
}

/// A prompt with an instruction before it, on a line of its own.
pub(super) fn instructed(instruction: &str, prompt: &str) -> String {
    followed_by(instruction, prompt)
}

fn followed_by(first: &str, second: &str) -> String {
    match first {
        "" => second.into(),
        _ if first.ends_with('\n') => [first, second].concat(),
        _ => [first, "\n", second].concat(),
    }
}

/// A column that may be missing, null or empty.
fn optional(row: &mut Map<String, Value>, name: &str) -> Part<Option<String>> {
    match row.shift_remove(name) {
        Some(value) if !says_nothing(&value) => as_text(value, name).map(Some),
        _ => Ok(None),
    }
}

/// The system message of a row.
pub(super) fn system(row: &mut Map<String, Value>) -> Part<Option<String>> {
    let found = SYSTEM.iter().find(|name| row.get(**name).is_some_and(|value| !says_nothing(value)));
    found.map_or(Ok(None), |name| optional(row, name))
}

/// One side of a pair: a text, or messages.
pub(super) enum Side {
    Text(String),
    Messages(Vec<Turn>),
}

impl Side {
    /// With a text before it.
    fn after(self, text: &str) -> Self {
        self.changed(|prompt| followed_by(text, prompt))
    }

    /// With a text behind it.
    fn before(self, text: &str) -> Self {
        self.changed(|prompt| followed_by(prompt, text))
    }

    fn changed(mut self, change: impl Fn(&str) -> String) -> Self {
        match &mut self {
            Self::Text(prompt) => *prompt = change(prompt),
            Self::Messages(turns) => {
                if let Some(last) = turns.last_mut() {
                    last.message.content = change(&last.message.content);
                }
            }
        }
        self
    }

    /// A prompt with its answer.
    pub(super) fn answered(self, answer: Self) -> Part<Chat> {
        match (self, answer) {
            (Self::Text(prompt), Self::Text(response)) => Ok(Chat::pair(prompt, response)),
            (prompt, answer) => {
                let mut turns = prompt.into_turns("user");
                turns.extend(answer.into_turns("assistant"));
                Chat::conversation(turns)
            }
        }
    }

    fn into_turns(self, role: &str) -> Vec<Turn> {
        match self {
            Self::Text(content) => vec![Turn::new(role, content)],
            Self::Messages(turns) => turns,
        }
    }
}

/// Takes out an answer.
pub(super) fn answer_in(row: &mut Map<String, Value>, name: &str) -> Part<Side> {
    match row.get(name) {
        Some(Value::Null) => Err(format!("`{name}` is null: there is no answer to learn from")),
        Some(value) if says_nothing(value) => {
            Err(format!("`{name}` is empty: there is no answer to learn from"))
        }
        _ => side(row, name),
    }
}

/// Takes out a text or a list of messages.
pub(super) fn side(row: &mut Map<String, Value>, name: &str) -> Part<Side> {
    match row.shift_remove(name) {
        Some(Value::Array(items)) => {
            turns(items).map(Side::Messages).map_err(|why| format!("`{name}`: {why}"))
        }
        Some(value) => as_text(value, name).map(Side::Text),
        None => Err(format!("there is no `{name}`")),
    }
}

/// `history`: pairs of what was asked and answered before.
fn history(row: &mut Map<String, Value>) -> Part<Vec<Message>> {
    let Some(Value::Array(pairs)) = row.get("history") else { return Ok(vec![]) };
    let wrong = || "`history` should be a list of pairs of texts".to_string();
    let mut messages = vec![];
    for pair in pairs {
        let [Some(asked), Some(answered)] = [0, 1].map(|i| pair.get(i).and_then(Value::as_str)) else {
            return Err(wrong());
        };
        messages.extend([message("user", asked.into()), message("assistant", answered.into())]);
    }
    row.shift_remove("history");
    Ok(messages)
}
