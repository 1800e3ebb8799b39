//! Conversations: lists of messages with `role` and `content`, as OpenAI and the hub's chat
//! templates have them, or with `from` and `value`, as ShareGPT has.

use super::super::rows::kind;
use super::pairs::{instructed, system};
use super::record::{self, Content, Message, Part, as_text, says_nothing};
use serde_json::{Map, Value};

/// Entries of a message that say nothing to the model.
const BOOKKEEPING: [&str; 13] = [
    "created_at",
    "date",
    "id",
    "index",
    "lang",
    "message_id",
    "model",
    "name",
    "rank",
    "score",
    "timestamp",
    "token_count",
    "weight",
];

/// What a row asks and answers, before it is settled which form it takes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Chat {
    system: Option<String>,
    messages: Vec<Message>,
    /// Answers before the last that may be learned, by the number of their message.
    learned: Vec<usize>,
    /// It was written as one prompt and one response.
    is_pair: bool,
}

impl Chat {
    /// A prompt and its answer.
    pub fn pair(prompt: String, response: String) -> Self {
        let messages = vec![message("user", prompt), message("assistant", response)];
        Self { system: None, messages, learned: vec![], is_pair: true }
    }

    /// Turns of which the last is an answer. What follows the last answer with a weight is
    /// left out.
    pub fn conversation(mut turns: Vec<Turn>) -> Part<Self> {
        let ends_with_answer = turns.len() > 1 && turns.last().is_some_and(|t| t.message.role == "assistant");
        if !ends_with_answer {
            return Err("the messages should end with an `assistant` message that answers another one".into());
        }
        let is_learned = |turn: &Turn| turn.message.role == "assistant" && turn.has_weight;
        let last = turns.iter().rposition(is_learned).ok_or("all answers have the weight 0")?;
        turns.truncate(last + 1);
        let says = |turn: &Turn| !turn.message.content.trim().is_empty();
        let learned = (0..last).filter(|&i| is_learned(&turns[i]) && says(&turns[i])).collect();
        let messages = turns.into_iter().map(|turn| turn.message).collect();
        Ok(Self { system: None, messages, learned, is_pair: false })
    }

    /// With what was asked and answered before it.
    pub(crate) fn with_history(mut self, before: Vec<Message>) -> Self {
        self.learned = (0..before.len()).filter(|&i| before[i].role == "assistant").collect();
        self.messages.splice(..0, before);
        self
    }

    /// With a system message, unless it begins with one.
    pub(crate) fn with_system(mut self, system: Option<String>) -> Self {
        if self.messages.first().is_none_or(|first| first.role != "system") {
            self.system = system;
        }
        self
    }

    /// With a text before what the user says first.
    pub(crate) fn instructed(mut self, instruction: &str) -> Self {
        if let Some(first) = self.messages.iter_mut().find(|m| m.role == "user") {
            first.content = instructed(instruction, &first.content);
        }
        self
    }

    /// As the content of a record; beside it, which messages before the last can be learned.
    pub fn content(mut self) -> (Content, Vec<usize>) {
        if let Some(system) = self.system {
            self.messages.insert(0, message("system", system));
            self.learned.iter_mut().for_each(|i| *i += 1);
        }
        match (self.is_pair, self.messages.as_mut_slice()) {
            (true, [prompt, answer]) => {
                let [prompt, response] = [prompt, answer].map(|m| std::mem::take(&mut m.content));
                (Content::Pair { prompt, response }, vec![])
            }
            _ => (Content::Chat(self.messages), self.learned),
        }
    }
}

/// A message.
pub(super) fn message(role: &str, content: String) -> Message {
    Message { role: role.into(), content }
}

/// A message of a list, and whether it may be learned.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Turn {
    pub message: Message,
    pub has_weight: bool,
}

impl Turn {
    /// One that may be learned.
    pub fn new(role: &str, content: String) -> Self {
        Self { message: message(role, content), has_weight: true }
    }
}

/// The conversation in a column, with the row's system message.
pub(super) fn messages(name: &str, row: &mut Map<String, Value>) -> Part<Chat> {
    let system = system(row)?;
    if let Some(tools) =
        ["tools", "functions"].iter().find(|name| row.get(**name).is_some_and(|v| !says_nothing(v)))
    {
        return Err(format!("`{tools}` is not supported: prompts do not describe tools"));
    }
    Ok(messages_of(name, row)?.with_system(system))
}

/// The conversation in a column.
pub(super) fn messages_of(name: &str, row: &mut Map<String, Value>) -> Part<Chat> {
    let Some(Value::Array(items)) = row.shift_remove(name) else {
        return Err(format!("`{name}` should be a list"));
    };
    Chat::conversation(turns(items)?)
}

/// The messages of a list.
pub(super) fn turns(items: Vec<Value>) -> Part<Vec<Turn>> {
    items
        .into_iter()
        .enumerate()
        .map(|(i, item)| turn(item).map_err(|why| format!("message {i}{why}")))
        .collect()
}

fn turn(item: Value) -> Part<Turn> {
    let Value::Object(mut item) = item else {
        return Err(format!(" should be an object, found {}", kind(&item)));
    };
    let [by, says] = match item.contains_key("role") || !item.contains_key("from") {
        true => ["role", "content"],
        false => ["from", "value"],
    };
    let role = record::text(&mut item, by).map_err(|why| format!(": {why}"))?;
    // Tables have a column for what only some messages have; there it is null or empty.
    let says_more = |(key, value): &(&String, &Value)| {
        key.as_str() != says && !says_nothing(value) && !BOOKKEEPING.contains(&key.as_str())
    };
    if let Some((key, _)) = item.iter().find(says_more) {
        return Err(format!(" has `{key}`, which is not supported"));
    }
    let content = match item.shift_remove(says) {
        Some(Value::Array(parts)) => text_of(parts)?,
        Some(value) => as_text(value, says).map_err(|why| format!(": {why}"))?,
        None => return Err(format!(": there is no `{says}`")),
    };
    let has_weight = item.get("weight").is_none_or(|weight| weight.as_f64() != Some(0.0));
    Ok(Turn { message: message(role_of(&role)?, content), has_weight })
}

/// A role as chat templates know it.
fn role_of(role: &str) -> Part<&str> {
    match role {
        "human" | "user" => Ok("user"),
        "gpt" | "assistant" | "chatgpt" | "bard" | "bing" | "model" => Ok("assistant"),
        "tool" | "function" | "function_call" | "function_response" | "observation" | "ipython" => {
            Err(format!(" is of the role `{role}`: calls of tools are not supported"))
        }
        other => Ok(other),
    }
}

/// Content in parts, all of which must be text.
fn text_of(parts: Vec<Value>) -> Part<String> {
    let mut text = String::new();
    for (i, part) in parts.into_iter().enumerate() {
        match part {
            Value::String(part) => text += &part,
            Value::Object(mut part) => {
                let kind = part.get("type").and_then(Value::as_str).unwrap_or("text").to_string();
                if !matches!(kind.as_str(), "text" | "input_text" | "output_text") {
                    return Err(format!(", part {i} is of the type `{kind}`; only text is supported"));
                }
                text += &record::text(&mut part, "text").map_err(|why| format!(", part {i}: {why}"))?;
            }
            other => return Err(format!(", part {i} should be an object, found {}", kind(&other))),
        }
    }
    Ok(text)
}
