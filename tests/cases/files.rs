//! Files that are no regular files, that shrink, that were left behind, and whose words would move
//! a terminal's cursor.

use crate::common::{Case, End, UPDATE};
use crate::hostile::assert_printable;
use serde_json::{Value, json};
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(15);

fn pipe(case: &Case, name: &str) {
    let made = Command::new("mkfifo").arg(case.path(name)).status().unwrap();
    assert!(made.success());
}

fn refused_soon(case: &Case, line: &str, words: &[&str]) {
    let end = case.run(line).refused();
    assert!(end.took < SOON, "{end:#?}");
    end.says(words);
}

// Reading ends.

/// A pipe without a writer is waited for by nobody.
#[test]
fn pipes_are_no_files() {
    let case = Case::smoke();
    pipe(&case, "p.safetensors");
    refused_soon(&case, "inspect p.safetensors", &["p.safetensors", "pipe|regular"]);
    refused_soon(&case, "translate --run a/run p.safetensors --out o", &["p.safetensors"]);
    pipe(&case, "p.jsonl");
    refused_soon(&case, "split --data p.jsonl --out o", &["p.jsonl"]);
    refused_soon(&case, "finetune --run a/run --data p.jsonl --out o", &["p.jsonl"]);
    pipe(&case, "p.toml");
    refused_soon(&case, "plan --config p.toml --gpu cpu --tokens-per-example 9", &["p.toml"]);
    refused_soon(&case, "sweep --list --out o p.toml", &["p.toml", "pipe"]);
    refused_soon(&case, "plan --sweep p.toml --gpu cpu --tokens-per-example 9", &["p.toml", "pipe"]);
    refused_soon(&case, "doctor --run p.toml", &["p.toml"]);
    refused_soon(
        &case,
        "plan --config a/run/run.toml --gpu cpu --tokens-per-example 9 --calibrate p.jsonl",
        &["p.jsonl"],
    );
}

#[test]
fn pipes_in_directories_of_models_and_results() {
    for name in [
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer_config.json",
    ] {
        let case = Case::new();
        case.remove(&format!("base/{name}"));
        pipe(&case, &format!("base/{name}"));
        let end = case.evaluate("o", &[]);
        assert!(matches!(end.code, Some(1 | 2)) && end.took < SOON, "{end:#?}");
        end.says(&[name]);
    }
    for name in [
        "shadow/manifest.json",
        "shadow/record.json",
        "translator/config.json",
        "translator/normalization.safetensors",
        "shadow/init/teacher.safetensors",
    ] {
        let case = Case::smoke();
        case.remove(&format!("a/run/{name}"));
        pipe(&case, &format!("a/run/{name}"));
        let translate =
            |method: &str| format!("translate --run a/run {UPDATE} --method {method} --out o-{method}");
        // `nearest` looks into the shadow pairs, the trained translator needs its own files only.
        let (reads, other) = match name.starts_with("shadow") {
            true => ("nearest", "grad-transformer"),
            false => ("grad-transformer", "nearest"),
        };
        refused_soon(&case, &translate(reads), &[&format!("{name}|no tuple store")]);
        assert!(case.run(&translate(other)).well().took < SOON);
        for line in ["status a/run", "inspect a/run", "report --run a/run --out page.html"] {
            let end = case.run(line).ended();
            assert!(end.took < SOON, "{end:#?}");
        }
    }
}

#[test]
fn devices_are_no_files() {
    let case = Case::smoke();
    for device in ["/dev/zero", "/dev/random"] {
        for name in ["d.jsonl", "d.parquet", "d.safetensors"] {
            symlink(device, case.path(name)).unwrap();
            let line = if name.ends_with("safetensors") {
                format!("inspect {name}")
            } else {
                format!("split --data {name} --out o")
            };
            refused_soon(&case, &line, &[name]);
            case.remove(name);
        }
    }
}

#[test]
fn links_in_a_circle() {
    let case = Case::smoke();
    for n in 0..6 {
        symlink(".", case.path(&format!("a/run/link{n}"))).unwrap();
        symlink("../..", case.path(&format!("a/run/clients/up{n}"))).unwrap();
    }
    symlink("x", case.path("x")).unwrap();
    for line in [
        "status a/run",
        "report --run a/run --out page.html",
        "inspect a/run",
        "inspect x",
        "split --data x --out o",
    ] {
        let end = case.run(line).ended();
        assert!(end.took < SOON, "{end:#?}");
    }
    let case = Case::new();
    case.rows("d/train.jsonl", &[json!({ "prompt": "a", "response": "b" })]);
    symlink(".", case.path("d/again")).unwrap();
    symlink("..", case.path("d/data")).unwrap();
    assert!(case.finetune("d", "c", &["--set", "finetune.tiny.max_steps=1"]).ended().took < SOON);
}

/// A record names files below its directory: nothing else is read, or removed.
#[test]
fn records_name_files_below_them() {
    let case = Case::smoke();
    case.write("precious", "x");
    for name in ["../../../precious", "/etc/hostname", "../record.json"] {
        let case = Case::smoke();
        case.edit("a/run/translator/record.json", |r| {
            let outputs = r["outputs"].as_object_mut().unwrap();
            outputs.insert(name.into(), json!("00000000000000000000000000000000"));
        });
        let end = case.run("inspect a/run/translator").ended();
        assert!(end.code == Some(1) || !end.has(name), "{end:#?}");
        case.run(&format!("translate --run a/run {UPDATE} --out o")).refused();
    }
    assert!(case.path("precious").exists());
}

// Files that shrink.

/// Starts a command, makes the file empty once the command works, and says how that ended. What
/// does not end is asked to stop.
fn shrinks(case: &Case, words: &[&str], sign: &str, file: &str) -> End {
    let errors = std::fs::File::create(case.path("errors")).unwrap();
    let mut child = case.command(words).stdout(Stdio::null()).stderr(errors).spawn().unwrap();
    let began = Instant::now();
    while !case.path(sign).exists() && began.elapsed() < SOON {
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(300));
    std::fs::File::options().write(true).open(case.path(file)).unwrap().set_len(0).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    if child.try_wait().unwrap().is_none() {
        Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    }
    let status = child.wait().unwrap();
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    End {
        words: words.join(" "),
        code: status.code(),
        signal,
        text: case.read("errors"),
        took: began.elapsed(),
    }
}

#[test]
fn a_base_model_that_shrinks_while_it_is_used() {
    let case = Case::new();
    let words = [
        "finetune",
        "--run",
        "r",
        "--config",
        "run.toml",
        "--data",
        "one.jsonl",
        "--out",
        "c",
        "--set",
        "finetune.tiny.max_steps=1000000",
    ];
    let end = shrinks(&case, &words, "c/progress.json", "base/model.safetensors");
    assert!(
        end.code == Some(1) && end.has("model.safetensors") || matches!(end.code, Some(75 | 143)),
        "{end:#?}"
    );
}

#[test]
fn teachers_that_shrink_while_they_are_used() {
    let case = Case::smoke();
    case.remove("a/run/translator");
    let settings = case.read("a/run/run.toml");
    let (before, train) = settings.split_once("[train]").unwrap();
    case.write(
        "a/run/run.toml",
        format!("{before}[train]{}", train.replacen("max_steps = 4", "max_steps = 500000", 1)),
    );
    let end = shrinks(
        &case,
        &["train", "--run", "a/run"],
        "a/run/translator/progress.json",
        "a/run/shadow/shards/00002.teacher.safetensors",
    );
    assert!(end.code == Some(1) && end.has("00002.teacher") || end.code == Some(75), "{end:#?}");
}

// What was left behind.

/// Half-written files of a process that was killed go with the next, and are no results.
#[test]
fn temporary_files_are_swept_and_not_listed() {
    let case = Case::smoke();
    let places = ["a/run/translator", "a/run/shadow", "a/run/shadow/shards", "a/run/shadow/init"];
    for place in places {
        case.write(&format!("{place}/.gradtx-ab12cd.tmp"), "half");
    }
    let end = case.run("inspect a/run/shadow").ended();
    assert!(!end.has(".tmp"), "{end:#?}");
    // An interrupted training, and what it left.
    case.remove("a/run/translator/record.json");
    case.remove("a/run/translator/model.safetensors");
    case.run("train --run a/run").well();
    assert!(!case.path("a/run/translator/.gradtx-ab12cd.tmp").exists());
    let end = case.run("status a/run").well();
    assert!(!end.has(".tmp"), "{end:#?}");
    let record = case.read("a/run/translator/record.json");
    assert!(!record.contains(".tmp"), "{record}");
}

/// Somebody's own files in a directory of results are no results, and stay.
#[test]
fn other_files_are_not_results() {
    let case = Case::smoke();
    case.write("a/run/shadow/shards/99999.student.safetensors", "x");
    case.write("a/run/shadow/shards/notes.txt", "x");
    case.run(&format!("translate --run a/run {UPDATE} --method nearest --out o")).well();
    case.remove("a/run/translator");
    case.run("train --run a/run").well();
    assert!(case.path("a/run/shadow/shards/notes.txt").exists());
}

// Words for the terminal.

const EVIL: &str = "x\u{1b}[2J\u{9b}31m\u{7}\r\u{202e}\u{7f}y";

fn printable(case: &Case, line: &str) -> End {
    let end = case.run(line).ended();
    assert_printable(&end.text);
    end
}

#[test]
fn names_of_tensors_and_metadata() {
    let case = Case::empty();
    let header = json!({ "__metadata__": { "format": EVIL, EVIL: "v" }, EVIL: { "dtype": "F32", "shape": [1], "data_offsets": [0, 4] } }).to_string();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat();
    case.write("t.safetensors", &bytes);
    printable(&case, "inspect t.safetensors");
    case.write("m/config.json", "{\"model_type\": \"qwen2\"}");
    case.write("m/model.safetensors", bytes);
    printable(&case, "inspect m");
    printable(&case, "doctor --model m");
}

#[test]
fn values_of_configurations_and_records() {
    let case = Case::new();
    case.edit("base/config.json", |c| c["model_type"] = json!(EVIL));
    printable(&case, "inspect base");
    case.edit("adapter/adapter_config.json", |c| c["peft_type"] = json!(EVIL));
    printable(&case, "inspect adapter");
    case.write("base/chat_template.jinja", format!("{{{{ raise_exception('{EVIL}') }}}}"));
    let case = Case::smoke();
    case.edit("a/run/translator/record.json", |r| {
        r["stage"] = json!(EVIL);
        r["settings"][EVIL] = json!(EVIL);
    });
    for line in [
        "inspect a/run/translator",
        "status a/run",
        "train --run a/run",
        "report --run a/run --out page.html",
    ] {
        printable(&case, line);
    }
    let evil: Value = json!({ "stage": EVIL, "message": EVIL, "hint": EVIL, "code": 1, "at": 1, "error": { "message": EVIL, "hint": EVIL, "code": 1 } });
    case.write("a/run/shadow/failed.json", evil.to_string());
    printable(&case, "status a/run");
}

#[test]
fn columns_and_errors_of_templates() {
    let case = Case::new();
    case.rows("rows.jsonl", &[json!({ EVIL: "a", "b": EVIL })]);
    printable(&case, "split --data rows.jsonl --out o");
    printable(&case, "inspect rows.jsonl");
    case.write(
        "base/chat_template.jinja",
        format!("{{{{ raise_exception('{}') }}}}", EVIL.replace('\r', "")),
    );
    let end = case.evaluate("e", &["--set", "data.prompt=template"]).ended();
    assert_printable(&end.text);
}

#[test]
fn names_of_files() {
    let case = Case::empty();
    case.write(EVIL, "x");
    let end = case.words(&["inspect", EVIL]).ended();
    assert_printable(&end.text);
    let end = case.words(&["split", "--data", EVIL, "--out", "o"]).ended();
    assert_printable(&end.text);
    // Letters of other scripts stay.
    case.write("größe三.bin", "x");
    case.words(&["inspect", "größe三.bin"]).ended().says(&["größe三.bin"]);
}
