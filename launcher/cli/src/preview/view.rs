//! [`View`]: one example as pieces of text, each of a kind, and as tokens.

use anyhow::Result;
use gradtx_run::ui::{print, say, style};
use gradtx_runtime::data::Record;
use gradtx_runtime::text::printable_line;
use gradtx_train::prompts::{Prompts, Trace};
use serde::Serialize;

/// What training does with a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    /// It is read.
    Read,
    /// It is trained on.
    Trained,
    /// It is beyond the limit.
    Cut,
}

/// A token.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Token {
    pub(super) id: u32,
    /// As the vocabulary has it.
    pub(super) token: String,
    pub(super) kind: Kind,
}

/// Neighbouring tokens of one kind.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) kind: Kind,
}

/// One example.
#[derive(Clone, Debug, Serialize)]
pub(super) struct View {
    /// Its number, from 1,
    pub(super) number: usize,
    /// of so many.
    pub(super) of: usize,
    /// Where it stands.
    pub(super) origin: String,
    /// Prompt and answer.
    pub(super) text: Vec<Piece>,
    /// All tokens.
    pub(super) tokens: Vec<Token>,
}

/// Tokens that are listed in a terminal.
const LISTED: usize = 256;

impl View {
    /// Of a record, which is number `index` (from 0) of so many.
    pub(super) fn new(prompts: &Prompts, record: &Record, index: usize, of: usize) -> Result<Self> {
        let trace = prompts.trace(record)?;
        let limit = prompts.limit().0;
        let kind = |i: usize| match trace.example.trained[i] {
            _ if i >= limit => Kind::Cut,
            true => Kind::Trained,
            false => Kind::Read,
        };
        let kinds: Vec<Kind> = (0..trace.example.tokens.len()).map(kind).collect();
        let token = |(&id, &kind): (&u32, &Kind)| Token {
            id,
            token: prompts.tokenizer.token(id).unwrap_or_default(),
            kind,
        };
        let tokens = trace.example.tokens.iter().zip(&kinds).map(token).collect();
        Ok(Self {
            number: index + 1,
            of,
            origin: record.origin.to_string(),
            text: pieces(&trace, &kinds),
            tokens,
        })
    }

    /// How many tokens are of a kind.
    pub(super) fn count(&self, kind: Kind) -> usize {
        self.tokens.iter().filter(|token| token.kind == kind).count()
    }

    /// What there is to say above the example.
    pub(super) fn title(&self) -> String {
        let cut = match self.count(Kind::Cut) {
            0 => String::new(),
            n => format!(", the last {n} cut off"),
        };
        format!(
            "example {} of {}, {}: {} tokens, {} trained on{cut}",
            self.number,
            self.of,
            self.origin,
            self.tokens.len(),
            self.count(Kind::Trained)
        )
    }

    /// Prints it, in colours or with marks.
    pub(super) fn print(&self, colours: bool) {
        let mark = |kind: Kind| match kind {
            Kind::Read => ["", ""],
            Kind::Trained => ["«", "»"],
            Kind::Cut => ["[cut: ", "]"],
        };
        let colour = |kind: Kind| match kind {
            Kind::Read => "\u{1b}[2m",
            Kind::Trained => "\u{1b}[1;32m",
            Kind::Cut => "\u{1b}[9;31m",
        };
        let legend = match colours {
            true => "trained on: green; cut off: red",
            false => "trained on: «…»; cut off: [cut: …]",
        };
        say(&format!("\n{}\n{legend}\n", self.title()));
        let show = |text: &str, kind: Kind| match colours {
            true => {
                style(colour(kind));
                print(text);
                style("\u{1b}[0m");
            }
            false => print(&format!("{}{text}{}", mark(kind)[0], mark(kind)[1])),
        };
        self.text.iter().for_each(|piece| show(&piece.text, piece.kind));
        print("\n\n");
        for (i, token) in self.tokens.iter().take(LISTED).enumerate() {
            let text = printable_line(&token.token);
            show(&format!("{} {text}", token.id), token.kind);
            print(if (i + 1) % 8 == 0 { "\n" } else { "  " });
        }
        match self.tokens.len().saturating_sub(LISTED) {
            0 => print("\n"),
            more => print(&format!("… {more} more tokens: --json and --out list all\n")),
        }
    }
}

/// The text, cut where the kind changes. A character of several tokens belongs to the first.
fn pieces(trace: &Trace, kinds: &[Kind]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = vec![];
    let mut at = 0;
    let last = kinds.len().saturating_sub(1);
    for (i, (&(_, end), &kind)) in trace.spans.iter().zip(kinds).enumerate() {
        // What no token stands for, such as white space that a tokenizer drops, goes with its neighbour.
        let end = if i == last { trace.text.len() } else { end.max(at) };
        let text = trace.text.get(at..end).unwrap_or_default();
        at = end;
        match pieces.last_mut() {
            Some(piece) if piece.kind == kind => piece.text += text,
            _ if text.is_empty() => {}
            _ => pieces.push(Piece { text: text.into(), kind }),
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_runtime::data::Example;

    #[test]
    fn pieces_are_the_whole_text() {
        let trace = Trace {
            text: "ab é c".into(),
            answer: 3,
            // The second token ends within what the third one stands for: a character of two bytes.
            spans: vec![(0, 2), (3, 5), (3, 5), (6, 7)],
            example: Example { tokens: vec![1, 2, 3, 4], trained: vec![false, true, true, true] },
        };
        let kinds = [Kind::Read, Kind::Trained, Kind::Trained, Kind::Cut];
        let found = pieces(&trace, &kinds);
        assert_eq!(found.iter().map(|piece| piece.text.as_str()).collect::<String>(), trace.text);
        let wanted = [("ab", Kind::Read), (" é", Kind::Trained), (" c", Kind::Cut)];
        assert_eq!(found, wanted.map(|(text, kind)| Piece { text: text.into(), kind }));
    }
}
