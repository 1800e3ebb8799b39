//! Where an answer differs from the reference, word by word.

use serde::Serialize;

/// Words of a text that are compared at most; what comes after them counts as changed.
const MAX_WORDS: usize = 400;

/// How a piece of text relates to the reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// In both.
    Same,
    /// In the answer only.
    Extra,
    /// In the reference only.
    Missing,
}

/// A piece of text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Piece {
    /// Where it is.
    pub change: Change,
    /// The text.
    pub text: String,
}

/// An answer and its reference as one text, by a longest common subsequence of words.
pub fn changes(answer: &str, reference: &str) -> Vec<Piece> {
    let (a, a_rest) = words(answer);
    let (b, b_rest) = words(reference);
    // common[i][j]: longest common subsequence of a[i..] and b[j..].
    let mut common = vec![vec![0u32; b.len() + 1]; a.len() + 1];
    for i in (0..a.len()).rev() {
        for j in (0..b.len()).rev() {
            common[i][j] = match a[i].trim() == b[j].trim() {
                true => common[i + 1][j + 1] + 1,
                false => common[i + 1][j].max(common[i][j + 1]),
            };
        }
    }
    let mut pieces: Vec<Piece> = vec![];
    let mut push = |change, text: &str| match pieces.last_mut() {
        Some(last) if last.change == change => last.text += text,
        _ if text.is_empty() => {}
        _ => pieces.push(Piece { change, text: text.into() }),
    };
    let (mut i, mut j) = (0, 0);
    while i < a.len() || j < b.len() {
        if i < a.len() && j < b.len() && a[i].trim() == b[j].trim() {
            push(Change::Same, a[i]);
            (i, j) = (i + 1, j + 1);
        } else if j == b.len() || (i < a.len() && common[i + 1][j] >= common[i][j + 1]) {
            push(Change::Extra, a[i]);
            i += 1;
        } else {
            push(Change::Missing, b[j]);
            j += 1;
        }
    }
    push(Change::Extra, a_rest);
    push(Change::Missing, b_rest);
    pieces
}

/// Words with the space after them, and what comes after the first [`MAX_WORDS`].
fn words(text: &str) -> (Vec<&str>, &str) {
    let words: Vec<&str> = text.split_inclusive(char::is_whitespace).collect();
    let end = words.iter().take(MAX_WORDS).map(|word| word.len()).sum();
    (words.into_iter().take(MAX_WORDS).collect(), &text[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(answer: &str, reference: &str) -> Vec<(Change, String)> {
        changes(answer, reference).into_iter().map(|piece| (piece.change, piece.text)).collect()
    }

    #[test]
    fn words_that_differ_are_found() {
        use Change::{Extra, Missing, Same};
        let piece = |change, text: &str| (change, text.to_string());
        assert_eq!(found("a b c", "a b c"), [piece(Same, "a b c")]);
        assert_eq!(
            found("a x c", "a b c"),
            [piece(Same, "a "), piece(Extra, "x "), piece(Missing, "b "), piece(Same, "c")]
        );
        assert_eq!(found("", "b"), [piece(Missing, "b")]);
        assert_eq!(found("b", ""), [piece(Extra, "b")]);
        assert!(found("", "").is_empty());
        // Spaces around a word do not make another word of it.
        assert_eq!(found("a\nb", "a b"), [piece(Same, "a\nb")]);
    }

    #[test]
    fn long_texts_are_compared_at_their_beginning() {
        let long = "w ".repeat(MAX_WORDS + 5);
        let pieces = found(&long, &long);
        assert_eq!(pieces[0].1.len(), 2 * MAX_WORDS);
        assert_eq!(pieces[1..].iter().map(|(_, text)| text.len()).collect::<Vec<_>>(), [10, 10]);
    }
}
