//! `gradtx bench` on the stand-in device: every benchmark runs in both element types on models
//! so small that it ends in seconds. Its times there mean nothing.

#![allow(clippy::unwrap_used)]

use crate::emulator::{self, Variant};
use gradtx_tests::fixture;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

const PROGRAM: &str = env!("CARGO_BIN_EXE_gradtx-under-test");

fn bench(home: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.current_dir(home).arg("bench").args(args).args(["--device", "cuda", "--warmup", "0"]);
    command.args(["--runs", "1", "--large", "32", "--out", "lines.jsonl"]);
    emulator::lend(&mut command, Variant { race: false, plant: None });
    command.output().unwrap()
}

/// The lines of all of these benchmarks, in an element type.
fn lines(dtype: &str) -> Vec<Value> {
    let home = tempfile::tempdir().unwrap();
    let file = |name: &str| fixture(name).join("config.json").display().to_string();
    let (model, t5) = (file("qwen2/model"), file("t5/model"));
    let model = ["--model", &model, "--batch", "2"];
    let sizes = ["--translator", &t5, "--student", "3x16", "--teacher", "4x24", "--batch", "2"];
    let runs = [
        vec!["finetune", "--model", model[1], "--tokens", "24", "--context", "12", "--jobs", "2"],
        [&["train"], &sizes[..]].concat(),
        [&["translate"], &sizes[..]].concat(),
        [&["generate"], &model[..], &["--context", "5", "--tokens", "6"]].concat(),
        [&["kernels"], &model[..2], &sizes, &["--tokens", "24", "--values", "500", "--context", "7"]]
            .concat(),
    ];
    for args in runs {
        let output = bench(home.path(), &[&args[..], &["--dtype", dtype]].concat());
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    let text = std::fs::read_to_string(home.path().join("lines.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn every_benchmark_runs_on_the_device() {
    for dtype in ["f32", "bf16"] {
        let lines = lines(dtype);
        let seconds = |line: &Value| line["median_s"].as_f64().is_some_and(|s| s.is_finite() && s > 0.0);
        assert!(lines.iter().all(seconds), "{lines:#?}");
        let named = |name: &str| lines.iter().any(|line| line["name"] == name);
        for name in ["finetune", "finetune base alone", "train", "translate", "generate", "adamw", "lm head"]
        {
            assert!(named(name), "{dtype}: no {name}");
        }
        for name in ["pack", "adamw with a copy"] {
            assert_eq!(named(name), dtype == "bf16", "{name}: f32 needs no copy of another type");
        }
        let other =
            |line: &Value| line["dtype"] != dtype || line["device"] == "cpu" || !line["threads"].is_null();
        assert!(!lines.iter().any(other), "{lines:#?}");
    }
}
