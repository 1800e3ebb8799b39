//! An adapter merged into the files of the model that it was trained beside:
//! `W ← W + (α/r) B A` for every adapted matrix.
//!
//! In: a model directory, an adapter, a directory that exists. Out: in that directory,
//! the same files, in which only the bytes of adapted matrices differ ([`rewrite`]). Sums are computed in f32 and
//! rounded once to the tensor's own type.

use super::{Factor, PeftAdapter, Slice};
use crate::rewrite::{can_encode, encode, rewrite};
use gradtx_runtime::artifact::{TensorData, TensorSource};
use gradtx_runtime::{Error, Result};
use std::collections::HashMap;
use std::path::Path;

/// The two factors of one adapted matrix.
struct Product<'a> {
    /// `[r, in]`
    a: &'a [f32],
    /// `[out, r]`
    b: &'a [f32],
    /// `[out, in]`
    shape: [usize; 2],
    /// α/r.
    scale: f32,
}

/// Merges an adapter into the model of `base`; `threads` share the rows of a matrix.
/// Returns the names of the files that are now in `out`.
///
/// Every adapted matrix must be there with its shape, in bf16, f16 or f32; that is looked
/// at before anything is written. A value that is not finite before or after is an error.
pub fn merge(base: &Path, adapter: &PeftAdapter, out: &Path, threads: usize) -> Result<Vec<String>> {
    let (want, found) = (adapter.layout.total(), adapter.values.len());
    if want != found {
        let why = format!("the layout has {want} values, found {found}");
        return Err(Error::invalid("adapter to be merged", why));
    }
    let source = TensorSource::open(base)?;
    let products = products(adapter);
    for (name, product) in &products {
        let tensor = source.tensor(name)?;
        tensor.expect_shape(&product.shape)?;
        if !can_encode(tensor.dtype) {
            return Err(wrong_type(&tensor));
        }
    }
    rewrite(base, out, |tensor| {
        products.get(tensor.name).map(|product| product.added_to(tensor, threads)).transpose()
    })
}

fn wrong_type(tensor: &TensorData<'_>) -> Error {
    let why = format!("adapters are merged into BF16, F16 and F32, found {:?}", tensor.dtype);
    Error::tensor(tensor.path, tensor.name, why)
}

/// The products by the names of the tensors that they are added to.
fn products(adapter: &PeftAdapter) -> HashMap<String, Product<'_>> {
    let layout = &adapter.layout;
    let scale = layout.lora().scale() as f32;
    let pairs = |block| layout.slices().chunks_exact(2).map(move |pair| (block, &pair[0], &pair[1]));
    let product = |(block, a, b): (usize, &Slice, &Slice)| {
        debug_assert!(a.factor == Factor::A && b.factor == Factor::B);
        let values = |slice| &adapter.values[layout.range(block, slice)];
        let product = Product { a: values(a), b: values(b), shape: [b.shape[0], a.shape[1]], scale };
        let layer = layout.layers()[block];
        (layout.family().tensor(layer, a.module, ".weight"), product)
    };
    (0..layout.blocks()).flat_map(pairs).map(product).collect()
}

impl Product<'_> {
    /// The bytes of `W + (α/r) B A` in the tensor's own type.
    fn added_to(&self, tensor: &TensorData<'_>, threads: usize) -> Result<Vec<u8>> {
        let mut weight = tensor.to_f32()?;
        self.add(&mut weight, threads);
        encode(tensor.dtype, &weight)
            .map_err(|why| Error::tensor(tensor.path, tensor.name, format!("with the adapter, {why}")))
    }

    /// `weight` `[out, in]` += (α/r) B A. A row is one thread's, whole, so that the number
    /// of threads changes nothing.
    fn add(&self, weight: &mut [f32], threads: usize) {
        let [rows, columns] = self.shape;
        let rank = self.a.len() / columns;
        let part = rows.div_ceil(threads.max(1));
        std::thread::scope(|scope| {
            for (weight, b) in weight.chunks_mut(part * columns).zip(self.b.chunks(part * rank)) {
                scope.spawn(move || {
                    let mut delta = vec![0.0f32; columns];
                    for (row, b) in weight.chunks_exact_mut(columns).zip(b.chunks_exact(rank)) {
                        delta.fill(0.0);
                        for (b, a) in b.iter().zip(self.a.chunks_exact(columns)) {
                            delta.iter_mut().zip(a).for_each(|(d, a)| *d += b * a);
                        }
                        row.iter_mut().zip(&delta).for_each(|(w, d)| *w += self.scale * d);
                    }
                });
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::{Decoder, DecoderConfig, InitialWeights};
    use crate::lora::{BlockLayout, LoraConfig, Module};
    use gradtx_kernels::cpu::Cpu;
    use gradtx_kernels::rng::Stream;
    use gradtx_runtime::artifact::{NewTensor, write_tensors};
    use std::path::PathBuf;

    const THREADS: usize = 3;
    const INDEX: &str = "model.safetensors.index.json";

    fn config() -> DecoderConfig {
        let text = r#"{"model_type": "qwen2", "vocab_size": 11, "hidden_size": 12, "intermediate_size": 20,
            "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
            "max_position_embeddings": 64, "tie_word_embeddings": true}"#;
        DecoderConfig::parse(Path::new("config.json"), text).unwrap()
    }

    /// A model directory, and a random adapter of all modules for it.
    fn model(half: bool) -> (tempfile::TempDir, PeftAdapter) {
        let dir = tempfile::tempdir().unwrap();
        let initial = InitialWeights { embedding: 1.0, head: 1.0, matrices: None };
        let decoder = Decoder::<Cpu, f32>::random(&Cpu::new(1), &config(), &initial, 3).unwrap();
        std::fs::create_dir(dir.path().join("base")).unwrap();
        decoder.save(&dir.path().join("base"), half).unwrap();
        let lora =
            LoraConfig { rank: 3, alpha: 24.0, dropout: 0.0, targets: Module::ALL.to_vec(), layers: vec![] };
        let layout = BlockLayout::new(&config(), &lora).unwrap();
        let mut stream = Stream::new(9);
        let values = (0..layout.total()).map(|_| 0.1 * stream.normal() as f32).collect();
        (dir, PeftAdapter { layout, values, base_model: None })
    }

    fn merged(dir: &Path, adapter: &PeftAdapter, threads: usize) -> Result<(Vec<String>, PathBuf)> {
        let out = dir.join(format!("merged-{threads}"));
        std::fs::create_dir_all(&out).unwrap();
        Ok((merge(&dir.join("base"), adapter, &out, threads)?, out))
    }

    /// Every element of every adapted matrix against the sum in f64; every other byte as it was.
    #[test]
    fn adapted_matrices_change_and_nothing_else() {
        for half in [false, true] {
            let (dir, adapter) = model(half);
            let (files, out) = merged(dir.path(), &adapter, THREADS).unwrap();
            assert_eq!(files, ["model.safetensors", "config.json"]);
            let before = TensorSource::open(&dir.path().join("base")).unwrap();
            let after = TensorSource::open(&out).unwrap();
            assert_eq!(before.files()[0].header(), after.files()[0].header());
            let products = products(&adapter);
            assert_eq!(products.len(), 2 * Module::ALL.len());
            for name in before.names() {
                let (old, new) = (before.tensor(name).unwrap(), after.tensor(name).unwrap());
                let Some(Product { a, b, shape: [_, columns], .. }) = products.get(name) else {
                    assert_eq!(old.bytes, new.bytes, "{name}");
                    continue;
                };
                let (old, new) = (old.to_f32().unwrap(), new.to_f32().unwrap());
                for (i, (&w, &found)) in old.iter().zip(&new).enumerate() {
                    let (row, column) = (i / columns, i % columns);
                    let sum: f64 =
                        (0..3).map(|k| b[row * 3 + k] as f64 * a[k * columns + column] as f64).sum();
                    let want = w as f64 + 8.0 * sum;
                    // Half a unit in the last place of bf16; in f32 the rounding of the sum.
                    let tolerance = if half { want.abs() / 256.0 } else { 1e-6 };
                    assert!(
                        (found as f64 - want).abs() <= tolerance,
                        "{name}[{i}]: {found}, expected {want}"
                    );
                    assert!(half || (found as f64 - w as f64).abs() > 1e-9, "{name}[{i}] did not change");
                }
            }
            let (_, other) = merged(dir.path(), &adapter, 1).unwrap();
            let bytes = |dir: &PathBuf| std::fs::read(dir.join("model.safetensors")).unwrap();
            assert!(bytes(&out) == bytes(&other), "the number of threads changes bytes");
        }
    }

    #[test]
    fn shards_keep_their_names_and_the_index() {
        let (dir, adapter) = model(true);
        let (_, whole) = merged(dir.path(), &adapter, THREADS).unwrap();
        let base = dir.path().join("base");
        let source = TensorSource::open(&base).unwrap();
        let names = source.names();
        let mut map = serde_json::Map::new();
        for (i, part) in names.chunks(names.len().div_ceil(2)).enumerate() {
            let file = format!("model-{i}.safetensors");
            let tensors: Vec<NewTensor<'_>> = part
                .iter()
                .map(|name| {
                    let tensor = source.tensor(name).unwrap();
                    (name.to_string(), tensor.dtype, tensor.shape.to_vec(), tensor.bytes)
                })
                .collect();
            write_tensors(&base.join(&file), &tensors, &Default::default()).unwrap();
            map.extend(part.iter().map(|name| (name.to_string(), file.clone().into())));
        }
        std::fs::remove_file(base.join("model.safetensors")).unwrap();
        let index = serde_json::json!({ "weight_map": map }).to_string();
        std::fs::write(base.join(INDEX), &index).unwrap();
        std::fs::write(base.join("tokenizer.json"), "{}").unwrap();
        let (files, out) = merged(dir.path(), &adapter, 2).unwrap();
        assert_eq!(
            files,
            ["model-0.safetensors", "model-1.safetensors", "config.json", INDEX, "tokenizer.json"]
        );
        assert_eq!(std::fs::read_to_string(out.join(INDEX)).unwrap(), index);
        let (whole, parts) = (TensorSource::open(&whole).unwrap(), TensorSource::open(&out).unwrap());
        assert_eq!(whole.names(), parts.names());
        for name in whole.names() {
            assert!(whole.tensor(name).unwrap().bytes == parts.tensor(name).unwrap().bytes, "{name}");
        }
    }

    #[test]
    fn what_cannot_be_merged_is_named_and_nothing_is_left() {
        let (dir, mut adapter) = model(true);
        let refused = |adapter: &PeftAdapter, words: &[&str]| {
            let message = merged(dir.path(), adapter, THREADS).unwrap_err().to_string();
            words.iter().for_each(|word| assert!(message.contains(word), "no `{word}` in: {message}"));
            let left = std::fs::read_dir(dir.path().join(format!("merged-{THREADS}"))).unwrap().count();
            assert_eq!(left, 0, "{message}");
        };
        // A model with more blocks, and a wider one.
        for other in [DecoderConfig { layers: 3, ..config() }, DecoderConfig { hidden: 24, ..config() }] {
            let layout = BlockLayout::new(&other, adapter.layout.lora()).unwrap();
            let values = vec![0.5; layout.total()];
            refused(&PeftAdapter { layout, values, base_model: None }, &["model.layers."]);
        }
        adapter.values.iter_mut().for_each(|x| *x = 1e20);
        refused(&adapter, &["model.safetensors", "too large for BF16"]);
    }
}
