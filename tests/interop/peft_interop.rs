//! Adapters across programs, this side of `tests/interop/peft_roundtrip.py`.
//!
//! ```text
//! peft_interop write BASE ADAPTER LOGITS.safetensors    then  peft_roundtrip.py open …
//! peft_roundtrip.py write BASE ADAPTER LOGITS…          then  peft_interop open …
//! ```
//!
//! `write` makes a random adapter for the model directory BASE and the logits it gives;
//! `open` reads an adapter that PEFT wrote, computes the logits of the stored tokens and
//! fails beyond 1e-4 of the largest. `peft_interop miniature FOLDER` writes two untrained models with data and a run
//! file, for `emulators.sh`.

use gradtx_kernels::cpu::Cpu;
use gradtx_kernels::{Device, rng::Stream};
use gradtx_models::decoder::{Activations, AdapterView, Decoder, Mode};
use gradtx_models::lora::{BlockLayout, LoraConfig, Module, read_peft, write_peft};
use gradtx_runtime::artifact::{TensorFile, write_tensors};
use gradtx_runtime::data::{BatchCapacity, DeviceBatch, Example, PackedBatch, SegmentInfo};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [action, folder] = arguments.as_slice()
        && action == "miniature"
    {
        gradtx_tests::miniature::write(Path::new(folder));
        return Ok(());
    }
    let [action, base, adapter, logits] = arguments.as_slice() else {
        return Err("usage: peft_interop write|open BASE ADAPTER LOGITS.safetensors".into());
    };
    let model = Decoder::<Cpu, f32>::load(&Cpu::default(), Path::new(base))?;
    match action.as_str() {
        "write" => write(&model, base, Path::new(adapter), Path::new(logits)),
        "open" => open(&model, Path::new(adapter), Path::new(logits)),
        other => Err(format!("unknown action `{other}`").into()),
    }
}

/// Logits `[T, V]` of one sequence.
fn logits_of(
    model: &Decoder<Cpu, f32>,
    layout: &BlockLayout,
    values: &[f32],
    tokens: &[u32],
) -> Result<Vec<f32>, Box<dyn Error>> {
    let mut batch = PackedBatch::default();
    let example = Example { tokens: tokens.to_vec(), trained: vec![false; tokens.len()] };
    batch.push(&example, SegmentInfo::default(), 1.0);
    let capacity = BatchCapacity { tokens: tokens.len(), segments: 1, labels: 1 };
    let device = model.device();
    let mut on_device = DeviceBatch::new(device, capacity)?;
    on_device.load(device, &batch)?;
    let mut acts = Activations::new(model, capacity, Mode::Inference(Some(layout)))?;
    let values = device.buffer_from(values)?;
    let view = AdapterView { values: &values, layout, dropout: 0.0 };
    let rows: Vec<u32> = (0..tokens.len() as u32).collect();
    Ok(model.logits(&mut acts, &on_device, Some(view), &rows)?)
}

fn write(model: &Decoder<Cpu, f32>, base: &str, dir: &Path, file: &Path) -> Result<(), Box<dyn Error>> {
    let lora =
        LoraConfig { rank: 3, alpha: 12.0, dropout: 0.1, targets: Module::ALL.to_vec(), layers: vec![] };
    let layout = BlockLayout::new(model.config(), &lora)?;
    let mut stream = Stream::new(1);
    let values: Vec<f32> = (0..layout.total()).map(|_| (0.2 * stream.normal()) as f32).collect();
    let tokens: Vec<u32> = (0..37).map(|_| stream.below(model.config().vocab) as u32).collect();
    std::fs::create_dir_all(dir)?;
    write_peft(dir, &layout, &values, base)?;
    let logits = logits_of(model, &layout, &values, &tokens)?;
    let id_bytes: Vec<u8> = tokens.iter().flat_map(|&t| (t as i32).to_le_bytes()).collect();
    let logit_bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
    let tensors = [
        ("logits".to_owned(), Dtype::F32, vec![tokens.len(), model.config().vocab], &logit_bytes[..]),
        ("tokens".to_owned(), Dtype::I32, vec![tokens.len()], &id_bytes[..]),
    ];
    write_tensors(file, &tensors, &BTreeMap::new())?;
    println!("wrote {} and {}", dir.display(), file.display());
    Ok(())
}

fn open(model: &Decoder<Cpu, f32>, dir: &Path, file: &Path) -> Result<(), Box<dyn Error>> {
    let adapter = read_peft(dir, model.config())?;
    let stored = TensorFile::open(file)?;
    let (tokens, want) = (stored.tensor("tokens")?.to_u32()?, stored.tensor("logits")?.to_f32()?);
    let found = logits_of(model, &adapter.layout, &adapter.values, &tokens)?;
    if found.len() != want.len() {
        return Err(format!("{} logits, the file has {}", found.len(), want.len()).into());
    }
    let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
    let differences: Vec<f32> = found.iter().zip(&want).map(|(a, b)| (a - b).abs() / largest).collect();
    println!(
        "tokens {}  max relative error {:.3e}",
        tokens.len(),
        differences.iter().fold(0f32, |m, &x| m.max(x))
    );
    match differences.iter().all(|&d| d <= 1e-4) {
        true => Ok(()),
        false => Err("the logits differ by more than 1e-4".into()),
    }
}
