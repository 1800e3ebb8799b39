//! Multiple-choice questions from the command line: likelihoods of choices, two accuracies, and data that
//! has no choices.

#![allow(clippy::unwrap_used)]

use crate::home::{Home, said};
use gradtx_world::tasks::vocabulary;
use serde_json::{Value, json};
use std::process::Output;

fn evaluate(home: &Home, out: &str, data: &str, more: &[&str]) -> Output {
    let args = ["evaluate", "--model", "llm", "--threads", "1", "--data", data, "--out", out];
    home.stage(&[&args, more].concat())
}

/// A file of OpenBookQA rows: one question with these choices each, of which `right` is right.
fn write(home: &Home, name: &str, choices: &[Vec<&str>], right: usize) {
    let row = |texts: &Vec<&str>| {
        let labels: Vec<String> = (0..texts.len()).map(|i| format!("L{i}")).collect();
        let choices = json!({ "text": texts, "label": labels });
        json!({ "question_stem": "x +", "choices": choices, "answerKey": format!("L{right}") })
    };
    let lines: String = choices.iter().map(|texts| format!("{}\n", row(texts))).collect();
    home.write(name, &lines);
}

fn predictions(home: &Home, out: &str) -> Vec<Value> {
    let text = home.read(&format!("{out}/predictions.jsonl"));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn log_likelihoods(prediction: &Value) -> Vec<f64> {
    let values = prediction["choices"]["log_likelihoods"].as_array().unwrap();
    values.iter().map(|value| value.as_f64().unwrap()).collect()
}

#[test]
fn probabilities_of_all_words_sum_to_one() {
    let home = Home::miniature();
    let words: Vec<&str> = vocabulary().to_vec();
    write(&home, "words.jsonl", &[words.clone(), words.iter().rev().copied().collect()], 3);
    let ended = evaluate(&home, "out", "words.jsonl", &[]);
    assert!(ended.status.success(), "{}", said(&ended));
    assert!(said(&ended).contains("read as open_book_qa"), "{}", said(&ended));
    let found = predictions(&home, "out");
    let [forward, backward] = [0, 1].map(|i| log_likelihoods(&found[i]));
    let sum: f64 = forward.iter().map(|x| x.exp()).sum();
    assert!((sum - 1.0).abs() < 1e-4, "{sum}");
    for (a, b) in forward.iter().zip(backward.iter().rev()) {
        assert!((a - b).abs() < 1e-4, "the order of choices changes nothing: {a} and {b}");
    }
    // Two words are as likely as the first, and the second after it.
    let (first, second) = (words[3], words[4]);
    let both = format!("{first} {second}");
    write(&home, "pairs.jsonl", &[words.iter().map(|_| both.as_str()).collect()], 0);
    let ended = evaluate(&home, "pairs", "pairs.jsonl", &[]);
    assert!(ended.status.success(), "{}", said(&ended));
    assert!(log_likelihoods(&predictions(&home, "pairs")[0])[0] < forward[3]);
}

#[test]
fn accuracies_are_of_the_likeliest_choices() {
    let home = Home::miniature();
    let words: Vec<&str> = vocabulary().to_vec();
    write(&home, "words.jsonl", std::slice::from_ref(&words), 0);
    assert!(evaluate(&home, "words", "words.jsonl", &[]).status.success());
    let found = log_likelihoods(&predictions(&home, "words")[0]);
    let mut order: Vec<usize> = (0..found.len()).collect();
    order.sort_by(|&i, &j| found[j].total_cmp(&found[i]));
    let (best, worst) = (words[order[0]], words[order[found.len() - 1]]);
    // The right choice is the likeliest in two of three rows; a longer text of little likelihood is
    // the likeliest per character.
    let long = [best; 12].join(" ");
    write(&home, "three.jsonl", &[vec![best, worst], vec![worst, best], vec![best, &long]], 0);
    let ended = evaluate(&home, "acc", "three.jsonl", &[]);
    assert!(ended.status.success(), "{}", said(&ended));
    let score = |out: &str| home.json(&format!("{out}/score.json"));
    let acc = score("acc");
    assert_eq!(acc["metric"], "multiple_choice");
    assert_eq!(acc["score"], acc["acc"]);
    assert!((acc["acc"].as_f64().unwrap() - 2.0 / 3.0).abs() < 1e-12, "{acc}");
    assert!(said(&ended).contains("acc 66.7 %"), "{}", said(&ended));
    assert!(
        evaluate(&home, "norm", "three.jsonl", &["--set", "evaluate.metric=multiple_choice_norm"])
            .status
            .success()
    );
    let norm = score("norm");
    assert_eq!((&norm["score"], &norm["acc"]), (&norm["acc_norm"], &acc["acc"]));
}

#[test]
fn data_without_choices_and_long_choices_are_named() {
    let home = Home::miniature();
    let ended = evaluate(&home, "out", "private.jsonl", &["--set", "evaluate.metric=multiple_choice"]);
    assert_eq!(ended.status.code(), Some(1));
    assert!(
        said(&ended).contains("private.jsonl:1") && said(&ended).contains("no choices"),
        "{}",
        said(&ended)
    );
    let long = ["x"; 80].join(" ");
    write(&home, "long.jsonl", &[vec!["x", &long]], 0);
    let ended = evaluate(&home, "out", "long.jsonl", &[]);
    assert_eq!(ended.status.code(), Some(1));
    for wanted in ["long.jsonl:1", "84 tokens", "64 positions"] {
        assert!(said(&ended).contains(wanted), "no `{wanted}` in {}", said(&ended));
    }
}
