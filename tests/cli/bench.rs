//! `gradtx bench` as a person runs it, on models so small that it ends in seconds.

#![allow(clippy::unwrap_used)]

use crate::home::PROGRAM;
use gradtx_plan::cost::calibrate::Calibration;
use gradtx_plan::cost::rates::Kind;
use gradtx_plan::cost::{Cluster, Gpu};
use gradtx_tests::fixture;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn bench(home: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.current_dir(home).args(["bench", args[0], "--threads", "2"]).args(&args[1..]);
    command.output().unwrap()
}

/// Runs it with few repeats, and reads the lines that it wrote.
fn lines(home: &Path, args: &[&str]) -> Vec<Value> {
    let out = home.join("lines.jsonl");
    let _ = std::fs::remove_file(&out);
    let large = if args[0] == "comm" { vec![] } else { vec!["--large", "96"] };
    let output = bench(home, &[args, &["--runs", "2", "--out", "lines.jsonl"], &large].concat());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("| what"), "no table for people: {said}");
    let text = std::fs::read_to_string(&out).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().all(is_sound), "{lines:#?}");
    lines
}

/// Whether every number of a line could be one, and it says where and when it is from.
fn is_sound(line: &Value) -> bool {
    let positive = |key: &str| line[key].as_f64().is_some_and(|x| x.is_finite() && x > 0.0);
    let optional =
        ["tflops", "gb_per_s", "share_of_gemm", "share_of_copy", "peak_memory_bytes", "flops", "bytes"];
    let quartiles = line["q1_s"].as_f64() <= line["median_s"].as_f64()
        && line["median_s"].as_f64() <= line["q3_s"].as_f64();
    let date = line["date"].as_str().is_some_and(|d| d.len() == 10 && d.starts_with("20"));
    positive("median_s")
        && positive("runs")
        && quartiles
        && date
        && optional.iter().all(|key| line[key].is_null() || positive(key))
        && line["who"] == "gradtx"
        && line["version"].is_string()
}

#[test]
fn a_line_with_a_number_that_is_none_is_found() {
    let sound = serde_json::json!({"who": "gradtx", "median_s": 1.0, "q1_s": 1.0, "q3_s": 1.0, "runs": 1,
        "date": "2026-11-21", "version": "0"});
    assert!(is_sound(&sound));
    for (key, value) in [("median_s", Value::Null), ("tflops", (-1.0).into()), ("runs", 0.into())] {
        let mut line = sound.clone();
        line[key] = value;
        assert!(!is_sound(&line), "{line}");
    }
}

fn named<'a>(lines: &'a [Value], name: &str) -> &'a Value {
    lines.iter().find(|line| line["name"] == name).unwrap_or_else(|| panic!("no {name} in {lines:#?}"))
}

fn number(line: &Value, key: &str) -> f64 {
    line[key].as_f64().unwrap_or_else(|| panic!("no {key} in {line}"))
}

/// Sizes of the fixtures, read here by themselves.
fn size(config: &Value, key: &str) -> f64 {
    config[key].as_f64().unwrap_or_else(|| panic!("no {key}"))
}

fn decoder() -> (String, Value) {
    let path = fixture("qwen2/model").join("config.json");
    let config = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    (path.display().to_string(), config)
}

fn t5() -> (String, Value) {
    let path = fixture("t5/model").join("config.json");
    let config = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    (path.display().to_string(), config)
}

#[test]
fn everything_is_measured_and_plan_learns_from_it() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let ((model, _), (t5, _)) = (decoder(), t5());
    let sizes = ["--translator", &t5, "--tiny", "3x10", "--llm", "4x12", "--batch", "2"];
    let model = ["--model", &model];
    let finetune = ["--tokens", "50", "--context", "20", "--jobs", "2"];
    let runs = [
        [&["finetune"], &model[..], &finetune].concat(),
        [&["train"], &sizes[..]].concat(),
        [&["translate"], &sizes[..]].concat(),
        [&["generate"], &model[..], &["--batch", "3", "--context", "5", "--tokens", "50"]].concat(),
        [&["kernels"], &model[..], &sizes, &["--tokens", "65", "--values", "1000", "--context", "7"]]
            .concat(),
    ];
    let mut all = String::new();
    for args in &runs {
        let lines = lines(home, args);
        let gemm = number(named(&lines, "large gemm"), "tflops");
        for line in lines.iter().filter(|line| !line["share_of_gemm"].is_null()) {
            let share = number(line, "flops") / number(line, "median_s") / 1e12 / gemm;
            assert!((number(line, "share_of_gemm") / share - 1.0).abs() < 1e-3, "{line}");
        }
        if args[0] == "train" {
            named(&lines, "train with loading");
            // Of 2 tuples, to f32 and to bf16, on one thread and on two.
            let bytes = [4.0 + 4.0, 4.0 + 2.0].map(|each| 2.0 * (3.0 * 10.0 + 4.0 * 12.0) * each);
            let prepared = lines.iter().filter(|line| line["name"] == "prepare tuples");
            let found: Vec<_> =
                prepared.map(|line| (number(line, "bytes"), number(line, "prepare_threads"))).collect();
            assert_eq!(found, [(bytes[0], 1.0), (bytes[0], 2.0), (bytes[1], 1.0), (bytes[1], 2.0)]);
        }
        lines.iter().for_each(|line| all += &format!("{line}\n"));
    }
    let mut calibration = Calibration::default();
    calibration.read_text(&all, "bench").unwrap();
    let cpu = Cluster { nodes: 1, gpus_per_node: 1, gpu: Gpu::Cpu, threads: 2 };
    for kind in Kind::ALL {
        let (rate, from) = calibration.per_second(&cpu, kind).unwrap_or_else(|| panic!("{kind:?}"));
        assert!(rate > 0.0 && from == "bench", "{kind:?}");
    }
    let h100 = Cluster { gpu: Gpu::H100, ..cpu };
    assert_eq!(calibration.per_second(&h100, Kind::Lora), None, "measured on another device");
}

#[test]
fn a_fine_tuning_step_counts_four_per_frozen_value() {
    let home = tempfile::tempdir().unwrap();
    let (path, c) = decoder();
    let args = ["finetune", "--model", &path, "--tokens", "50", "--context", "20", "--jobs", "2"];
    let lines = lines(home.path(), &args);
    let (base, step) = (named(&lines, "finetune base alone"), named(&lines, "finetune"));
    // Examples of 20, 20 and 10 tokens.
    let (h, f, v) = (size(&c, "hidden_size"), size(&c, "intermediate_size"), size(&c, "vocab_size"));
    let (heads, kv) = (size(&c, "num_attention_heads"), size(&c, "num_key_value_heads"));
    let (layers, d) = (size(&c, "num_hidden_layers"), h / heads);
    let matrices = layers * (h * (heads + 2.0 * kv) * d + heads * d * h + 3.0 * h * f);
    let pairs = 2.0 * 20.0 * 21.0 / 2.0 + 10.0 * 11.0 / 2.0;
    let labels = 19.0 + 19.0 + 9.0;
    let wanted = 4.0 * 50.0 * matrices + 4.0 * labels * h * v + 3.0 * 4.0 * layers * heads * d * pairs;
    assert!((number(base, "flops") / wanted - 1.0).abs() < 1e-9, "{base}");
    let adapter = layers * 2.0 * (h + heads * d + h + kv * d);
    let with = wanted + 6.0 * 50.0 * adapter;
    assert!((number(step, "flops") / with - 1.0).abs() < 1e-9, "{step}");
    // What training all parameters costs is something else.
    assert!((number(base, "flops") / (1.5 * wanted) - 1.0).abs() > 0.1);
    let overhead = number(step, "median_s") / number(base, "median_s") - 1.0;
    assert!((step["overhead"].as_f64().unwrap() - overhead).abs() < 1e-3, "{step}");
    let shares = step["share_of_time"].as_object().unwrap();
    let sum: f64 = shares.values().map(|share| share.as_f64().unwrap()).sum();
    assert!((sum - 1.0).abs() < 1e-3 && shares.len() > 5, "{step}");
}

#[test]
fn kernel_bytes_and_flops_follow_from_sizes() {
    let home = tempfile::tempdir().unwrap();
    let ((model, c), (t5, _)) = (decoder(), t5());
    let sizes = ["--translator", &t5, "--tiny", "3x10", "--llm", "4x12", "--batch", "2"];
    let more = ["--model", &model, "--tokens", "65", "--values", "1000", "--context", "7"];
    let lines = lines(home.path(), &[&["kernels"], &sizes[..], &more].concat());
    let (h, f) = (size(&c, "hidden_size"), size(&c, "intermediate_size"));
    let t = 65.0;
    let bytes = [
        ("rmsnorm forward", 4.0 * (t * h + t * h)),
        ("rmsnorm backward", 4.0 * (t * h + t * h + 2.0 * t * h)),
        ("swiglu forward", 4.0 * (2.0 * t * f + t * f)),
        ("swiglu backward", 4.0 * (t * f + 2.0 * t * f + 2.0 * t * f)),
        ("adamw", 4.0 * 1000.0 * (4.0 + 3.0)),
        ("difference", 4.0 * 1000.0 * 3.0),
        // Two tuples of four blocks of twelve.
        ("squared error", 4.0 * 2.0 * 4.0 * 12.0 * 3.0),
    ];
    for (name, wanted) in bytes {
        let found = number(named(&lines, name), "bytes");
        assert!(found == wanted && found != wanted + 4.0, "{name}: {found}, wanted {wanted}");
    }
    let flops = [
        ("gemm gate and up forward", 2.0 * t * 2.0 * f * h),
        ("gemm down backward", 2.0 * t * f * h),
        ("gemm input_proj weight gradient", 2.0 * 6.0 * 10.0 * size(&t5_config(), "d_model")),
        ("large gemm", 2.0 * 96.0 * 96.0 * 96.0),
        ("large gemm with tail", 2.0 * 96.0 * 96.0 * 160.0),
    ];
    for (name, wanted) in flops {
        assert_eq!(number(named(&lines, name), "flops"), wanted, "{name}");
    }
    // One segment of 65 tokens; every head pairs a token with itself and all before it.
    let forward = lines.iter().filter(|line| line["name"] == "attention forward");
    for line in forward {
        let heads: f64 = {
            let shape = line["shape"].as_str().unwrap();
            let (heads, _) = shape.split_once(", ").unwrap().1.split_once('+').unwrap();
            heads.parse().unwrap()
        };
        let pairs = (0..65).map(|i| f64::from(i) + 1.0).sum::<f64>();
        assert_eq!(number(line, "flops"), 4.0 * pairs * heads * number(line, "head_dim"), "{line}");
    }
}

#[test]
fn products_are_measured_by_their_parts() {
    let home = tempfile::tempdir().unwrap();
    let (model, config) = decoder();
    let args = ["products", "--model", &model, "--shadows", "7", "--values", "1500", "--lora-r", "3"];
    let lines = lines(home.path(), &args);
    assert_eq!(number(named(&lines, "inner products of students"), "flops"), 7.0 * 8.0 * 1500.0);
    let blocks = size(&config, "num_hidden_layers");
    for name in ["decomposition of stacks", "read-out of a client"] {
        let line = named(&lines, name);
        assert_eq!(number(line, "blocks"), blocks);
        assert!((number(line, "all_blocks_s") / number(line, "median_s") / blocks - 1.0).abs() < 1e-3);
    }
}

fn t5_config() -> Value {
    t5().1
}

#[test]
fn ranks_are_threads_where_there_are_no_others() {
    let home = tempfile::tempdir().unwrap();
    let (t5, _) = t5();
    let sizes = ["--translator", &t5, "--tiny", "3x10", "--llm", "4x12"];
    let lines = lines(home.path(), &[&["comm", "--ranks", "1,3", "--bytes", "4000"], &sizes[..]].concat());
    let names: Vec<_> = lines.iter().map(|line| line["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["all-reduce", "reduce-scatter", "all-gather", "buckets"].repeat(2));
    let alone = |line: &&Value| line["ranks"] == 1;
    assert!(lines.iter().filter(alone).all(|line| number(line, "wire_gb_per_s") == 0.0));
    // 1,000 values, and two more so that three can share them evenly.
    assert_eq!(number(&lines[4], "bytes"), 4008.0);
    let sent = number(&lines[4], "wire_gb_per_s") / number(&lines[4], "gb_per_s");
    assert!((sent - 4.0 / 3.0).abs() < 1e-3, "{}", lines[4]);
}

#[test]
fn lines_are_appended_as_events_and_become_a_table() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    let (t5, _) = t5();
    let args = ["translate", "--translator", &t5, "--tiny", "3x10", "--llm", "4x12", "--runs", "1"];
    let more = ["--large", "64", "--json", "--out", "lines.jsonl"];
    for times in 1..=2 {
        let output = bench(home, &[&args[..], &more].concat());
        assert!(output.status.success());
        let events: Vec<Value> = String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let results = events.iter().filter(|event| event["event"] == "result");
        assert_eq!(results.map(|event| &event["stage"]).collect::<Vec<_>>(), vec!["bench"; 5]);
        let text = std::fs::read_to_string(home.join("lines.jsonl")).unwrap();
        assert_eq!(text.lines().count(), 5 * times);
    }
    let output = bench(home, &["table", "."]);
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && table.contains("| ≥ 5.9× the released loop"), "{table}");
    std::fs::write(home.join("bad.jsonl"), "{}\nno\n").unwrap();
    let error = String::from_utf8(bench(home, &["table", "bad.jsonl"]).stderr).unwrap();
    assert!(error.contains("line 2") && error.contains("not JSON"), "{error}");
}

#[test]
fn unmeasurable_settings_are_refused_at_once() {
    let home = tempfile::tempdir().unwrap();
    let (model, _) = decoder();
    let refused = |args: &[&str], code: i32, why: &[&str]| {
        let output = bench(home.path(), &[args, &["--large", "32", "--runs", "1"]].concat());
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {error}");
        assert!(why.iter().all(|why| error.contains(why)), "{args:?}: {error}");
    };
    refused(&["finetune", "--dtype", "bf16"], 2, &["the CPU computes in f32"]);
    refused(&["finetune", "--model", "nonsense"], 2, &["nonsense", "config.json"]);
    refused(&["train", "--translator", "huge"], 2, &["huge", "Flan-T5", "large"]);
    refused(
        &["finetune", "--model", &model, "--tokens", "30", "--context", "20", "--jobs", "3"],
        2,
        &["holds 2"],
    );
    refused(&["generate", "--model", &model, "--tokens", "1"], 2, &["at least 2"]);
    let much = ["finetune", "--model", &model, "--tokens", "4000000000"];
    refused(&much, 1, &["--tokens 4000000000 needs", "are free", "which fits"]);
}

#[cfg(feature = "mpi")]
#[test]
fn ranks_that_were_started_measure_together() {
    use gradtx_tests::ranks::{end_of, mpirun};
    let home = tempfile::tempdir().unwrap();
    let (t5, _) = t5();
    let sizes = ["--translator", &t5, "--tiny", "3x10", "--llm", "4x12", "--out", "lines.jsonl"];
    let words = [&[PROGRAM, "bench", "comm", "--bytes", "4096", "--runs", "2"], &sizes[..]].concat();
    end_of(mpirun(home.path(), &[(3, &words)])).well();
    let text = std::fs::read_to_string(home.path().join("lines.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 4, "one rank tells: {text}");
    assert!(lines.iter().all(|line| line["ranks"] == 3 && line["over"] == "mpi"), "{text}");
    // Everything else is measured by one process.
    let words = [&[PROGRAM, "bench", "train", "--runs", "1"], &sizes[..]].concat();
    let end = end_of(mpirun(home.path(), &[(2, &words)]));
    assert!(end.code == Some(2) && end.err.contains("works in one process"), "{end:?}");
}
