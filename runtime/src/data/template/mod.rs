//! [`ChatTemplate`]: a model's own Jinja template, rendered within bounds.
//!
//! A template is a program from a file that nobody here wrote. It is given a limited number
//! of instructions, and its text a limited size. What no such limit catches (strings that
//! double, values that contain themselves, expressions nested so deeply that the parser runs
//! out of stack) ends a process: [`isolate`] has templates rendered in child processes of
//! limited memory and time, whose end is an error like any other.
//!
//! * jinja: the environment that templates are written for.
//! * values: what Python prints for a value, as text and as JSON.
//! * process: the child processes.

mod jinja;
mod process;
mod values;

pub use process::{SERVER_ARGUMENT, isolate, serve};

use super::schema::Message;
use crate::{Error, Result};
use jinja::Jinja;
use process::Pool;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Bytes of a template at most; the longest published ones are below 64 KiB.
const MAX_TEMPLATE_BYTES: usize = 512 << 10;

/// A template and what it is given beside the messages.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Source {
    /// The Jinja text.
    template: String,
    /// `bos_token` and so on.
    special: Map<String, Value>,
    /// The date of `strftime_now`, `2026-11-27`; empty where none is set.
    date: String,
}

/// One conversation to be rendered.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Request {
    messages: Vec<Message>,
    add_generation_prompt: bool,
}

/// A chat template that compiles.
pub struct ChatTemplate {
    engine: Engine,
    uses_date: bool,
}

enum Engine {
    Here(Box<Jinja>),
    Apart(Pool),
}

impl ChatTemplate {
    /// Compiles a template. `special` are the texts of special tokens by their names, `date`
    /// is what `strftime_now` takes for today.
    pub fn new(template: &str, special: &[(String, String)], date: &str) -> Result<Self> {
        let wrong = |why: String| Error::invalid("chat template", why);
        if template.len() > MAX_TEMPLATE_BYTES {
            let why = format!("{} bytes; at most {MAX_TEMPLATE_BYTES} are read", template.len());
            return Err(wrong(why));
        }
        let special = special.iter().map(|(name, text)| (name.clone(), text.clone().into())).collect();
        let source = Source { template: template.into(), special, date: date.into() };
        let engine = match process::is_isolated() {
            true => Engine::Apart(Pool::start(source).map_err(wrong)?),
            false => Engine::Here(Box::new(Jinja::new(&source).map_err(wrong)?)),
        };
        Ok(Self { engine, uses_date: template.contains("strftime_now") })
    }

    /// Whether its text depends on the date.
    pub fn uses_date(&self) -> bool {
        self.uses_date
    }

    /// The text of a conversation, with or without the begin of an answer; or why there is none.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> std::result::Result<String, String> {
        let request = Request { messages: messages.to_vec(), add_generation_prompt };
        match &self.engine {
            Engine::Here(jinja) => jinja.render(&request),
            Engine::Apart(pool) => pool.render(&request),
        }
    }
}
