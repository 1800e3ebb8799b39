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

pub(crate) use rouge::has_words;
pub use rouge::rouge1;
pub use stem::stem;

use gradtx_run::config::AnswerForm;

/// What stands before the final answer.
pub(crate) const MARK: &str = "####";
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

/// Two-sided 95 % quantile of Student's t for so many degrees of freedom, at least 1: from a
/// table, and beyond it from the expansion around the normal quantile (Abramowitz and Stegun
/// 26.7.5), whose error is below 0.0001 there.
fn student_t95(freedom: usize) -> f64 {
    const TABLE: [f64; 12] =
        [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179];
    if let Some(&t) = TABLE.get(freedom - 1) {
        return t;
    }
    let (x, n) = (1.959_963_984_540_054_f64, freedom as f64);
    let power = |exponent: i32| x.powi(exponent);
    let terms = [
        (power(3) + x) / 4.0,
        (5.0 * power(5) + 16.0 * power(3) + 3.0 * x) / 96.0,
        (3.0 * power(7) + 19.0 * power(5) + 17.0 * power(3) - 15.0 * x) / 384.0,
        (79.0 * power(9) + 776.0 * power(7) + 1482.0 * power(5) - 1920.0 * power(3) - 945.0 * x) / 92160.0,
    ];
    (1..).zip(terms).map(|(order, term)| term / n.powi(order)).sum::<f64>() + x
}

/// Mean and half the width of the 95 % confidence interval of a mean of few values
/// (Student's t); no interval for fewer than two.
pub fn mean_with_interval(values: &[f64]) -> (f64, Option<f64>) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    if values.len() < 2 {
        return (mean, None);
    }
    let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, Some(student_t95(values.len() - 1) * (variance / n).sqrt()))
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

    /// Published tables of the quantile.
    #[test]
    fn student_t_quantiles_are_right_for_all_counts() {
        for (freedom, want) in [
            (1, 12.706),
            (12, 2.179),
            (13, 2.160),
            (14, 2.145),
            (15, 2.131),
            (19, 2.093),
            (29, 2.045),
            (30, 2.042),
            (39, 2.023),
            (60, 2.000),
            (99, 1.984),
            (120, 1.980),
            (1000, 1.962),
            (1_000_000, 1.960),
        ] {
            let found = student_t95(freedom);
            assert!((found - want).abs() < 6e-4, "{freedom}: {found}, expected {want}");
        }
        assert!((1..2000).all(|freedom| student_t95(freedom) > student_t95(freedom + 1)));
    }

    #[test]
    fn interval_of_four() {
        let (mean, half) = mean_with_interval(&[1.0, 2.0, 3.0, 4.0]);
        assert_eq!(mean, 2.5);
        assert!((half.unwrap() - 3.182 * (5.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-12);
        assert_eq!(mean_with_interval(&[1.0]), (1.0, None));
    }
}
