//! What data are taken for, and the forms in which people have them.

use crate::common::{Case, same_update};
use serde_json::{Value, json};
use std::collections::HashSet;

const FEW: [&str; 2] = ["--set", "finetune.tiny.max_steps=2"];

fn pairs(count: usize) -> Vec<Value> {
    (0..count).map(|i| json!({ "prompt": format!("price of {i}?"), "response": format!("{i}.50") })).collect()
}

/// Rows with the same content under other names, or in another form.
fn same(form: &str, file: &str, content: impl AsRef<[u8]>, more: &[&str]) {
    let case = Case::new();
    case.rows("pairs.jsonl", &pairs(4));
    case.write(file, content);
    let (found, same) = (case.learnt(file, 4, more), case.learnt("pairs.jsonl", 4, &[]));
    assert!(same_update(&found, &same), "{form}");
}

fn lines(rows: impl Iterator<Item = Value>) -> String {
    rows.map(|row| format!("{row}\n")).collect()
}

fn renamed(prompt: &str, response: &str) -> String {
    lines(pairs(4).into_iter().map(|row| json!({ prompt: row["prompt"], response: row["response"] })))
}

fn refused(content: impl AsRef<[u8]>, words: &[&str]) {
    let case = Case::new();
    case.write("rows.jsonl", content);
    case.finetune("rows.jsonl", "c", &FEW).refused().says(&["rows.jsonl"]).says(words);
    assert!(!case.path("c/update.safetensors").exists());
}

// What it is taken for.

#[test]
fn questions_with_numbers_are_not_gsm8k() {
    same("question, answer", "rows.jsonl", renamed("question", "answer"), &[]);
}

#[test]
fn gsm8k_is_still_known() {
    let case = Case::new();
    let rows: Vec<Value> = (0..4)
        .map(|i| json!({ "question": format!("{i} + 1?"), "answer": format!("one more\n#### {}", i + 1) }))
        .collect();
    case.rows("rows.jsonl", &rows);
    case.finetune("rows.jsonl", "c", &FEW).well().says(&["gsm8k"]);
    let published = case.learnt("rows.jsonl", 4, &[]);
    case.write("same.jsonl", case.bytes("rows.jsonl"));
    let none = case.learnt("same.jsonl", 4, &["--set", "data.instruction=none"]);
    assert!(!same_update(&published, &none), "the published instruction was put in");
}

/// Two splits in one directory, in the layouts of the hub.
#[test]
fn directories_with_several_splits() {
    let layouts = [
        ("train.jsonl", "validation.jsonl"),
        ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"),
        ("data/train.jsonl", "data/test.jsonl"),
    ];
    for (train, other) in layouts {
        let case = Case::new();
        case.rows(&format!("d/{train}"), &pairs(6));
        case.rows(&format!("d/{other}"), &pairs(9)[6..]);
        let end = case.finetune("d", "c", &FEW);
        if end.code == Some(0) {
            end.says(&["6 examples"]);
            let found = case.learnt("d", 6, &[]);
            assert!(same_update(&found, &case.learnt(&format!("d/{train}"), 6, &[])), "{train}");
        } else {
            end.refused().says(&[train, other]);
        }
    }
}

#[test]
fn evaluate_takes_the_test_rows() {
    let case = Case::new();
    case.rows("d/train.jsonl", &pairs(6));
    case.rows("d/test.jsonl", &pairs(9)[6..]);
    let end = case.run("evaluate --run r --config run.toml --model tiny --data d --out e");
    if end.code == Some(0) {
        assert_eq!(case.json("e/score.json")["examples"], 3);
    } else {
        end.refused().says(&["train.jsonl", "test.jsonl"]);
    }
}

#[test]
fn answers_of_nothing_are_refused() {
    for nothing in ["", "   ", "\n\t"] {
        let mut rows = pairs(4);
        rows[2]["response"] = json!(nothing);
        refused(lines(rows.clone().into_iter()), &["rows.jsonl:3|line 3", "empty"]);
        rows.remove(2);
        let without = lines(rows.into_iter());
        let mut rows = pairs(4);
        rows[2]["response"] = json!(nothing);
        let case = Case::new();
        case.write("without.jsonl", without);
        case.rows("rows.jsonl", &rows);
        let skipped = case.learnt("rows.jsonl", 3, &["--set", "data.on_error=skip"]);
        assert!(same_update(&skipped, &case.learnt("without.jsonl", 3, &[])));
    }
}

#[test]
fn most_rows_are_not_skipped() {
    let mut rows = pairs(4);
    rows[..3].iter_mut().for_each(|row| row["response"] = json!(""));
    let case = Case::new();
    case.rows("rows.jsonl", &rows);
    case.finetune("rows.jsonl", "c", &["--set", "data.on_error=skip"])
        .refused()
        .says(&["rows.jsonl", "3 of 4|3 rows"]);
}

/// Rows that are there several times are on one side of a split.
#[test]
fn duplicates_are_on_one_side() {
    let case = Case::new();
    let rows: Vec<Value> = (0..80).map(|i| pairs(40)[i % 40].clone()).collect();
    case.rows("all.jsonl", &rows);
    case.run("split --data all.jsonl --out s --clients 2").well().says(&["duplicate|equal|identical|same"]);
    let mut seen: HashSet<String> = HashSet::new();
    let mut total = 0;
    for name in [
        "public.jsonl",
        "private/client-1/train.jsonl",
        "private/client-1/test.jsonl",
        "private/client-2/train.jsonl",
        "private/client-2/test.jsonl",
    ] {
        let text = case.read(&format!("s/{name}"));
        total += text.lines().count();
        let here: HashSet<String> = text.lines().map(Into::into).collect();
        assert!(here.is_disjoint(&seen), "{name} has rows of another list");
        seen.extend(here);
    }
    assert_eq!(total, 80, "no row is lost");
}

#[test]
fn of_two_answers_the_chosen_one_is_trained_on() {
    let rows = pairs(4)
        .into_iter()
        .map(|row| json!({ "prompt": row["prompt"], "chosen": row["response"], "rejected": "no idea" }));
    same("chosen, rejected", "rows.jsonl", lines(rows), &[]);
}

/// Answers that people disliked are not trained on as if they were liked.
#[test]
fn disliked_answers_are_not_trained_on() {
    let case = Case::new();
    let row = |i: usize, liked: bool| json!({ "prompt": format!("price of {i}?"), "completion": format!("{i}"), "label": liked });
    case.rows("rows.jsonl", &[row(0, true), row(1, false), row(2, true)]);
    case.rows(
        "liked.jsonl",
        &[0, 2].map(|i| json!({ "prompt": format!("price of {i}?"), "response": format!("{i}") })),
    );
    let end = case.finetune("rows.jsonl", "c", &FEW);
    if end.code == Some(0) {
        assert!(same_update(&case.learnt("rows.jsonl", 2, &[]), &case.learnt("liked.jsonl", 2, &[])));
    } else {
        end.refused().says(&["label"]);
    }
}

#[test]
fn instructions_are_a_setting() {
    let case = Case::new();
    case.rows("rows.jsonl", &[json!({ "question": "1 + 1?", "answer": "two\n#### 2" })]);
    case.write("same.jsonl", case.bytes("rows.jsonl"));
    let own = case.learnt("rows.jsonl", 1, &["--set", "data.instruction=Answer briefly."]);
    let none = case.learnt("same.jsonl", 1, &["--set", "data.instruction=none"]);
    assert!(!same_update(&own, &none));
}

// Forms.

#[test]
fn names_of_columns() {
    for (prompt, response) in
        [("prompt", "completion"), ("input", "output"), ("query", "response"), ("question", "response")]
    {
        same(prompt, "rows.jsonl", renamed(prompt, response), &[]);
    }
}

#[test]
fn columns_of_one_s_own() {
    let more = ["--set", "data.columns.prompt=frage", "--set", "data.columns.response=antwort"];
    same("own columns", "rows.jsonl", renamed("frage", "antwort"), &more);
    let case = Case::new();
    case.write("rows.jsonl", renamed("frage", "antwort"));
    case.finetune("rows.jsonl", "c", &FEW).refused().says(&["frage", "antwort", "data.columns|data.format"]);
    case.finetune(
        "rows.jsonl",
        "d",
        &["--set", "data.columns.prompt=frag", "--set", "data.columns.response=antwort"],
    )
    .refused()
    .says(&["frag", "frage"]);
}

fn table(separator: char, end: &str) -> String {
    let rows = pairs(4).into_iter().map(|row| {
        format!(
            "{}{separator}{}{separator}\"a {separator} \"\"b\"\"{end}c\"{end}",
            row["prompt"].as_str().unwrap(),
            row["response"].as_str().unwrap()
        )
    });
    format!("prompt{separator}response{separator}note{end}{}", rows.collect::<String>())
}

#[test]
fn tables_of_text() {
    same("CSV", "rows.csv", table(',', "\n"), &[]);
    same("CSV with a byte-order mark and CRLF", "rows.csv", format!("\u{feff}{}", table(',', "\r\n")), &[]);
    same("TSV", "rows.tsv", table('\t', "\n"), &[]);
}

#[test]
fn a_ragged_table_is_refused_with_its_line() {
    let case = Case::new();
    case.write("rows.csv", "prompt,response\na,b\nc,d,e\n");
    case.finetune("rows.csv", "c", &FEW).refused().says(&["rows.csv", "line 3|:3|row 2"]);
}

/// Compressed files were made by gzip and zstd from the four rows.
#[test]
fn compressed_files() {
    let kept = |name: &str| std::fs::read(crate::common::kept(name)).unwrap();
    same("gzip", "rows.jsonl.gz", kept("pairs.jsonl.gz"), &[]);
    same("zstd", "rows.jsonl.zst", kept("pairs.jsonl.zst"), &[]);
    same("CSV in gzip", "rows.csv.gz", kept("pairs.csv.gz"), &[]);
}

#[test]
fn a_damaged_gzip_file_is_refused() {
    let bytes = std::fs::read(crate::common::kept("pairs.jsonl.gz")).unwrap();
    let case = Case::new();
    case.write("rows.jsonl.gz", &bytes[..bytes.len() - 12]);
    case.finetune("rows.jsonl.gz", "c", &FEW).refused().says(&["rows.jsonl.gz"]);
}

#[test]
fn other_wrappings_of_rows() {
    let array = Value::Array(pairs(4));
    same("an array", "rows.json", array.to_string(), &[]);
    same("an envelope", "rows.json", json!({ "version": 1, "data": array }).to_string(), &[]);
    same("CRLF", "rows.jsonl", lines(pairs(4).into_iter()).replace('\n', "\r\n"), &[]);
    same("a byte-order mark", "rows.jsonl", format!("\u{feff}{}", lines(pairs(4).into_iter())), &[]);
    same("no last newline", "rows.jsonl", lines(pairs(4).into_iter()).trim_end(), &[]);
}

#[test]
fn chats() {
    let chat = |row: Value| json!({ "messages": [{ "role": "user", "content": row["prompt"], "name": null }, { "role": "assistant", "content": row["response"], "tool_calls": null }] });
    same("messages", "rows.jsonl", lines(pairs(4).into_iter().map(chat)), &[]);
    let share = |row: Value| json!({ "conversations": [{ "from": "user", "value": row["prompt"] }, { "from": "assistant", "value": row["response"] }] });
    same("conversations", "rows.jsonl", lines(pairs(4).into_iter().map(share)), &[]);
    let split = |row: Value| json!({ "prompt": [{ "role": "user", "content": row["prompt"] }], "completion": [{ "role": "assistant", "content": row["response"] }] });
    same("prompt and completion as messages", "rows.jsonl", lines(pairs(4).into_iter().map(split)), &[]);
}

#[test]
fn parts_that_are_no_text_are_refused() {
    let chat = json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "image_url": { "url": "x" } }] }, { "role": "assistant", "content": "b" }] });
    refused(format!("{chat}\n"), &["image", "rows.jsonl:1|line 1"]);
}

#[test]
fn columns_that_are_not_used_may_hold_anything() {
    let rows: String = pairs(4).into_iter().map(|row| format!("{{\"prompt\": {}, \"response\": {}, \"x\": [NaN, Infinity, -Infinity], \"y\": \"\\ud83d\"}}\n", row["prompt"], row["response"])).collect();
    same("odd columns", "rows.jsonl", rows, &[]);
}

#[test]
fn columns_that_are_used_may_not() {
    refused(
        "{\"prompt\": \"a\", \"response\": \"b\"}\n{\"prompt\": \"a\", \"response\": NaN}\n",
        &["rows.jsonl:2|line 2"],
    );
    refused(
        "{\"prompt\": \"a\", \"response\": \"b\"}\n{\"prompt\": \"\\ud83d\", \"response\": \"b\"}\n",
        &["rows.jsonl:2|line 2"],
    );
    refused(
        "{\"prompt\": \"a\", \"response\": \"b\"}\n{\"prompt\": \"a\", \"response\": [1]}\n",
        &["rows.jsonl:2|line 2"],
    );
}

#[test]
fn files_in_other_encodings_are_named() {
    let utf16: Vec<u8> = format!("\u{feff}{}", lines(pairs(2).into_iter()))
        .encode_utf16()
        .flat_map(u16::to_le_bytes)
        .collect();
    refused(utf16, &["UTF-16", "iconv"]);
    refused(format!("{:#}\n", pairs(1)[0]), &["line"]);
    refused("", &["empty"]);
}

/// A directory of a hub has more than data in it.
#[test]
fn directories_with_other_files() {
    let case = Case::new();
    case.rows("d/train.jsonl", &pairs(4));
    for name in ["README.md", "LICENSE", ".gitattributes", ".cache/x.json", "dataset_infos.json"] {
        case.write(&format!("d/{name}"), "{}");
    }
    assert!(same_update(&case.learnt("d", 4, &[]), &case.learnt("d/train.jsonl", 4, &[])));
}

/// What `datasets` leaves on a disk is read, or there is a way out.
#[test]
fn arrow_files_are_read_or_there_is_a_way_out() {
    let case = Case::new();
    case.write("d/dataset_info.json", "{\"features\": {}}");
    case.write("d/state.json", "{\"_data_files\": [{\"filename\": \"data-00000-of-00001.arrow\"}]}");
    case.write("d/data-00000-of-00001.arrow", b"\xff\xff\xff\xff\x08\x00\x00\x00garbage!");
    case.finetune("d", "c", &FEW).refused().says(&["arrow"]);
}

#[test]
fn inspect_knows_data_files_and_keeps_their_content() {
    let case = Case::new();
    case.rows("rows.jsonl", &pairs(4));
    let end = case.run("inspect rows.jsonl").well().says(&["4", "prompt", "response"]);
    assert!(!end.has("price of 1"), "{end:#?}");
}
