//! Exact match, ROUGE-1 and stems against the reference metrics.

use gradtx_pipeline::score::{exact_match, rouge1 as rouge1_of, stem};
use gradtx_run::config::{AnswerForm, RougeTokens};
use gradtx_tests::fixture;
use serde_json::Value;

const TOLERANCE: f64 = 1e-12;

/// The places of the cases that an implementation gets wrong, for exact match and for ROUGE-1.
fn wrong(
    is_match: impl Fn(&str, &str) -> bool,
    overlap: impl Fn(&str, &str) -> f64,
) -> (Vec<usize>, Vec<usize>) {
    let text = std::fs::read_to_string(fixture("metrics/cases.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert!(cases.len() >= 300, "{} cases", cases.len());
    let (mut matches, mut overlaps) = (vec![], vec![]);
    for (i, case) in cases.iter().enumerate() {
        let (prediction, reference) =
            (case["prediction"].as_str().unwrap(), case["reference"].as_str().unwrap());
        if is_match(prediction, reference) != case["exact_match"].as_bool().unwrap() {
            matches.push(i);
        }
        let difference = (overlap(prediction, reference) - case["rouge1"].as_f64().unwrap()).abs();
        // So written that a difference that is not a number is too large.
        let near = difference <= TOLERANCE;
        if !near {
            overlaps.push(i);
        }
    }
    (matches, overlaps)
}

fn by_program(prediction: &str, reference: &str) -> bool {
    exact_match(prediction, reference, AnswerForm::AfterHashes)
}

fn rouge1(prediction: &str, reference: &str) -> f64 {
    rouge1_of(prediction, reference, RougeTokens::RougeScore)
}

#[test]
fn every_case_is_scored_as_the_references_score_it() {
    assert_eq!(wrong(by_program, rouge1), (vec![], vec![]));
}

/// Implementations that leave out one rule each fail.
#[test]
fn control_the_cases_find_what_is_left_out() {
    let nan = |_: &str, _: &str| f64::NAN;
    assert!(wrong(by_program, nan).1.len() >= 300, "a result that is not a number never passes");
    let with_case = |a: &str, b: &str| {
        let after = |text: &str| text.rsplit("####").next().unwrap().trim().to_string();
        after(a) == after(b)
    };
    let unstemmed = |a: &str, b: &str| rouge1(&a.replace("ing", "ung"), b);
    let (matches, overlaps) = wrong(with_case, unstemmed);
    assert!(matches.len() > 20 && overlaps.len() > 20, "{} and {}", matches.len(), overlaps.len());
}

#[test]
fn every_stem_is_that_of_the_reference() {
    let text = std::fs::read_to_string(fixture("metrics/stems.txt")).unwrap();
    let pairs: Vec<(&str, &str)> = text.lines().filter_map(|line| line.split_once(' ')).collect();
    assert!(pairs.len() > 5000, "{} words", pairs.len());
    let wrong: Vec<_> = pairs.iter().filter(|(word, want)| stem(word) != *want).collect();
    assert!(wrong.is_empty(), "{} of {}: {:?}", wrong.len(), pairs.len(), &wrong[..wrong.len().min(20)]);
    // Control: words are not their own stems.
    assert!(pairs.iter().filter(|(word, want)| word != want).count() > 2000);
}
