//! Model directories: what is written reads back; what is wrong is named.

use crate::common::*;
use gradtx_kernels::Device;
use gradtx_kernels::cpu::Cpu;
use gradtx_models::decoder::{Decoder, DecoderConfig, Family, InitialWeights};
use gradtx_runtime::artifact::{NewTensor, TensorSource, write_tensors};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::path::Path;

type Owned = (String, Vec<usize>, Vec<f32>);

fn tensors(dir: &Path) -> Vec<Owned> {
    let source = TensorSource::open(dir).unwrap();
    let read = |name: &str| {
        let tensor = source.tensor(name).unwrap();
        (name.to_owned(), tensor.shape.to_vec(), tensor.to_f32().unwrap())
    };
    source.names().into_iter().map(read).collect()
}

fn write(path: &Path, tensors: &[Owned]) {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, v)| v.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let list: Vec<NewTensor<'_>> = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| (name.clone(), Dtype::F32, shape.clone(), &bytes[..]))
        .collect();
    write_tensors(path, &list, &BTreeMap::new()).unwrap();
}

fn load(dir: &Path) -> Result<Decoder<Cpu, f32>, String> {
    Decoder::load(&Cpu::new(1), dir).map_err(|e| e.to_string())
}

#[test]
fn a_saved_model_loads_again() {
    for family in [Family::Qwen2, Family::Qwen3, Family::Llama, Family::Opt] {
        let config = DecoderConfig { eos: vec![2, 5], ..config(family, family == Family::Qwen2) };
        let model = decoder_f32(&Cpu::new(1), &config, 1);
        let dir = tempfile::tempdir().unwrap();
        model.save(dir.path(), false).unwrap();
        let again = load(dir.path()).unwrap();
        assert_eq!(again.config(), &config);
        assert_eq!(&**again.values(), &**model.values());
        model.save(dir.path(), true).unwrap();
        assert_near(load(dir.path()).unwrap().values(), model.values(), 4e-3, "bf16");
    }
}

#[test]
fn random_weights_are_a_function_of_the_key() {
    let config = config(Family::Qwen2, false);
    let cpu = Cpu::new(1);
    let make = |key| Decoder::<Cpu, f32>::random(&cpu, &config, &InitialWeights::default(), key).unwrap();
    let (a, b, c) = (make(1), make(1), make(2));
    assert_eq!(&**a.values(), &**b.values());
    assert_ne!(&**a.values(), &**c.values());
    let part = |name: &str| cpu.to_host(&a.values()[a.layout().range(name).unwrap()]).unwrap();
    assert!(part("model.norm.weight").iter().all(|&x| x == 1.0));
    assert!(part("model.layers.1.self_attn.k_proj.bias").iter().all(|&x| x == 0.0));
    let spread = part("lm_head.weight").iter().map(|x| x * x).sum::<f32>() / (29.0 * 24.0);
    assert!((spread.sqrt() - 0.02).abs() < 0.002);
}

#[test]
fn damaged_directories_are_named() {
    let config = config(Family::Qwen2, true);
    let dir = tempfile::tempdir().unwrap();
    decoder_f32(&Cpu::new(1), &config, 1).save(dir.path(), false).unwrap();
    let good = tensors(dir.path());
    let file = dir.path().join("model.safetensors");
    let edit = |change: &dyn Fn(&mut Vec<Owned>)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        write(&file, &tensors);
        load(dir.path())
    };
    let norm = |t: &Owned| t.0 == "model.norm.weight";
    let message = edit(&|t| t.retain(|t| !norm(t))).err().unwrap();
    assert!(message.contains("model.norm.weight"), "{message}");
    let message = edit(&|t| t.iter_mut().filter(|t| norm(t)).for_each(|t| t.1 = vec![12, 2])).err().unwrap();
    assert!(message.contains("expected shape [24], found [12, 2]"), "{message}");
    let message = edit(&|t| t.iter_mut().filter(|t| norm(t)).for_each(|t| t.2[7] = f32::NAN)).err().unwrap();
    assert!(message.contains("model.norm.weight") && message.contains("element 7"), "{message}");
    let message = edit(&|t| t.push(("model.surprise".into(), vec![1], vec![1.0]))).err().unwrap();
    assert!(message.contains("model.surprise"), "{message}");

    let embedding = good.iter().find(|t| t.0 == "model.embed_tokens.weight").unwrap().clone();
    let head = |values: Vec<f32>| ("lm_head.weight".to_owned(), embedding.1.clone(), values);
    assert!(
        edit(&|t| t.push(head(embedding.2.clone()))).is_ok(),
        "a head equal to the embedding it is tied to"
    );
    let other: Vec<f32> = embedding.2.iter().map(|x| x + 1.0).collect();
    let message = edit(&|t| t.push(head(other.clone()))).err().unwrap();
    assert!(message.contains("lm_head.weight"), "{message}");

    let without = |t: &mut Vec<Owned>| t.iter_mut().for_each(|t| t.0 = t.0.replace("model.", ""));
    let message = edit(&without).err().unwrap();
    assert!(message.contains("`layers.0.") && message.contains("no `model.` before"), "{message}");
    edit(&|_| {}).unwrap();

    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    assert!(load(dir.path()).err().unwrap().contains("truncated"));
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    assert!(load(dir.path()).err().unwrap().contains("config.json"));
}

#[test]
fn a_sharded_model_loads_and_a_missing_shard_is_named() {
    let config = config(Family::Llama, false);
    let dir = tempfile::tempdir().unwrap();
    let model = decoder_f32(&Cpu::new(1), &config, 1);
    model.save(dir.path(), false).unwrap();
    let all = tensors(dir.path());
    let mut map = serde_json::Map::new();
    for (i, part) in all.chunks(all.len().div_ceil(2)).enumerate() {
        let name = format!("model-{:05}-of-00002.safetensors", i + 1);
        write(&dir.path().join(&name), part);
        part.iter().for_each(|t| drop(map.insert(t.0.clone(), name.clone().into())));
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    assert_eq!(&**load(dir.path()).unwrap().values(), &**model.values());
    std::fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
    assert!(load(dir.path()).err().unwrap().contains("model-00002-of-00002.safetensors"));
}
