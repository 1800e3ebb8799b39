//! [`Chat`]: a conversation, line by line from standard input.

use super::{PLACEHOLDER, Session, question, record};
use anyhow::{Context as _, Result};
use gradtx_kernels::{Backend, Real};
use gradtx_runtime::data::{Content, Message, PromptForm};
use gradtx_train::prompts::Prompts;
use serde_json::json;
use std::io::{BufRead, IsTerminal, Write};

/// Begins a new conversation.
const RESET: &str = "/reset";
/// Ends the program, as the end of the input does.
const EXIT: [&str; 2] = ["/exit", "/quit"];

/// A conversation with a model.
pub(super) struct Chat<'a> {
    prompts: &'a Prompts,
    /// Tokens of the conversation at most.
    context: usize,
    messages: Vec<Message>,
}

impl<'a> Chat<'a> {
    /// Nothing is said yet.
    pub(super) fn new(prompts: &'a Prompts, context: usize) -> Self {
        Self { prompts, context, messages: vec![] }
    }

    /// Answers every line of standard input.
    pub(super) fn run<D: Backend<X>, X: Real<Acc = f32>>(
        mut self,
        session: &mut Session<'_, D, X>,
    ) -> Result<()> {
        let ui = session.of.context.ui.clone();
        let keeps = self.prompts.form() != PromptForm::Plain;
        ui.status(match keeps {
            true => "chat: /reset begins a new conversation, /exit or Ctrl-D ends",
            false => {
                "the plain prompt form has no turns: every line is a prompt of its own; /exit or Ctrl-D ends"
            }
        });
        let is_terminal = std::io::stdin().is_terminal();
        let mut lines = std::io::stdin().lock().lines();
        loop {
            if is_terminal && !ui.is_json() {
                let mut out = std::io::stderr();
                // To a standard error that is closed nothing can be said.
                let _ = out.write_all(b"> ").and_then(|()| out.flush());
            }
            let Some(line) = lines.next() else { return Ok(()) };
            let line = line.context("standard input: cannot read a line of text")?;
            match line.trim() {
                "" => continue,
                RESET => {
                    self.messages.clear();
                    ui.status("a new conversation");
                    continue;
                }
                word if EXIT.contains(&word) => return Ok(()),
                _ => {}
            }
            if !keeps {
                self.messages.clear();
            }
            self.say("user", line);
            let tokens = self.prompts.prompt(&record(self.content()))?;
            if tokens.len() >= self.context {
                self.messages.pop();
                ui.notice(&format!(
                    "this conversation has {} tokens, and --context is {}: begin a new one with {RESET}",
                    tokens.len(),
                    self.context
                ));
                continue;
            }
            let (text, found) = session.answer(tokens)?;
            let result = json!({ "text": text, "tokens": found.tokens.len(), "ended": found.ended });
            ui.result_object("generate", result);
            self.say("assistant", text);
        }
    }

    fn say(&mut self, role: &str, content: String) {
        self.messages.push(Message { role: role.into(), content });
    }

    /// What was said so far. A first turn is asked in the form in which single prompts are learned.
    fn content(&self) -> Content {
        if let [first] = self.messages.as_slice() {
            return question(&first.content);
        }
        let answer = Message { role: "assistant".into(), content: PLACEHOLDER.into() };
        Content::Chat(self.messages.iter().cloned().chain([answer]).collect())
    }
}
