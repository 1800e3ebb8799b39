//! Looking at data before, and using the result after: preview, generate, convert, diff, model cards,
//! and what a training writes to be watched by.

#![allow(clippy::unwrap_used)]

use crate::home::{PROGRAM, gradtx};
use gradtx_tests::{copy_files, fixture, miniature};
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The miniature with a client's update and adapter of the TinyLM, made once; nobody changes it.
fn made() -> &'static Path {
    static MADE: OnceLock<tempfile::TempDir> = OnceLock::new();
    MADE.get_or_init(|| {
        let home = tempfile::tempdir().unwrap();
        miniature::write(home.path());
        let run = ["--run", "run", "--config", "settings.toml"];
        for more in [
            &["finetune", "--data", "private.jsonl", "--out", "client", "--save-adapter"][..],
            &["finetune", "--data", "public.jsonl", "--out", "other", "--save-adapter"],
            &["finetune", "--data", "private.jsonl", "--out", "large", "--save-adapter", "--model", "llm"],
            &["curate"],
        ] {
            done(home.path(), &[&more[..1], &run, &more[1..]].concat());
        }
        home
    })
    .path()
}

#[track_caller]
fn done(dir: &Path, args: &[&str]) -> String {
    let output = gradtx(dir, args);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The result of a command with `--json`.
#[track_caller]
fn result(dir: &Path, args: &[&str]) -> Value {
    let out = done(dir, &[args, &["--json"]].concat());
    let mut events = out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    events.rfind(|event| event["event"] == "result").unwrap_or_else(|| panic!("no result in {out}"))
}

#[track_caller]
fn fails(dir: &Path, args: &[&str], words: &[&str]) {
    let output = gradtx(dir, args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(matches!(output.status.code(), Some(1..=3)), "{args:?}: {:?} {said}", output.status);
    for word in words {
        assert!(said.contains(word), "{args:?}: no `{word}` in: {said}");
    }
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A chat model with its own template, and a scratch directory.
fn chat_model() -> (tempfile::TempDir, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("model");
    copy_files(&fixture("own/llm"), &dir);
    (home, dir)
}

#[test]
fn preview_marks_what_is_trained_on() {
    let dir = made();
    let args = ["preview", "--run", "run", "--data", "private.jsonl", "--index", "2"];
    let found = result(dir, &args);
    let row = &lines(&dir.join("private.jsonl"))[1];
    let pieces = found["example"]["text"].as_array().unwrap();
    let of = |kind: &str| -> String {
        let pieces = pieces.iter().filter(|piece| piece["kind"] == kind);
        pieces.map(|piece| piece["text"].as_str().unwrap()).collect()
    };
    let answer = row["answer"].as_str().unwrap();
    assert!(of("trained").contains(answer) && !of("read").contains(answer), "{pieces:?}");
    assert!(of("read").contains(row["question"].as_str().unwrap().trim()), "{pieces:?}");
    let tokens = found["example"]["tokens"].as_array().unwrap();
    let trained = tokens.iter().filter(|token| token["kind"] == "trained").count();
    assert!(trained > 0 && trained < tokens.len());
    assert_eq!(found["statistics"]["examples"], 7);
    assert_eq!(found["statistics"]["lost_labels"], 0);
    let text = done(dir, &args);
    assert!(
        text.contains("example 2 of 7, private.jsonl:2") && text.contains(&format!("{}»", of("trained"))),
        "{text}"
    );
    assert!(text.contains("data: 7 examples from private.jsonl") && !text.contains('\u{1b}'), "{text}");
    // Without --data, the run's public data; without a model, the rows alone.
    assert_eq!(result(dir, &["preview", "--run", "run"])["statistics"]["examples"], 20);
    let text = done(dir, &["preview", "--data", "private.jsonl"]);
    assert!(text.contains(answer_of(dir, 0).as_str()) && text.contains("prompt:"), "{text}");
    let random = |seed: &str| {
        result(dir, &["preview", "--model", "tiny", "--data", "public.jsonl", "--random", seed])["example"]["number"]
            .clone()
    };
    assert_eq!(random("5"), random("5"));
}

fn answer_of(dir: &Path, row: usize) -> String {
    lines(&dir.join("private.jsonl"))[row]["answer"].as_str().unwrap().to_string()
}

#[test]
fn preview_writes_a_page_and_names_what_is_missing() {
    let dir = made();
    let home = tempfile::tempdir().unwrap();
    let page = home.path().join("page.html");
    let page_name = page.to_str().unwrap();
    done(dir, &["preview", "--run", "run", "--data", "private.jsonl", "--out", page_name]);
    let text = std::fs::read_to_string(&page).unwrap();
    for word in ["<!doctype html>", "class=\"trained\"", "labels lost", "example 1 of 7"] {
        assert!(text.contains(word), "no {word} in {text}");
    }
    let data = ["preview", "--data", "private.jsonl"];
    let with = |more: &[&'static str]| [&data[..], more].concat();
    fails(dir, &with(&["--model", "tiny", "--index", "8"]), &["--index 8", "7 examples"]);
    fails(dir, &with(&["--model", "nowhere"]), &["nowhere", "config.json"]);
    fails(dir, &with(&["--model", "llm/config.json"]), &["llm/config.json"]);
    fails(dir, &with(&["--run", "rum"]), &["rum", "did you mean run"]);
    fails(dir, &["preview", "--model", "tiny"], &["no data is named", "--data"]);
    fails(dir, &["preview", "--data", "private.jsonl", "--out", "x.html"], &["no model is named"]);
}

#[test]
fn lost_labels_are_counted_and_refused() {
    let (home, _) = chat_model();
    let dir = home.path();
    let row = |length: usize| json!({ "prompt": "a", "response": "b ".repeat(length) }).to_string();
    let rows: Vec<String> = (0..9).map(|_| row(3)).chain([row(400)]).collect();
    std::fs::write(dir.join("d.jsonl"), rows.join("\n")).unwrap();
    let statistics = result(dir, &["preview", "--data", "d.jsonl", "--model", "model"])["statistics"].clone();
    assert_eq!((&statistics["over_limit"]["count"], &statistics["limit"]), (&json!(1), &json!(256)));
    let share = statistics["lost_share"].as_f64().unwrap();
    assert!(share > 0.2 && share < 0.9, "{statistics}");
    std::fs::write(dir.join("run.toml"), "[models]\ntiny = \"model\"\nllm = \"model\"\n").unwrap();
    let finetune = ["finetune", "--config", "run.toml", "--data", "d.jsonl"];
    let refused = [&finetune[..], &["--run", "a", "--out", "b"]].concat();
    fails(dir, &refused, &["d.jsonl:10", "labels are lost", "data.max_lost_labels"]);
    // What is accepted by the share is accepted.
    let set = format!("data.max_lost_labels={}", share + 0.01);
    let text = done(dir, &["preview", "--data", "d.jsonl", "--model", "model", "--set", &set]);
    assert!(text.contains("labels lost") && !text.contains("PROBLEM"), "{text}");
    assert!(done(dir, &["preview", "--data", "d.jsonl", "--model", "model"]).contains("PROBLEM"));
}

#[test]
fn generated_texts_are_those_of_evaluation() {
    let dir = made();
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("scores");
    let evaluate = ["evaluate", "--run", "run", "--data", "private.jsonl", "--model", "tiny"];
    done(dir, &[&evaluate[..], &["--adapter", "client/adapter", "--out", out.to_str().unwrap()]].concat());
    let wanted = lines(&out.join("predictions.jsonl"));
    let generate = ["generate", "--run", "run", "--model", "tiny", "--max-new-tokens", "4"];
    let found = |more: &[&str]| -> Vec<Value> {
        let text = done(dir, &[&generate[..], more, &["--json"]].concat());
        let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        events.filter(|event| event["event"] == "result").collect()
    };
    let adapted = found(&["--data", "private.jsonl", "--adapter", "client/adapter"]);
    assert_eq!(adapted.len(), 7);
    for (found, wanted) in adapted.iter().zip(&wanted) {
        assert_eq!((&found["text"], &found["ended"]), (&wanted["prediction"], &wanted["ended"]));
    }
    // The update is the same adapter; and one prompt is asked as in a file.
    let updated = found(&["--data", "private.jsonl", "--update", "client/update.safetensors"]);
    assert_eq!(updated, adapted);
    let question = lines(&dir.join("private.jsonl"))[0]["question"].as_str().unwrap().to_string();
    let one = found(&["--prompt", &question, "--update", "client/update.safetensors"]);
    assert_eq!(one[0]["text"], adapted[0]["text"]);
    // Streamed, the text is the same, and nothing else is on standard output.
    let streamed =
        done(dir, &[&generate[..], &["--prompt", &question, "--adapter", "client/adapter"]].concat());
    assert_eq!(streamed, format!("{}\n", adapted[0]["text"].as_str().unwrap()));
    // Drawn with a seed.
    let drawn = |seed: &str| {
        let more = ["--prompt", &question, "--temperature", "5", "--seed", seed, "--max-new-tokens", "12"];
        done(dir, &[&generate[..5], &more].concat())
    };
    assert_eq!(drawn("1"), drawn("1"));
    assert!((2..9).any(|seed| drawn(&seed.to_string()) != drawn("1")), "seeds draw other texts");
}

#[test]
fn a_chat_keeps_its_conversation() {
    let (home, _) = chat_model();
    let chat = |input: &str, more: &[&str]| {
        let mut command = Command::new(PROGRAM);
        let args = ["generate", "--model", "model", "--max-new-tokens", "6", "--json"];
        command.current_dir(home.path()).args([&args[..], more].concat());
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{said}");
        let text = String::from_utf8(output.stdout).unwrap();
        let events = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let texts = events.filter(|event| event["event"] == "result").map(|event| event["text"].clone());
        (texts.collect::<Vec<_>>(), said)
    };
    let (turns, _) =
        chat("How many apples?\nHow many apples?\n/reset\nHow many apples?\n\n/exit\nignored\n", &[]);
    assert_eq!(turns.len(), 3, "{turns:?}");
    // The first turn, and the first after a reset, ask the same; the second one sees more.
    assert_eq!(turns[0], turns[2]);
    let (_, said) = chat("How many apples?\nHow many apples?\n", &["--context", "40"]);
    assert!(said.contains("--context is 40") && said.contains("/reset"), "{said}");
}

#[test]
fn generate_refuses_what_does_not_belong_together() {
    let dir = made();
    let with = |more: &[&'static str]| [&["generate", "--prompt", "x"][..], more].concat();
    fails(dir, &with(&[]), &["which model?", "--run", "--model"]);
    fails(dir, &with(&["--model", "tiny", "--update", "client/update.safetensors"]), &["--init"]);
    fails(
        dir,
        &with(&["--run", "run", "--model", "llm", "--update", "client/update.safetensors"]),
        &["client/update.safetensors", "base model", "another base model"],
    );
    fails(dir, &with(&["--run", "run", "--model", "llm", "--adapter", "client/adapter"]), &["adapter_model"]);
    fails(dir, &with(&["--model", "tiny", "--top-p", "0.5"]), &["--top-p", "--temperature"]);
    fails(dir, &["generate", "--model", "tiny", "--data", "none.jsonl"], &["none.jsonl"]);
}

#[test]
fn conversion_goes_both_ways() {
    let dir = made();
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name).to_str().unwrap().to_string();
    let convert = ["convert", "--run", "run", "--model", "tiny"];
    let with =
        |more: &[&str]| -> Vec<String> { convert.iter().chain(more).map(|word| word.to_string()).collect() };
    let run = |args: &[String]| result(dir, &args.iter().map(String::as_str).collect::<Vec<_>>());
    run(&with(&["--update", "client/update.safetensors", "--out", &path("adapter")]));
    let bytes = |path: PathBuf| std::fs::read(path).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        assert_eq!(
            bytes(home.path().join("adapter").join(file)),
            bytes(dir.join("client/adapter").join(file))
        );
    }
    let adapter = path("adapter");
    run(&with(&["--adapter", &adapter, "--examples", "7", "--out", &path("back.safetensors")]));
    let back = path("back.safetensors");
    let same = result(dir, &["diff", "client/update.safetensors", &back]);
    let relative = same["all"]["relative_difference"].as_f64().unwrap();
    // One rounding of the adapter's values lies between.
    assert!(relative < 1e-5 && same["blocks"].as_array().unwrap().len() == 2, "{same}");
    // Without a run: the adapter that training started from, in PEFT form.
    let start = home.path().join("start");
    run(&with(&["--initial", "--out", start.to_str().unwrap()]));
    let own = path("own.safetensors");
    let args = [
        "convert",
        "--model",
        "tiny",
        "--init",
        start.to_str().unwrap(),
        "--adapter",
        &adapter,
        "--examples",
        "7",
    ];
    result(dir, &[&args[..], &["--out", &own]].concat());
    assert_eq!(bytes(PathBuf::from(own)), bytes(PathBuf::from(&back)));
    fails(dir, &["convert", "--run", "run", "--out", "x"], &["--adapter", "--update", "--initial"]);
    // What cannot be converted, and what would be overwritten.
    let large = ["convert", "--run", "run", "--model", "llm", "--out", "x"];
    fails(dir, &[&large[..], &["--update", "client/update.safetensors"]].concat(), &["another base model"]);
    fails(
        dir,
        &["convert", "--model", "tiny", "--update", "client/update.safetensors", "--out", "x"],
        &["--init"],
    );
    fails(
        dir,
        &["convert", "--run", "run", "--update", "client/update.safetensors", "--out", "client"],
        &["is there already"],
    );
    assert!(!dir.join("x").exists());
}

#[test]
fn diff_compares_updates_and_adapters() {
    let dir = made();
    let found = result(dir, &["diff", "client", "other", "--run", "run"]);
    assert_eq!(found["kind"], "update vectors");
    let modules: Vec<&str> =
        found["modules"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(modules, ["q_proj.lora_A", "q_proj.lora_B", "v_proj.lora_A", "v_proj.lora_B"]);
    let all = &found["all"];
    assert!(all["relative_difference"].as_f64().unwrap() > 0.01 && all["cosine"].as_f64().unwrap() < 0.999);
    let squares = |rows: &Value, name: &str| {
        let rows = rows.as_array().unwrap().iter();
        rows.map(|row| row[name].as_f64().unwrap().powi(2)).sum::<f64>().sqrt()
    };
    for rows in [&found["blocks"], &found["modules"]] {
        assert!((squares(rows, "norm_a") / all["norm_a"].as_f64().unwrap() - 1.0).abs() < 1e-9, "{found}");
    }
    let same = result(dir, &["diff", "client/adapter", "client/adapter"]);
    assert_eq!((&same["all"]["relative_difference"], &same["kind"]), (&json!(0.0), &json!("adapters")));
    // An adapter with the update that made it.
    let mixed = result(dir, &["diff", "client/update.safetensors", "client/adapter", "--run", "run"]);
    assert!(mixed["all"]["relative_difference"].as_f64().unwrap() < 1e-5, "{mixed}");
    let text = done(dir, &["diff", "client", "other"]);
    assert!(text.contains("block 1") && text.contains("cosine") && !text.contains("q_proj"), "{text}");
    fails(dir, &["diff", "client", "large"], &["different forms"]);
    fails(dir, &["diff", "client/adapter", "large/adapter"], &["layers."]);
    fails(dir, &["diff", "client/adapter", "client"], &["--run"]);
    fails(dir, &["diff", "client", "nowhere"], &["nowhere", "no such file"]);
    fails(dir, &["diff", "client", "other", "--run", "run", "--model", "llm"], &["not an update of"]);
}

#[test]
fn adapters_have_a_card_without_private_names() {
    let dir = made();
    let card = std::fs::read_to_string(dir.join("client/adapter/README.md")).unwrap();
    for word in ["library_name: peft", "trained on 7 examples", "| optimizer steps | 3 |", "--lora-modules"] {
        assert!(card.contains(word), "no {word} in {card}");
    }
    for private in ["private", dir.to_str().unwrap()] {
        assert!(!card.contains(private), "{private} is in {card}");
    }
    let record: Value =
        serde_json::from_str(&std::fs::read_to_string(dir.join("client/record.json")).unwrap()).unwrap();
    assert!(record["outputs"]["adapter/README.md"].is_string());
}

#[test]
fn every_step_can_be_watched() {
    let dir = made();
    let names = |line: &Value| line.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let metrics = lines(&dir.join("client/metrics.jsonl"));
    assert_eq!(names(&metrics[0]), ["step", "loss", "grad_norm", "learning_rate", "epoch", "tokens"]);
    assert_eq!(metrics.len(), 3);
    assert!(metrics[2]["tokens"].as_u64() > metrics[1]["tokens"].as_u64());
    let times = lines(&dir.join("client/throughput-steps.jsonl"));
    assert_eq!(times.len(), 3);
    for name in ["seconds", "tokens_per_s", "device_memory_bytes"] {
        assert!(times[2][name].as_f64().unwrap() > 0.0, "{name}: {times:?}");
    }
    let jobs = lines(&dir.join("run/shadow/metrics/tiny-00000.jsonl"));
    assert_eq!(names(&jobs[0])[..3], ["subset", "step", "loss"]);
    assert!(jobs.iter().all(|line| line["grad_norm"].as_f64().unwrap() > 0.0));
    let events = |place: &str| {
        let entries = std::fs::read_dir(dir.join(place)).unwrap().map(|e| e.unwrap().file_name());
        entries.filter(|name| name.to_string_lossy().contains("tfevents")).count()
    };
    assert_eq!((events("client"), events("run/shadow/events/tiny-00000")), (1, 1));
}

#[test]
fn assumptions_are_shown_in_one_place_and_kept() {
    let (home, _) = chat_model();
    let dir = home.path();
    std::fs::write(dir.join("d.jsonl"), json!({ "prompt": "a", "response": "b" }).to_string()).unwrap();
    let out = done(dir, &["preview", "--data", "d.jsonl", "--model", "model"]);
    let settings = "[models]\ntiny = \"model\"\nllm = \"model\"\n[data]\npublic = \"d.jsonl\"\n";
    std::fs::write(dir.join("run.toml"), settings).unwrap();
    let evaluate = ["evaluate", "--run", "r", "--config", "run.toml", "--data", "d.jsonl", "--out", "s"];
    let said = done(dir, &[&evaluate[..], &["--set", "evaluate.max_new_tokens=3"]].concat());
    assert!(said.contains("evaluate: begins on ") && said.contains("settings "), "{said}");
    let record: Value =
        serde_json::from_str(&std::fs::read_to_string(dir.join("s/record.json")).unwrap()).unwrap();
    let assumed: Vec<&str> =
        record["assumed"].as_array().unwrap().iter().map(|line| line.as_str().unwrap()).collect();
    for topic in ["data: 1 examples from d.jsonl", "prompt: ", "limit: ", "score: "] {
        let line = assumed
            .iter()
            .find(|line| line.starts_with(topic))
            .unwrap_or_else(|| panic!("{topic}: {assumed:?}"));
        assert!(said.contains(&format!("  {line}\n")), "{said}");
    }
    for line in assumed.iter().filter(|line| line.starts_with("data: ") || line.starts_with("prompt: ")) {
        assert!(out.contains(line), "{out}");
    }
}
