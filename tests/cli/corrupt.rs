//! Damaged and unsuitable models: one clear error each, from the loader and from
//! `gradtx inspect`, that names the file and the tensor or field, and says what was
//! expected. The control: the undamaged copy loads, and `inspect` finds nothing.

use crate::home::PROGRAM;
use gradtx_kernels::cpu::Cpu;
use gradtx_models::decoder::Decoder;
use gradtx_tests::{copy_files, fixture};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A copy of a tiny Qwen2, to be damaged.
struct Model {
    _home: tempfile::TempDir,
    dir: PathBuf,
}

impl Model {
    fn new() -> Self {
        let home = tempfile::tempdir().expect("a temporary directory");
        let dir = home.path().join("model");
        copy_files(&fixture("qwen2/model"), &dir);
        Self { _home: home, dir }
    }

    fn weights(&self) -> PathBuf {
        self.dir.join("model.safetensors")
    }

    fn change_config(&self, change: impl FnOnce(&mut Value)) {
        let path = self.dir.join("config.json");
        let mut config: Value = serde_json::from_slice(&read(&path)).expect("the fixture is JSON");
        change(&mut config);
        std::fs::write(&path, config.to_string()).expect("the copy can be written");
    }

    /// The loader's error.
    fn load_error(&self) -> String {
        match Decoder::<Cpu, f32>::load(&Cpu::new(1), &self.dir) {
            Ok(_) => panic!("a damaged model was loaded"),
            Err(error) => error.to_string(),
        }
    }

    fn inspect(&self) -> Output {
        Command::new(PROGRAM).arg("inspect").arg(&self.dir).output().expect("the program starts")
    }

    /// Both the loader and `inspect` must name all of these words, and `inspect` must fail.
    fn must_name(&self, words: &[&str]) {
        let error = self.load_error();
        assert_eq!(error.lines().count(), 1, "one error, one line: {error}");
        let output = self.inspect();
        let printed = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "inspect of a damaged model: {printed}");
        for word in words {
            assert!(error.contains(word), "`{word}` is not in the loader's error: {error}");
            assert!(printed.contains(word), "`{word}` is not in what inspect printed: {printed}");
        }
    }
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("the copy can be read")
}

#[test]
fn control_an_intact_model_passes() {
    let model = Model::new();
    Decoder::<Cpu, f32>::load(&Cpu::new(1), &model.dir).expect("an intact model loads");
    let output = model.inspect();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn truncated_safetensors() {
    let model = Model::new();
    let whole = read(&model.weights());
    std::fs::write(model.weights(), &whole[..whole.len() - 100]).expect("the copy can be written");
    model.must_name(&["model.safetensors"]);
}

#[test]
fn wrong_shape() {
    let model = Model::new();
    model.change_config(|config| config["intermediate_size"] = json!(48));
    model.must_name(&["model.safetensors", "mlp.", "expected shape", "48"]);
}

#[test]
fn unknown_config_field() {
    let model = Model::new();
    model.change_config(|config| config["residual_multiplier"] = json!(0.5));
    model.must_name(&["config.json", "residual_multiplier"]);
}

#[test]
fn missing_shard_file() {
    let model = Model::new();
    let shard = model.dir.join("model-00001-of-00002.safetensors");
    std::fs::rename(model.weights(), &shard).expect("the copy can be renamed");
    let index = json!({"metadata": {}, "weight_map": {
        "model.norm.weight": "model-00001-of-00002.safetensors",
        "model.embed_tokens.weight": "model-00002-of-00002.safetensors",
    }});
    let path = model.dir.join("model.safetensors.index.json");
    std::fs::write(path, index.to_string()).expect("the copy can be written");
    model.must_name(&["model-00002-of-00002.safetensors", "missing"]);
}

#[test]
fn weights_that_are_not_numbers() {
    let model = Model::new();
    let mut bytes = read(&model.weights());
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(model.weights(), bytes).expect("the copy can be written");
    model.must_name(&["model.safetensors", "not a finite number"]);
}
