//! From a generated text to right or wrong.
//!
//! Two forms of answers. [`AnswerForm::AfterHashes`]: the text after the last `####` (all
//! of it where there is none), trimmed, one final full stop removed; two answers are
//! equal as numbers when both are numbers (`,`, `$` and `%` may be in them), within a
//! relative 1e-4, and otherwise as texts without regard to case. [`AnswerForm::Whole`]:
//! the trimmed texts are equal.

use crate::config::AnswerForm;

/// Numbers this close, relative to the reference, are equal.
const RELATIVE_TOLERANCE: f64 = 1e-4;

/// The answer in a text.
pub fn answer(text: &str, form: AnswerForm) -> &str {
    match form {
        AnswerForm::Whole => text.trim(),
        AnswerForm::AfterHashes => {
            let last = text.rsplit("####").next().unwrap_or(text).trim();
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
        (Some(a), Some(b)) => (a - b).abs() <= RELATIVE_TOLERANCE * b.abs(),
        _ => found.to_lowercase() == wanted.to_lowercase(),
    }
}

fn number(text: &str) -> Option<f64> {
    let plain: String = text.chars().filter(|c| !matches!(c, ',' | '$' | '%')).collect();
    plain.trim().parse::<f64>().ok().filter(|x| x.is_finite())
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
        assert!(same("####", "#### "));
        assert!(!same("#### 4.1", "#### 4"));
        assert!(!same("#### 4 apples", "#### 4"));
        assert!(!same("", "#### 4"));
        assert!(!same("#### nan", "#### 1"));
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
