//! ROUGE-1 F1 of a summary, with stemming: the numbers of the Python package
//! `rouge_score` with `use_stemmer=True`, to the bit.
//!
//! In: a prediction and a reference. Out: a number from 0 to 1. A text is lowered and cut
//! into its runs of a–z and 0–9 (every other letter parts words, `é` too); words of more
//! than three characters are stemmed. With m the words that both have, counted as often
//! as in the text that has fewer of them, and P and R the numbers of words:
//!
//! precision = m / P, recall = m / R, F1 = 2 · precision · recall / (precision + recall)

use super::stem::stem;
use std::collections::HashMap;

/// ROUGE-1 F1; 0 where either text has no word.
pub fn rouge1(prediction: &str, reference: &str) -> f64 {
    let (found, wanted) = (words(prediction), words(reference));
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in &wanted {
        *left.entry(word).or_default() += 1;
    }
    let mut matches = 0;
    for word in &found {
        if let Some(count) = left.get_mut(word.as_str()).filter(|count| **count > 0) {
            *count -= 1;
            matches += 1;
        }
    }
    if matches == 0 {
        return 0.0;
    }
    let precision = f64::from(matches) / found.len() as f64;
    let recall = f64::from(matches) / wanted.len() as f64;
    2.0 * precision * recall / (precision + recall)
}

/// The stemmed words of a text.
fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let words = lower.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(|word| if word.len() > 3 { stem(word) } else { word.to_string() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_runs_of_ascii_letters_and_digits() {
        assert_eq!(
            words("Don't re-open the Café's 2 doors_"),
            ["don", "t", "re", "open", "the", "caf", "s", "2", "door"]
        );
        assert!(words("— … ¿日本? \n").is_empty());
        // The Kelvin sign is a k when lowered.
        assert_eq!(words("\u{212a}g"), ["kg"]);
    }

    #[test]
    fn overlap_counts_each_word_once() {
        assert_eq!(rouge1("a a b", "a c"), 2.0 * (1.0 / 3.0) * 0.5 / (1.0 / 3.0 + 0.5));
        assert_eq!(rouge1("Running dogs", "the dog runs"), 2.0 * 1.0 * (2.0 / 3.0) / (1.0 + 2.0 / 3.0));
        assert_eq!(rouge1("same words", "Same, words!"), 1.0);
        for (a, b) in [("", ""), ("", "a"), ("a", ""), ("!", "!"), ("a", "b")] {
            assert_eq!(rouge1(a, b), 0.0);
        }
    }
}
