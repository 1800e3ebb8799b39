//! Data as people have it, through the command line: which files are taken, what they are read
//! as, and what is refused.

#![allow(clippy::unwrap_used)]

use crate::home::{gradtx, said};
use gradtx_tests::miniature;
use std::path::Path;

/// Models and a run file of the miniature.
fn home() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    miniature::write(dir.path());
    dir
}

/// Runs a command that must end with this code and say these words.
fn ends(dir: &Path, args: &[&str], code: i32, words: &[&str]) -> String {
    let output = gradtx(dir, args);
    let said = said(&output);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{args:?}: no `{word}` in: {said}");
    }
    said
}

fn finetune(dir: &Path, data: &str, out: &str, more: &[&str], code: i32, words: &[&str]) -> String {
    let mut args =
        vec!["finetune", "--run", "run", "--config", "settings.toml", "--data", data, "--out", out];
    args.extend(more);
    ends(dir, &args, code, words)
}

/// Rows as the miniature's models know them.
fn rows(dir: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(dir.join("private.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn write(dir: &Path, name: &str, text: &str) {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn lines(rows: &[serde_json::Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

#[test]
fn a_directory_with_test_rows_gives_its_train_rows() {
    let home = home();
    let dir = home.path();
    let all: String =
        (0..80).map(|i| format!("{{\"prompt\":\"price of {i}?\",\"response\":\"{i} ;\"}}\n")).collect();
    write(dir, "all.jsonl", &all);
    ends(
        dir,
        &["split", "--data", "all.jsonl", "--out", "data", "--clients", "2"],
        0,
        &["80 examples from all.jsonl"],
    );
    let words =
        ["data: 18 examples from train.jsonl (the train split; not test.jsonl), read as pair", "18 examples"];
    finetune(dir, "data/private/client-1", "c", &[], 0, &words);
    let all =
        ["finetune", "--run", "all", "--config", "settings.toml", "--set", "data.split=all", "--out", "both"];
    ends(dir, &[&all[..], &["--data", "data/private/client-1"]].concat(), 0, &["20 examples"]);
    let args =
        ["evaluate", "--run", "run", "--config", "settings.toml", "--model", "tiny", "--out", "e", "--data"];
    ends(
        dir,
        &[&args[..], &["data/private/client-1"]].concat(),
        0,
        &["2 examples from test.jsonl (the test split; not train.jsonl)"],
    );
    // Two clients are two data sets.
    let refused = ["data/private", "client-1", "client-2", "name one of them"];
    finetune(dir, "data/private", "d", &[], 1, &refused);
}

#[test]
fn forms_of_the_same_rows_give_the_same_update() {
    let home = home();
    let dir = home.path();
    let rows = rows(dir);
    let of = |i: usize, name: &str| rows[i][name].as_str().unwrap().to_string();
    let (mut csv, mut pairs, mut chosen) = ("prompt,completion\n".to_string(), vec![], vec![]);
    for i in 0..rows.len() {
        let (question, answer) = (of(i, "question"), of(i, "answer"));
        csv += &format!("\"{question}\",\"{answer}\"\n");
        pairs.push(serde_json::json!({"input": question, "output": answer}));
        chosen.push(serde_json::json!({"prompt": question, "chosen": answer, "rejected": "?"}));
    }
    write(dir, "forms/a.csv", &csv);
    write(dir, "forms/b.jsonl", &lines(&pairs));
    write(dir, "forms/c.jsonl", &lines(&chosen));
    write(
        dir,
        "forms/d.jsonl",
        &lines(&pairs).replace("\"input\"", "\"ask\"").replace("\"output\"", "\"reply\""),
    );
    finetune(dir, "private.jsonl", "o", &[], 0, &["read as pair (question, answer)"]);
    for (name, form) in [
        ("forms/a.csv", "pair (prompt, completion)"),
        ("forms/b.jsonl", "pair (input, output)"),
        ("forms/c.jsonl", "preference (chosen, rejected; only chosen answers)"),
    ] {
        finetune(dir, name, &format!("o-{}", name.replace('/', "-")), &[], 0, &[form]);
    }
    finetune(dir, "forms/d.jsonl", "no", &[], 1, &["d.jsonl:1", "[ask, reply", "data.columns"]);
}

#[test]
fn what_cannot_be_learned_is_refused_and_named() {
    let home = home();
    let dir = home.path();
    for (name, bad, word) in [
        ("empty.jsonl", r#"{"prompt": "a", "response": "  "}"#, "empty.jsonl:2: "),
        ("null.jsonl", r#"{"prompt": "a", "response": null}"#, "null.jsonl:2: "),
        ("nan.jsonl", r#"{"prompt": "a", "response": NaN}"#, "nan.jsonl:2: "),
        ("tool.jsonl", r#"{"messages": [{"role": "tool", "content": "x"}]}"#, "role `tool`"),
        ("cut.jsonl", r#"{"prompt": "a", "respo"#, "cut.jsonl:2: "),
    ] {
        let good = "{\"prompt\": \"a\", \"response\": \"b\"}\n";
        write(dir, name, &format!("{good}{bad}\n{}", good.repeat(20)));
        ends(dir, &["split", "--data", name, "--out", "o"], 1, &[name, word, "data.on_error"]);
    }
    let table = "prompt,completion,label\np,c,true\nq,d,false\nr,e,true\ns,f,true\n";
    write(dir, "kto.csv", table);
    let words = ["3 examples", "1 rows with disliked answers are left out"];
    let args = [
        "split",
        "--data",
        "kto.csv",
        "--out",
        "kto",
        "--public-fraction",
        "0.34",
        "--train-fraction",
        "0.5",
    ];
    ends(dir, &args, 0, &words);
    write(dir, "numbers.csv", &table.replace("true", "1").replace("false", "0"));
    ends(dir, &["split", "--data", "numbers.csv", "--out", "n"], 1, &["`label`", "data.columns.label"]);
    ends(
        dir,
        &["split", "--data", "kto.csv", "--out", "n", "--set", "train.learning_rate=1"],
        2,
        &["only settings of [data]"],
    );
}

#[test]
fn duplicates_stay_on_one_side() {
    let home = home();
    let dir = home.path();
    let row = |i: usize| format!("{{\"prompt\": \"p{}\", \"response\": \"r{}\"}}\n", i % 30, i % 30);
    write(dir, "d.jsonl", &(0..60).map(row).collect::<String>());
    ends(
        dir,
        &["split", "--data", "d.jsonl", "--out", "s", "--clients", "2"],
        0,
        &["30 rows are exact duplicates"],
    );
    let split = gradtx_runtime::data::split::Split::read(&dir.join("s/split.json")).unwrap();
    assert_eq!((split.rows, split.duplicates), (60, 30));
    for list in split.lists.values() {
        assert!(list.iter().all(|row| list.contains(&((row + 30) % 60))));
    }
    let same = "{\"question\": \"What is the capital of France?\", \"answer\": \"Paris\"}\n";
    write(dir, "same.jsonl", &same.repeat(10));
    ends(
        dir,
        &["split", "--data", "same.jsonl", "--out", "t"],
        1,
        &["the 10 rows of the data are 1 different ones"],
    );
    // Without duplicates, nothing is written about them.
    write(dir, "u.jsonl", &(0..30).map(row).collect::<String>());
    ends(dir, &["split", "--data", "u.jsonl", "--out", "u"], 0, &[]);
    assert!(!std::fs::read_to_string(dir.join("u/split.json")).unwrap().contains("duplicates"));
}

#[test]
fn inspect_says_what_a_file_of_data_is() {
    let home = home();
    let dir = home.path();
    write(dir, "d.csv", "prompt,response,secret\nhidden words,b,c\n");
    let words = ["file of data", "prompt, response, secret", "pair (prompt, response)"];
    let said = ends(dir, &["inspect", "d.csv"], 0, &words);
    assert!(!said.contains("hidden"), "{said}");
    write(dir, "bad.jsonl", "{\"prompt\": \"hidden words\", \"response\": \"\"}\n");
    let said = ends(dir, &["inspect", "bad.jsonl"], 1, &["bad.jsonl:1", "empty"]);
    assert!(!said.contains("hidden"), "{said}");
}
