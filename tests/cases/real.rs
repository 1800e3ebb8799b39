//! Files as people have them: data, adapters, templates. What is the same data in another form
//! gives the same update, byte by byte.

use crate::common::{Case, kept, same_update};
use gradtx_tests::copy_files;
use serde_json::{Value, json};

/// A case with a kept file in it, and a model that its longest example fits.
fn with(name: &str) -> Case {
    let case = Case::new();
    case.edit("base/config.json", |c| c["max_position_embeddings"] = json!(2048));
    case.write("run.toml", case.read("run.toml").replace("max_length = 256", "max_length = 2048"));
    case.write(name, std::fs::read(kept(name)).unwrap());
    case
}

/// The rows of a kept file of JSON lines, as prompt and response by these columns.
fn pairs(name: &str, prompt: &str, response: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(kept(name)).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.map(|row| json!({ "prompt": row[prompt], "response": row[response] })).collect()
}

/// What the kept file gives is what these rows give.
fn same_as(case: &Case, name: &str, rows: &[Value]) {
    case.rows("same.jsonl", rows);
    let [found, same] = [name, "same.jsonl"].map(|data| case.learnt(data, rows.len(), &[]));
    assert!(same_update(&found, &same), "{name}");
}

#[test]
fn alpaca() {
    let case = with("alpaca.jsonl");
    case.finetune("alpaca.jsonl", "c", &["--set", "finetune.tiny.max_steps=1"]).well().says(&["2 examples"]);
    case.write("one.jsonl", case.bytes("alpaca.jsonl"));
    case.evaluate("e", &[]).well();
    let text = case.read("e/predictions.jsonl");
    assert!(text.contains("#### 18") && text.contains("#### 3"), "the column `output` is the answer: {text}");
}

/// The kept file was cut within a quoted answer: one row, or an error that says so.
#[test]
fn gsm8k_as_csv() {
    let case = with("gsm.csv");
    let end = case.finetune("gsm.csv", "c", &["--set", "finetune.tiny.max_steps=1"]).ended();
    if end.code == Some(0) {
        end.says(&["1 example"])
    } else {
        end.says(&["gsm.csv", "quote|line|row"])
    };
    // Whole rows of the same data.
    let rows = pairs("alpaca.jsonl", "input", "output");
    let rows: Vec<Value> =
        rows.iter().map(|r| json!({ "question": r["prompt"], "answer": r["response"] })).collect();
    let quoted = |text: &Value| format!("\"{}\"", text.as_str().unwrap().replace('"', "\"\""));
    let lines: String =
        rows.iter().map(|r| format!("{},{}\r\n", quoted(&r["question"]), quoted(&r["answer"]))).collect();
    case.write("whole.csv", format!("question,answer\r\n{lines}"));
    case.finetune("whole.csv", "d", &["--set", "finetune.tiny.max_steps=1"])
        .well()
        .says(&["2 examples", "gsm8k"]);
    same_as(&case, "whole.csv", &rows);
}

/// Not a number, in a column that nobody uses.
#[test]
fn nan_in_another_column() {
    let case = with("nan.jsonl");
    same_as(&case, "nan.jsonl", &pairs("prompt_completion.jsonl", "prompt", "completion"));
}

#[test]
fn a_response_that_is_null() {
    let case = with("null_response.jsonl");
    let few = ["--set", "finetune.tiny.max_steps=1"];
    case.finetune("null_response.jsonl", "c", &few).refused().says(&["null_response.jsonl:8|line 8"]);
    let skip = [&few[..], &["--set", "data.on_error=skip"]].concat();
    case.finetune("null_response.jsonl", "d", &skip)
        .well()
        .says(&["9 examples", "1 row|1 of 10|1 skipped|skipped 1"]);
}

#[test]
fn several_answers_in_one_chat() {
    let case = with("openai_messages_multi.jsonl");
    let last = case.learnt("openai_messages_multi.jsonl", 3, &[]);
    case.write("all.jsonl", case.bytes("openai_messages_multi.jsonl"));
    let all = case.learnt("all.jsonl", 3, &["--set", "data.train_on=all"]);
    assert!(!same_update(&last, &all), "one answer or all of them");
}

#[test]
fn content_in_parts() {
    let case = with("openai_parts.jsonl");
    same_as(&case, "openai_parts.jsonl", &pairs("prompt_completion.jsonl", "prompt", "completion"));
}

#[test]
fn prompt_and_completion() {
    let case = with("prompt_completion.jsonl");
    same_as(&case, "prompt_completion.jsonl", &pairs("prompt_completion.jsonl", "prompt", "completion"));
}

#[test]
fn sharegpt() {
    let case = with("sharegpt.json");
    same_as(&case, "sharegpt.json", &pairs("prompt_completion.jsonl", "prompt", "completion"));
}

#[test]
fn seven() {
    let case = with("seven.jsonl");
    case.finetune("seven.jsonl", "c", &["--set", "finetune.tiny.max_steps=1"]).well().says(&["8 examples"]);
}

/// Questions and answers of one's own are not GSM8K, and get no instruction.
#[test]
fn questions_of_one_s_own() {
    let case = with("user_qa.jsonl");
    let end = case.finetune("user_qa.jsonl", "c", &["--set", "finetune.tiny.max_steps=1"]).well();
    assert!(!end.has("gsm8k"), "{end:#?}");
    same_as(&case, "user_qa.jsonl", &pairs("user_qa.jsonl", "question", "answer"));
}

#[test]
fn a_pointer_in_the_place_of_weights() {
    let case = with("lfs-pointer.safetensors");
    case.run("inspect lfs-pointer.safetensors").refused().says(&["LFS", "lfs-pointer.safetensors"]);
}

#[test]
fn adapter_of_peft_0_21() {
    let case = Case::empty();
    copy_files(&kept("peft-0.21.2-qv"), &case.path("adapter"));
    case.run("inspect adapter").well().says(&["q_proj", "v_proj"]);
}

/// ChatML's markers are ordinary text for this tokenizer: refused before hours are spent, by every
/// command that has both at hand.
#[test]
fn chatml_without_its_tokens() {
    let case = Case::smoke();
    let models = ["world/tiny", "world/llm"];
    let settings = std::fs::read_to_string(kept("llama-chatml.toml")).unwrap();
    let settings = settings
        .replacen("MODEL-WITH-LLAMA3-TOKENIZER", models[0], 1)
        .replacen("MODEL-WITH-LLAMA3-TOKENIZER", models[1], 1)
        .replace("real/o/split_gsm8k_test.jsonl/public.jsonl", "world/public");
    case.write("a/run.toml", settings);
    let data = "a/world/private/client-1/train.jsonl";
    for line in [
        format!("finetune --run r --config a/run.toml --data {data} --out c"),
        format!("evaluate --run r --config a/run.toml --data {data} --out e --model tiny"),
        "curate --run r --config a/run.toml".into(),
    ] {
        case.run(&line).refused().says(&["im_end", "chatml", "data.prompt"]);
        assert!(!case.path("c/update.safetensors").exists() && !case.path("e/score.json").exists(), "{line}");
    }
    let end = case.run("doctor --run a/run.toml").says(&["im_end"]);
    assert_eq!(end.code, Some(1), "{end:#?}");
}

#[test]
fn a_kept_template_with_a_date() {
    let case = Case::new();
    case.write("base/chat_template.jinja", std::fs::read(kept("template-strftime.jinja")).unwrap());
    let end = case.evaluate("e", &["--set", "data.prompt=template"]).well();
    assert!(end.has("date"), "that the prompt has a date is said: {end:#?}");
}
