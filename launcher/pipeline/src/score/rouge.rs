//! ROUGE-1 F1 of a summary, with stemming: by default the numbers of the Python package
//! `rouge_score` with `use_stemmer=True`, to the bit.
//!
//! In: a prediction and a reference. Out: a number from 0 to 1. A text is lowered and cut
//! into its runs of a–z and 0–9 (every other letter parts words, `é` too); words of more
//! than three characters are stemmed. Texts of other scripts have no such words, and score
//! 0 even where they are equal: [`RougeTokens::Unicode`] takes runs of letters and digits of
//! any script, and single characters of scripts without spaces. With m the words that both have, counted as often
//! as in the text that has fewer of them, and P and R the numbers of words:
//!
//! precision = m / P, recall = m / R, F1 = 2 · precision · recall / (precision + recall)

use super::stem::stem;
use gradtx_run::config::RougeTokens;
use std::collections::HashMap;

/// ROUGE-1 F1; 0 where either text has no word.
pub fn rouge1(prediction: &str, reference: &str, tokens: RougeTokens) -> f64 {
    let (found, wanted) = (words(prediction, tokens), words(reference, tokens));
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

/// Whether ROUGE-1 sees a word in a text.
pub(crate) fn has_words(text: &str, tokens: RougeTokens) -> bool {
    !words(text, tokens).is_empty()
}

/// The stemmed words of a text.
fn words(text: &str, tokens: RougeTokens) -> Vec<String> {
    let lower = text.to_lowercase();
    let parts: Vec<&str> = match tokens {
        RougeTokens::RougeScore => lower.split(|c: char| !c.is_ascii_alphanumeric()).collect(),
        RougeTokens::Unicode => unicode_words(&lower),
    };
    let words = parts.into_iter().filter(|word| !word.is_empty());
    // Only English words have English stems.
    let stemmed = |word: &str| word.len() > 3 && word.bytes().all(|byte| byte.is_ascii_alphanumeric());
    words.map(|word| if stemmed(word) { stem(word) } else { word.to_string() }).collect()
}

/// Runs of letters and digits; characters of scripts without spaces stand alone.
fn unicode_words(text: &str) -> Vec<&str> {
    let mut words = vec![];
    let mut begin = None;
    for (at, c) in text.char_indices() {
        let alone = has_no_spaces(c);
        if !alone && is_letter(c) {
            begin.get_or_insert(at);
            continue;
        }
        words.extend(begin.take().map(|begin| &text[begin..at]));
        if alone {
            words.push(&text[at..at + c.len_utf8()]);
        }
    }
    words.extend(begin.map(|begin| &text[begin..]));
    words
}

/// Letters, digits, and the marks that are written on letters.
fn is_letter(c: char) -> bool {
    // In the Indic blocks nukta and virama have the same places.
    let indic = matches!(c, '\u{900}'..='\u{d7f}') && matches!(c as u32 & 0x7f, 0x3c | 0x4d);
    c.is_alphanumeric() || indic || matches!(c, '\u{300}'..='\u{36f}' | '\u{64b}'..='\u{65f}')
}

/// Letters of Thai, Lao, Myanmar, Khmer, kana and Han, between whose words no spaces stand.
fn has_no_spaces(c: char) -> bool {
    let block = matches!(c,
        '\u{e00}'..='\u{eff}' | '\u{1000}'..='\u{109f}' | '\u{1780}'..='\u{17ff}'
        | '\u{3040}'..='\u{30ff}' | '\u{31f0}'..='\u{31ff}' | '\u{3400}'..='\u{4dbf}'
        | '\u{4e00}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}');
    block && c.is_alphanumeric()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_runs_of_ascii_letters_and_digits() {
        assert_eq!(
            words("Don't re-open the Café's 2 doors_", RougeTokens::RougeScore),
            ["don", "t", "re", "open", "the", "caf", "s", "2", "door"]
        );
        assert!(words("— … ¿日本? \n", RougeTokens::RougeScore).is_empty());
        // The Kelvin sign is a k when lowered.
        assert_eq!(words("\u{212a}g", RougeTokens::RougeScore), ["kg"]);
    }

    #[test]
    fn overlap_counts_each_word_once() {
        let rouge1 = |a: &str, b: &str| super::rouge1(a, b, RougeTokens::RougeScore);
        assert_eq!(rouge1("a a b", "a c"), 2.0 * (1.0 / 3.0) * 0.5 / (1.0 / 3.0 + 0.5));
        assert_eq!(rouge1("Running dogs", "the dog runs"), 2.0 * 1.0 * (2.0 / 3.0) / (1.0 + 2.0 / 3.0));
        assert_eq!(rouge1("same words", "Same, words!"), 1.0);
        for (a, b) in [("", ""), ("", "a"), ("a", ""), ("!", "!"), ("a", "b")] {
            assert_eq!(rouge1(a, b), 0.0);
        }
    }

    #[test]
    fn words_of_other_scripts_are_seen_on_request() {
        for (text, want) in [
            ("Привет, мир!", vec!["привет", "мир"]),
            ("価格は3円", vec!["価", "格", "は", "3", "円"]),
            ("ราคา", vec!["ร", "า", "ค", "า"]),
            ("नमस्ते दुनिया।", vec!["नमस्ते", "दुनिया"]),
            ("مَرحبا", vec!["مَرحبا"]),
            ("Das Café, running", vec!["das", "café", "run"]),
            ("안녕 세계 2", vec!["안녕", "세계", "2"]),
        ] {
            assert_eq!(words(text, RougeTokens::Unicode), want, "{text}");
            assert_eq!(rouge1(text, text, RougeTokens::Unicode), 1.0);
        }
        for text in ["三", "Привет", "…"] {
            assert!(!has_words(text, RougeTokens::RougeScore), "{text}");
        }
        assert!(has_words("三", RougeTokens::Unicode) && !has_words("…", RougeTokens::Unicode));
        assert_eq!(rouge1("三 apples", "三 apple", RougeTokens::RougeScore), 1.0);
    }
}
