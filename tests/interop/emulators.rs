//! Emulators in several versions of transformers and PEFT (`emulators.py`): an emulator that gradtx wrote gives the
//! logits that transformers gives with its code and, in whole matrices, with stock classes; what PEFT and torch trained
//! through it plugs into the LLM, which then gives transformers' logits.

use crate::versions::{VERSIONS, error, load, logits, written_by};
use gradtx_models::decoder::DecoderConfig;
use gradtx_models::lora::read_peft;
use gradtx_runtime::artifact::TensorFile;
use gradtx_tests::copy_files;
use std::path::{Path, PathBuf};
use std::process::Command;

/// An LLM, its emulator, and that in whole matrices.
fn emulator(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("interop/fixtures/emulator").join(part)
}

fn stored(version: &str) -> (TensorFile, Vec<u32>) {
    let file = TensorFile::open(&written_by(version).join("emulator_logits.safetensors")).unwrap();
    let tokens = file.tensor("tokens").unwrap().to_u32().unwrap();
    (file, tokens)
}

#[test]
fn emulators_give_the_logits_of_transformers() {
    for version in VERSIONS {
        let (file, tokens) = stored(version);
        let wanted = |name: &str| file.tensor(name).unwrap().to_f32().unwrap();
        for (part, name) in [("factored", "emulator"), ("dense", "dense"), ("dense", "emulator")] {
            let found = error(&logits(&load(&emulator(part)), None, &tokens), &wanted(name));
            assert!(found <= 1e-4, "{version}, {part}: {found:e}");
        }
        // The comparison can fail: the LLM is another model.
        assert!(error(&logits(&load(&emulator("llm")), None, &tokens), &wanted("emulator")) > 1e-2);
        let adapter = written_by(version).join("adapter_emulator");
        let model = load(&emulator("factored"));
        let adapter = read_peft(&adapter, model.config()).unwrap();
        assert_eq!(adapter.layout.layers(), [0, 2]);
        let found = error(&logits(&model, Some(&adapter), &tokens), &wanted("emulator_adapter"));
        assert!(found <= 1e-4, "{version}, adapter: {found:e}");
    }
}

#[test]
fn what_transformers_trained_plugs_into_the_llm() {
    let emulator_config = DecoderConfig::read(&emulator("factored")).unwrap();
    assert!(emulator_config.emulator.is_some());
    for version in VERSIONS {
        let (file, tokens) = stored(version);
        let home = tempfile::tempdir().unwrap();
        ["llm", "factored"].iter().for_each(|part| copy_files(&emulator(part), &home.path().join(part)));
        std::fs::write(home.path().join("run.toml"), "[models]\nllm = \"llm\"\n").unwrap();
        let trained = written_by(version);
        for (path, name) in [("adapter_emulator", "llm_adapter"), ("layers.safetensors", "llm_layers")] {
            let plugin = |more: &[&str]| {
                let args = ["plugin", "--run", "run", "--config", "run.toml", "--out", name, "--adapter"];
                let program = env!("CARGO_BIN_EXE_gradtx-under-test");
                let command = &mut Command::new(program);
                command.args(args).arg(trained.join(path)).args(more).current_dir(home.path());
                command.output().unwrap()
            };
            let said = plugin(&[]);
            assert!(String::from_utf8_lossy(&said.stderr).contains("--emulator DIR"), "{version}, {name}");
            let said = plugin(&["--emulator", "factored"]);
            assert!(said.status.success(), "{version}, {name}: {}", String::from_utf8_lossy(&said.stderr));
            let wanted = file.tensor(name).unwrap().to_f32().unwrap();
            let found = error(&logits(&load(&home.path().join(name)), None, &tokens), &wanted);
            assert!(found <= 1e-4, "{version}, {name}: {found:e}");
            let plain = error(&logits(&load(&emulator("llm")), None, &tokens), &wanted);
            assert!(plain > 1e-3, "{version}, {name}: what was trained hardly changes the LLM");
        }
    }
}
