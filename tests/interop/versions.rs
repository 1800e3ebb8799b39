//! Models and adapters that several versions of transformers and PEFT wrote (`versions.py`): each is
//! read, and gives the logits that were stored with it. The files' values are the same in all
//! versions; what is written around them is not.

use gradtx_kernels::Device;
use gradtx_kernels::cpu::Cpu;
use gradtx_models::decoder::{Activations, AdapterView, Decoder, Mode};
use gradtx_models::lora::{PeftAdapter, read_peft};
use gradtx_runtime::artifact::TensorFile;
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, Example, PackedBatch, SegmentInfo};
use std::path::{Path, PathBuf};

pub const VERSIONS: [&str; 2] = ["transformers-4.51.3-peft-0.17.1", "transformers-5.24.0-peft-0.21.2"];
const MODELS: [&str; 5] = ["qwen2", "qwen2_yarn", "qwen3", "llama", "mistral"];
const ADAPTERS: [&str; 7] = ["names", "all_linear", "regex", "full_paths", "excluded", "patterns", "rslora"];

/// Logits `[T, V]` of one sequence.
pub fn logits(model: &Decoder<Cpu, f32>, adapter: Option<&PeftAdapter>, tokens: &[u32]) -> Vec<f32> {
    let mut batch = PackedBatch::default();
    let example = Example { tokens: tokens.to_vec(), trained: vec![false; tokens.len()] };
    batch.push(&example, SegmentInfo::default(), 1.0);
    let capacity = BatchCapacity { tokens: tokens.len(), segments: 1, labels: 1 };
    let device = model.device();
    let mut on_device = DeviceBatch::new(device, capacity).unwrap();
    on_device.load(device, &batch).unwrap();
    let mode = Mode::Inference(adapter.map(|adapter| &adapter.layout));
    let mut acts = Activations::new(model, capacity, mode).unwrap();
    let rows: Vec<u32> = (0..tokens.len() as u32).collect();
    let values = adapter.map(|adapter| device.buffer_from(&adapter.values).unwrap());
    let view = adapter.zip(values.as_ref()).map(|(adapter, values)| AdapterView {
        values,
        layout: &adapter.layout,
        dropout: 0.0,
    });
    model.logits(&mut acts, &on_device, view, &rows).unwrap()
}

/// Largest difference relative to the largest wanted logit.
pub fn error(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let largest = wanted.iter().fold(0f32, |m, x| m.max(x.abs()));
    found.iter().zip(wanted).fold(0f32, |m, (a, b)| m.max((a - b).abs() / largest))
}

pub fn written_by(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("interop/fixtures").join(version)
}

pub fn load(dir: &Path) -> Decoder<Cpu, f32> {
    Decoder::load(&Cpu::new(1), dir).unwrap()
}

#[test]
fn models_of_every_version_give_their_logits() {
    for version in VERSIONS {
        let dir = written_by(version);
        let stored = TensorFile::open(&dir.join("logits.safetensors")).unwrap();
        let tokens = stored.tensor("tokens").unwrap().to_u32().unwrap();
        for name in MODELS {
            let wanted = stored.tensor(name).unwrap().to_f32().unwrap();
            let found = error(&logits(&load(&dir.join(name)), None, &tokens), &wanted);
            assert!(found <= 1e-4, "{version}, {name}: {found:e}");
        }
        // The comparison can fail.
        let qwen2 = stored.tensor("qwen2").unwrap().to_f32().unwrap();
        assert!(error(&logits(&load(&dir.join("qwen2_yarn")), None, &tokens), &qwen2) > 1e-2);
    }
}

#[test]
fn adapters_of_every_version_give_their_logits() {
    for version in VERSIONS {
        let dir = written_by(version);
        let stored = TensorFile::open(&dir.join("logits.safetensors")).unwrap();
        let tokens = stored.tensor("tokens").unwrap().to_u32().unwrap();
        let base = load(&dir.join("qwen2"));
        let plain = logits(&base, None, &tokens);
        for kind in ADAPTERS {
            let name = format!("adapter_{kind}");
            let adapter = read_peft(&dir.join(&name), base.config())
                .unwrap_or_else(|e| panic!("{version}, {kind}: {e}"));
            let wanted = stored.tensor(&name).unwrap().to_f32().unwrap();
            let found = error(&logits(&base, Some(&adapter), &tokens), &wanted);
            assert!(found <= 1e-4, "{version}, {kind}: {found:e}");
            assert!(error(&plain, &wanted) > 1e-2, "{version}, {kind}: the adapter hardly changes the model");
        }
    }
}
