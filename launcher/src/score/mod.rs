//! From a generated text to a number: exact match and ROUGE-1.
//!
//! In: a prediction and a reference. Out: right or wrong ([`exact_match`]), and a number
//! from 0 to 1 ([`rouge1`]).
//!
//! Which part of a text is the answer: with [`AnswerForm::AfterHashes`] what follows the
//! last `####` (all of it where there is none), trimmed, one final full stop removed;
//! two answers are equal as numbers when both are numbers, and otherwise as texts without
//! regard to case. With [`AnswerForm::Whole`] the trimmed texts are equal.
//!
//! * rouge: words of a text, and their overlap.
//! * stem: the stems of words.

mod rouge;
mod stem;

pub use rouge::rouge1;
pub use stem::stem;

use crate::config::AnswerForm;

/// What stands before the final answer.
const MARK: &str = "####";
/// Numbers this close, relative to the larger one, are equal.
const RELATIVE_TOLERANCE: f64 = 1e-4;

/// The answer in a text.
pub fn answer(text: &str, form: AnswerForm) -> &str {
    match form {
        AnswerForm::Whole => trim(text),
        AnswerForm::AfterHashes => {
            let last = trim(text.rfind(MARK).map_or(text, |at| &text[at + MARK.len()..]));
            last.strip_suffix('.').unwrap_or(last)
        }
    }
}

/// True if a prediction's answer is the reference's.
pub fn exact_match(prediction: &str, reference: &str, form: AnswerForm) -> bool {
    let (found, wanted) = (answer(prediction, form), answer(reference, form));
    if form == AnswerForm::Whole {
        return found == wanted;
    }
    match (number(found), number(wanted)) {
        (Some(a), Some(b)) => (a - b).abs() <= RELATIVE_TOLERANCE * a.abs().max(b.abs()),
        _ => found.to_lowercase() == wanted.to_lowercase(),
    }
}

/// The number that a text is, once `,`, `$` and `%` are taken out of it wherever they
/// stand: `1,234`, `$5`, `50%` (which is 50), `-3`, `+.5`, `5.`, `1e5`.
///
/// Digits are 0 to 9. Words such as `inf` and `nan`, numbers too large for a double, and
/// forms of programming languages (`1_000`, `0x10`) are texts: they equal themselves.
fn number(text: &str) -> Option<f64> {
    let plain: String = text.chars().filter(|c| !matches!(c, ',' | '$' | '%')).collect();
    let plain = trim(&plain);
    let of_a_number = |c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.' | 'e' | 'E');
    if !plain.chars().all(of_a_number) {
        return None;
    }
    plain.parse::<f64>().ok().filter(|x| x.is_finite())
}

/// Without white space at both ends, of which the four ASCII separators are a part, as in
/// the graders that scores are compared with.
fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

/// Mean and half the width of the 95 % confidence interval of a mean of few values
/// (Student's t); no interval for fewer than two.
pub fn mean_with_interval(values: &[f64]) -> (f64, Option<f64>) {
    /// Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom.
    const T95: [f64; 12] =
        [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179];
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    if values.len() < 2 {
        return (mean, None);
    }
    let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let t = T95.get(values.len() - 2).copied().unwrap_or(1.96);
    (mean, Some(t * (variance / n).sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_after_hashes() {
        let same = |a, b| exact_match(a, b, AnswerForm::AfterHashes);
        assert!(same("so 2+2=4\n#### 4", "#### 4.0"));
        assert!(same("#### 3 #### $1,234.", "#### 1234"));
        assert!(same("#### b", "#### B"));
        assert!(same("#### 50%", "#### 50"));
        assert!(same("x #####5", "5"));
        assert!(same("12,34", "1234.1") && same("1234.1", "12,34") && !same("1234.2", "1234"));
        assert!(same("-0", "0") && !same("0.00001", "0"));
        assert!(same("####", "#### "));
        assert!(!same("#### 4.1", "#### 4"));
        assert!(!same("#### 4 apples", "#### 4"));
        assert!(!same("", "#### 4"));
        assert!(!same("#### nan", "#### 1"));
        assert!(same("#### NaN", "#### nan") && same("1e999", "1E999") && !same("1e999", "inf"));
        assert!(!same("#### 1_000", "#### 1000"));
        assert!(!same("#### B..", "b"));
    }

    #[test]
    fn whole_texts() {
        assert!(exact_match(" ( a b ! ;\n", "( a b ! ;", AnswerForm::Whole));
        assert!(!exact_match("( A b ! ;", "( a b ! ;", AnswerForm::Whole));
        assert!(!exact_match("4.0", "4", AnswerForm::Whole));
    }

    #[test]
    fn interval_of_four() {
        let (mean, half) = mean_with_interval(&[1.0, 2.0, 3.0, 4.0]);
        assert_eq!(mean, 2.5);
        assert!((half.unwrap() - 3.182 * (5.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-12);
        assert_eq!(mean_with_interval(&[1.0]), (1.0, None));
    }
}
