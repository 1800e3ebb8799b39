//! Answers that somebody liked and disliked. Only liked ones are learned.
//!
//! * `chosen` and `rejected`, as texts, lists of messages, or whole conversations in the form
//!   of Anthropic's HH-RLHF: `chosen` is learned.
//! * A column `label` that says whether the answer is liked, as TRL's KTO has it: rows in which
//!   it is false are left out.

use super::chat::{Chat, Turn};
use super::pairs::{Side, side, system};
use super::reading::Columns;
use super::record::{Part, says_nothing};
use serde_json::{Map, Value};

/// Columns with the prompt beside `chosen` and `rejected`.
const PROMPTS: [&str; 5] = ["prompt", "question", "instruction", "input", "query"];
/// Columns with one more answer.
const ANSWERS: [&str; 4] = ["response", "completion", "output", "answer"];
/// How the speakers of HH-RLHF are named.
const SPEAKERS: [(&str, &str); 2] = [("Human:", "user"), ("Assistant:", "assistant")];

/// The chosen answer and what it answers.
pub(super) fn chosen(row: &mut Map<String, Value>) -> Part<Chat> {
    if let Some(other) = ANSWERS.iter().find(|name| row.get(**name).is_some_and(|v| *v != row["chosen"])) {
        return Err(format!(
            "`chosen` and `{other}` are two different answers; name the one to learn: \
             data.columns.prompt and data.columns.response"
        ));
    }
    let system = system(row)?;
    let answer = super::pairs::answer_in(row, "chosen")?;
    row.shift_remove("rejected");
    let prompt = PROMPTS.iter().find(|name| row.get(**name).is_some_and(|value| !says_nothing(value)));
    let prompt = prompt.map(|name| side(row, name)).transpose()?;
    let chat = match (prompt, answer) {
        // The whole conversation, whatever stands beside it.
        (_, Side::Messages(turns)) if turns.iter().any(|turn| turn.message.role == "user") => {
            Chat::conversation(turns)
        }
        (None, Side::Text(whole)) => match transcript(&whole) {
            Some(turns) => Chat::conversation(turns),
            None => {
                Err(format!("there is no prompt beside `chosen`: none of the columns {}", PROMPTS.join(", ")))
            }
        },
        (Some(Side::Text(prompt)), Side::Text(answer)) => {
            let answer = answer
                .strip_prefix(prompt.as_str())
                .filter(|rest| !rest.trim().is_empty())
                .unwrap_or(&answer);
            match transcript(&format!("{prompt}{answer}")) {
                Some(turns) => Chat::conversation(turns),
                None => Ok(Chat::pair(prompt, answer.into())),
            }
        }
        (Some(prompt), answer) => prompt.answered(answer),
        (None, Side::Messages(_)) => Err("the messages of `chosen` have none of a user".into()),
    };
    chat.map(|chat| chat.with_system(system))
}

/// The turns of a conversation whose lines begin with `Human:` and `Assistant:`.
fn transcript(text: &str) -> Option<Vec<Turn>> {
    let mut turns: Vec<Turn> = vec![];
    for part in text.trim_start().split("\n\n") {
        let speaker = SPEAKERS.iter().find_map(|(name, role)| Some((*role, part.strip_prefix(name)?)));
        match (speaker, turns.last_mut()) {
            (Some((role, says)), _) => turns.push(Turn::new(role, says.trim().into())),
            (None, Some(turn)) => turn.message.content += &format!("\n\n{part}"),
            (None, None) => return None,
        }
    }
    (turns.first()?.message.role == "user").then_some(turns)
}

/// The values of the column that says which answers are liked, over a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels {
    /// `true` and `false`, or `chosen` and `rejected`.
    clear: usize,
    /// The numbers 0, 1, -1: they may be anything.
    numbers: usize,
    /// 0 or -1 among them.
    not_one: usize,
    /// What is no verdict on an answer.
    others: usize,
}

impl Labels {
    /// Notes the value of a row.
    pub fn add(&mut self, value: Option<&Value>) {
        match value {
            None => {}
            Some(value) if says_nothing(value) => {}
            Some(value) => match (verdict(value), is_number(value)) {
                (Some(liked), true) => {
                    self.numbers += 1;
                    self.not_one += usize::from(!liked);
                }
                (Some(_), false) => self.clear += 1,
                (None, _) => self.others += 1,
            },
        }
    }

    /// Whether a row of the file has an answer that was disliked; an error where that is not clear.
    pub(super) fn is_disliked(&self, value: Option<&Value>, columns: &Columns) -> Part<bool> {
        let disliked = || value.and_then(verdict) == Some(false);
        if columns.label_is_ignored() {
            return Ok(false);
        }
        if columns.label_is_named() {
            return match value {
                None => Err("data.columns.label: there is no such column".into()),
                Some(value) if verdict(value).is_none() => {
                    Err("data.columns.label: expected true or false, 1 or 0, `chosen` or `rejected`".into())
                }
                Some(_) => Ok(disliked()),
            };
        }
        if self.others > 0 || self.clear + self.numbers == 0 {
            return Ok(false);
        }
        if self.not_one > 0 {
            return Err(
                "0 and 1 may say that an answer was disliked and liked, or anything else; set data.columns.label to \
                 \"label\" to leave out the rows in which it is not 1, or to \"none\" if it says nothing about answers"
                    .into(),
            );
        }
        Ok(disliked())
    }
}

/// What a label says about its answer: liked or not.
fn verdict(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(liked) => Some(*liked),
        Value::Number(number) => match number.as_f64()? {
            1.0 => Some(true),
            0.0 | -1.0 => Some(false),
            _ => None,
        },
        Value::String(text) => match text.trim().to_lowercase().as_str() {
            "1" | "true" | "chosen" => Some(true),
            "0" | "-1" | "false" | "rejected" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// A number, also as the text of a CSV file.
fn is_number(value: &Value) -> bool {
    match value {
        Value::String(text) => text.trim().parse::<f64>().is_ok(),
        other => other.is_number(),
    }
}
