//! `gradtx bench` on the stand-in device: every benchmark runs in both element types on models
//! so small that it ends in seconds. Its times there mean nothing.

#![allow(clippy::unwrap_used)]

use crate::places::{fixture, program};
use gradtx_bench::models::NamedDecoder;
use gradtx_emulator::Variant;
use gradtx_kernels::bf16;
use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::cuda::Cuda;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

fn bench(home: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(program());
    command.current_dir(home).arg("bench").args(args).args(["--device", "cuda", "--warmup", "0"]);
    command.args(["--runs", "1", "--large", "32", "--out", "lines.jsonl"]);
    gradtx_emulator::lend(&mut command, Variant::PLAIN);
    command.output().unwrap()
}

/// The lines of all of these benchmarks, in an element type.
fn lines(dtype: &str) -> Vec<Value> {
    let home = tempfile::tempdir().unwrap();
    let file = |name: &str| fixture(name).join("config.json").display().to_string();
    let (model, t5) = (file("qwen2/model"), file("t5/model"));
    let model = ["--model", &model, "--batch", "2"];
    let sizes = ["--translator", &t5, "--tiny", "3x16", "--llm", "4x24", "--batch", "2"];
    let runs = [
        vec!["ceilings"],
        vec![
            "finetune",
            "--model",
            model[1],
            "--tokens",
            "24",
            "--context",
            "12",
            "--jobs",
            "2",
            "--profile",
        ],
        [&["train", "--profile"], &sizes[..]].concat(),
        [&["translate"], &sizes[..]].concat(),
        [&["generate", "--profile"], &model[..], &["--context", "5", "--tokens", "6"]].concat(),
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
        let line = |name: &str| lines.iter().find(|line| line["name"] == name).unwrap();
        for name in ["finetune", "train", "generate"] {
            let operations = line(name)["operations"].as_array().unwrap_or_else(|| panic!("{name}"));
            let share = operations.iter().map(|o| o["share_of_time"].as_f64().unwrap()).sum::<f64>();
            assert!((share - 1.0).abs() < 1e-2, "{name}: {operations:#?}");
            assert!(operations.iter().any(|o| o["share_of_floor"].is_number()), "{operations:#?}");
        }
        assert!(line("translate")["operations"].is_null(), "it was not asked for");
        assert!(line("finetune base alone")["first_step_s"].as_f64().unwrap() > 0.0);
        let other =
            |line: &Value| line["dtype"] != dtype || line["device"] == "cpu" || !line["threads"].is_null();
        assert!(!lines.iter().any(other), "{lines:#?}");
    }
}

/// Launches by name; products of matrices, which have other names without cuBLASLt, are one.
fn launches<'a>(lines: impl IntoIterator<Item = (&'a Value, u64)>) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    for (line, times) in lines {
        for operation in line["operations"].as_array().unwrap() {
            let name = operation["name"].as_str().unwrap();
            let name =
                if name.starts_with("product ") || name.starts_with("gemm_") { "product" } else { name };
            *all.entry(name.to_string()).or_default() += times * operation["calls"].as_u64().unwrap();
        }
    }
    all
}

/// `bench counts` names what the program launches, as often as it does.
#[test]
fn counted_launches_are_those_of_the_program() {
    let measured = lines("bf16");
    let home = tempfile::tempdir().unwrap();
    let counted = |args: &[&str]| -> Vec<Value> {
        let mut command = Command::new(program());
        command.current_dir(home.path()).args([
            "bench",
            "counts",
            "--gpu",
            "a100-80g",
            "--out",
            "counts.jsonl",
        ]);
        let output = command.args(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        let text = std::fs::read_to_string(home.path().join("counts.jsonl")).unwrap();
        std::fs::remove_file(home.path().join("counts.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let file = |name: &str| fixture(name).join("config.json").display().to_string();
    let (model, t5) = (file("qwen2/model"), file("t5/model"));
    let of_program = |name: &str| {
        let line =
            measured.iter().find(|line| line["name"] == name && line["operations"].is_array()).unwrap();
        launches([(line, 1)])
    };
    let step = |args: &[&str]| launches([(&counted(args)[0], 1)]);
    let finetune = step(&["--model", &model, "--tokens", "24", "--context", "12", "--jobs", "2"]);
    assert_eq!(finetune, of_program("finetune"));
    let train = step(&["--translator", &t5, "--tiny", "3x16", "--llm", "4x24", "--batch", "2"]);
    assert_eq!(train, of_program("train"));
    let tokens = |new: u64| {
        let new_tokens = new.to_string();
        let args = ["--model", &model, "--generate", "--batch", "2", "--context", "5", "--new", &new_tokens];
        let lines = counted(&args);
        launches([(&lines[0], 1), (&lines[1], new - 1)])
    };
    assert_eq!(tokens(6), of_program("generate"));
    assert_ne!(tokens(7), of_program("generate"));
}

/// Start to first step: a model of any size takes memory once, and nothing is copied from the host.
#[test]
fn random_weights_are_drawn_on_the_device() {
    let config = fixture("qwen2/model");
    let model = NamedDecoder::find(config.to_str().unwrap()).unwrap();
    gradtx_emulator::configure(gradtx_emulator::SCHEDULE);
    let cuda = gradtx_emulator::device(Variant::PLAIN);
    let (uploaded, allocations) = (cuda.uploaded(), cuda.allocations());
    let decoder = model.make::<bf16, Cuda>(&cuda).unwrap();
    assert_eq!((cuda.uploaded(), cuda.allocations()), (uploaded, allocations + 1));
    let on_host = model.make::<f32, Cpu>(&Cpu::new(2)).unwrap();
    for param in on_host.layout().params() {
        let found = decoder.tensor(param).unwrap();
        let wanted: Vec<bf16> = on_host.tensor(param).unwrap().into_iter().map(bf16::from_f32).collect();
        assert!(found == wanted, "{}", param.name);
    }
}
