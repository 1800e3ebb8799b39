//! Text of new tokens, as it is shown.

use anyhow::Result;
use gradtx_run::ui;
use gradtx_runtime::data::TextTokenizer;
use gradtx_train::prompts::Prompts;

/// An answer that grows token by token. A character may take several tokens: it is shown when it is
/// whole.
pub(super) struct Growing<'a> {
    tokenizer: &'a TextTokenizer,
    tokens: Vec<u32>,
    /// Bytes of the text that are shown.
    shown: usize,
    shows: bool,
    failed: Option<gradtx_runtime::Error>,
}

impl<'a> Growing<'a> {
    /// Nothing yet. Printed as it grows if it `shows`.
    pub(super) fn new(tokenizer: &'a TextTokenizer, shows: bool) -> Self {
        Self { tokenizer, tokens: vec![], shown: 0, shows, failed: None }
    }

    /// One more token.
    pub(super) fn push(&mut self, token: u32) {
        self.tokens.push(token);
        match self.tokenizer.decode(&self.tokens, true) {
            Ok(text) => self.show(text.trim_end_matches(char::REPLACEMENT_CHARACTER)),
            Err(error) => self.failed = Some(error),
        }
    }

    fn show(&mut self, text: &str) {
        if let Some(new) = text.get(self.shown..).filter(|new| !new.is_empty()) {
            self.shown = text.len();
            if self.shows {
                ui::print(new);
            }
        }
    }

    /// The whole text; ends its line.
    pub(super) fn finish(mut self) -> Result<String> {
        if let Some(error) = self.failed.take() {
            return Err(error.into());
        }
        let text = self.tokenizer.decode(&self.tokens, true)?;
        self.show(&text);
        if self.shows {
            ui::print("\n");
        }
        Ok(text)
    }
}

/// The text of an answer.
pub(super) fn answer_text(prompts: &Prompts, tokens: &[u32]) -> Result<String> {
    Ok(prompts.tokenizer.decode(tokens, true)?)
}
