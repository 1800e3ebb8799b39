//! The program itself on the device: the whole pipeline on the least world, by the stand-in
//! driver and kernels that lie in the cache, with the CPU's numbers.

#![allow(clippy::unwrap_used)]

use crate::places::program;
use gradtx_emulator::{Variant, record};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

/// Makes the world and everything else in `home/name`.
fn demo(home: &Path, name: &str, options: &[&str]) -> Output {
    let mut command = Command::new(program());
    command.current_dir(home).args(["demo", name, "--world", "smoke", "--threads", "1"]).args(options);
    gradtx_emulator::lend(&mut command, Variant::PLAIN);
    command.output().unwrap()
}

fn made(home: &Path, name: &str, options: &[&str]) {
    let output = demo(home, name, options);
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
}

/// All values of a file of f32 tensors.
fn values(path: &Path) -> Vec<f64> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = file.names();
    names.sort();
    let mut values = vec![];
    for name in names {
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
        let bytes = tensor.data().chunks_exact(4);
        values.extend(bytes.map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))));
    }
    values
}

/// A number of every line of a file of JSON lines.
fn numbers(path: &Path, key: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|line| line[key].as_f64()).collect()
}

/// `‖a − b‖ / ‖b‖`.
fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert!(a.len() == b.len() && !a.is_empty(), "{} and {} values", a.len(), b.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    (square(&mut a.iter().zip(b).map(|(a, b)| a - b)) / square(&mut b.iter().copied())).sqrt()
}

/// How far two demos are apart, stage by stage.
fn distances(home: &Path, one: &str, other: &str) -> Vec<(&'static str, f64)> {
    let both = |of: &dyn Fn(&Path) -> Vec<f64>| {
        let [one, other] = [one, other].map(|name| of(&home.join(name)));
        distance(&one, &other)
    };
    let file = |path: &'static str| both(&move |dir| values(&dir.join(path)));
    let losses = |path: &'static str| both(&move |dir| numbers(&dir.join(path), "loss"));
    vec![
        ("pretrained tiny", file("world/tiny/model.safetensors")),
        ("pretrained llm", file("world/llm/model.safetensors")),
        ("shadow student", file("run/shadow/shards/00000.student.safetensors")),
        ("shadow teacher", file("run/shadow/shards/00003.teacher.safetensors")),
        ("losses of training", losses("run/translator/metrics.jsonl")),
        ("a client's losses", losses("run/clients/client-1/finetuned/llm/metrics.jsonl")),
        ("a client's update", file("run/clients/client-1/finetuned/tiny/update.safetensors")),
        ("its translation", file("run/clients/client-1/translated/grad-transformer/update.safetensors")),
    ]
}

fn assert_near(dtype: &str, found: &[(&str, f64)], tolerance: f64) {
    found.iter().for_each(|(stage, distance)| record(&format!("demo: {stage}"), dtype, *distance, tolerance));
    assert!(found.iter().all(|(_, distance)| *distance <= tolerance), "{found:#?}");
}

#[test]
fn the_whole_pipeline_agrees_with_the_cpu() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    made(home, "cpu", &[]);
    made(home, "cuda", &["--device", "cuda"]);
    assert_near("f32", &distances(home, "cuda", "cpu"), 2e-5);
    // What results depend on beside their settings is in their records, and none of it on a CPU.
    for stage in
        ["translator", "shadow", "clients/client-1/finetuned/tiny", "clients/client-1/evaluated/base-llm"]
    {
        let computed_on = |name: &str| -> Value {
            let path = home.join(name).join("run").join(stage).join("record.json");
            let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            serde_json::from_str::<Value>(&text).unwrap()["computed_on"].clone()
        };
        assert!(
            computed_on("cuda").to_string().contains("matrix products by "),
            "{stage}: {}",
            computed_on("cuda")
        );
        assert_eq!(computed_on("cpu"), Value::Null, "{stage}");
    }
    let answers = |name: &str| {
        let path = "run/clients/client-1/evaluated/grad-transformer/predictions.jsonl";
        std::fs::read_to_string(home.join(name).join(path)).unwrap()
    };
    assert_eq!(answers("cuda"), answers("cpu"));
    // Three decimal places of bf16, through an optimizer's steps.
    made(home, "bf16", &["--device", "cuda", "--dtype", "bf16"]);
    let found = distances(home, "bf16", "cpu");
    assert_near("bf16", &found, 0.1);
    assert!(found.iter().any(|(_, distance)| *distance > 1e-3), "it was not bf16: {found:?}");
    // The comparison sees another run.
    made(home, "other", &["--seed", "2"]);
    assert!(distances(home, "other", "cpu").iter().all(|(_, distance)| *distance > 0.01));
}

#[test]
fn runs_resume_on_another_device_and_stages_do_not() {
    let home = tempfile::tempdir().unwrap();
    let home = home.path();
    made(home, "demo", &["--device", "cuda"]);
    let evaluate = |options: &[&str]| {
        let mut command = Command::new(program());
        command.current_dir(home).args(["evaluate", "--run", "demo/run", "--out", "out", "--threads", "1"]);
        command.args(["--data", "demo/world/private/client-1/test.jsonl"]).args(options);
        gradtx_emulator::lend(&mut command, Variant::PLAIN);
        command.output().unwrap()
    };
    assert!(evaluate(&["--device", "cpu"]).status.success(), "another stage on another device");
    let refused = evaluate(&["--device", "cuda"]);
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && message.contains("device"), "{message}");
}

#[test]
fn without_a_driver_one_error_says_so() {
    if gradtx_emulator::on_device() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(program());
    let words = ["demo", "demo", "--world", "smoke", "--device", "cuda"];
    let output = command.current_dir(home.path()).args(words).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("no CUDA driver here") && message.contains("--device cpu"), "{message}");
    assert_eq!(message.matches("error:").count(), 1, "{message}");
    assert!(!home.path().join("demo").exists(), "nothing is left that refuses another device");
}
