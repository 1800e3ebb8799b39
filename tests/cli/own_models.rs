//! docs/own-models.md, run as it stands there: on model
//! directories that transformers wrote, with a trained tokenizer, and on Parquet files that
//! another library wrote.

#![allow(clippy::unwrap_used)]

use crate::home::Home;
use gradtx_tests::{copy_files, fixture};
use serde_json::Value;

const PAGE: &str = include_str!("../../docs/own-models.md");

/// The first block of code in a language.
fn block(language: &str) -> &'static str {
    let begin = format!("```{language}\n");
    PAGE.split_once(begin.as_str()).unwrap().1.split_once("```").unwrap().0
}

impl Home {
    /// What the page's reader has before the first command.
    fn of_page() -> Self {
        let home = Self::empty();
        copy_files(&fixture("qwen2_text/model"), &home.path("models/tiny"));
        copy_files(&fixture("own/llm"), &home.path("models/llm"));
        copy_files(&fixture("own/data"), &home.path("downloads"));
        home.write("run.toml", block("toml"));
        home
    }

    /// Runs a line of the page; what it printed.
    fn line_of_page(&self, line: &str) -> String {
        let mut words = line.split_whitespace();
        assert_eq!(words.next(), Some("gradtx"), "{line}");
        self.ok(&words.collect::<Vec<_>>())
    }
}

#[test]
fn the_commands_work_in_their_order() {
    let home = Home::of_page();
    let lines: Vec<&str> = block("sh").lines().filter(|l| !l.is_empty() && !l.starts_with('#')).collect();
    assert!(lines.len() >= 10, "{lines:?}");
    lines.iter().for_each(|line| drop(home.line_of_page(line)));

    let split = home.json("data/split.json");
    let rows = |name: &str| split["lists"][name].as_array().unwrap().len();
    assert_eq!((rows("public"), rows("private/client-1/train"), rows("private/client-1/test")), (48, 22, 2));
    let scores = ["client", "upgraded", "merged"].map(|name| home.json(&format!("scores/{name}/score.json")));
    let told = scores.each_ref().map(|s| (s["model"].as_str().unwrap(), s["kind"].as_str().unwrap()));
    assert_eq!(told, [("tiny", "finetuned"), ("llm", "translated"), ("llm", "translated")]);
    assert!(scores.iter().all(|s| s["metric"] == "exact_match" && s["examples"] == 2));
    let texts = |name: &str| -> Vec<Value> {
        let text = std::fs::read_to_string(home.path(&format!("scores/{name}/predictions.jsonl"))).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.map(|line| line["prediction"].clone()).collect()
    };
    assert_eq!(texts("upgraded"), texts("merged"), "an adapter and the model it was merged into");
    let page = std::fs::read_to_string(home.path("run/report.html")).unwrap();
    assert!(page.contains("</html>") && !page.contains("apples"), "a page without private data");

    // Again: everything is finished, and nothing changes.
    let sum = |name: &str| gradtx_runtime::artifact::checksum_file(&home.path(name)).unwrap();
    let files =
        ["run/translator/model.safetensors", "upgraded/update.safetensors", "scores/merged/score.json"];
    let before = files.map(sum);
    lines.iter().for_each(|line| drop(home.line_of_page(line)));
    assert_eq!(files.map(sum), before);
}

/// The other way round: a block that does not work must be noticed.
#[test]
fn a_wrong_line_would_be_noticed() {
    let home = Home::of_page();
    let wrong = std::panic::catch_unwind(|| home.line_of_page("gradtx train --run run"));
    assert!(wrong.is_err(), "there are no tuples yet");
}
