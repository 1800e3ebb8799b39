//! [`LayerFile`]: the full weights of some layers of a model, in a file by themselves.
//!
//! A safetensors file with the tensors `model.layers.N.…` of these layers, all of each, under the names that they have
//! in the model's own files and in their types. It may come from anyone: what it holds is compared with the model that
//! it is to be put into before any of it is used.

use crate::decoder::{Decoder, DecoderConfig, LayerParams, layer_of};
use crate::rewrite::{can_encode, encode, rewrite};
use gradtx_kernels::cpu::Cpu;
use gradtx_runtime::artifact::{NewTensor, TensorData, TensorFile, TensorSource, write_tensors};
use gradtx_runtime::params::ParamLayout;
use gradtx_runtime::{Error, Result};
use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Its name where gradtx writes it.
pub const LAYERS_FILE: &str = "layers.safetensors";

/// Whether a path can be a file of full weights of layers: a safetensors file that is no PEFT adapter's.
pub fn is_layer_file(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    path.is_file() && name.ends_with(".safetensors") && name != "adapter_model.safetensors"
}

/// A file of full weights of layers that fits a model.
#[derive(Debug)]
pub struct LayerFile {
    file: TensorFile,
    layers: Vec<usize>,
}

impl LayerFile {
    /// Opens a file for the model in `base`: whole layers of it and nothing else, with its shapes and types, of finite
    /// values.
    ///
    /// # Errors
    /// Names the file, the tensor, what was expected and what was found.
    pub fn open(path: &Path, model: &DecoderConfig, base: &TensorSource) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let layout = Decoder::<Cpu, f32>::layout_of(model);
        let layers = layers_in(&file, &layout, model)?;
        for param in layout.params().iter().filter(|p| layer_of(&p.name).is_some_and(|l| layers.contains(&l)))
        {
            let (own, of_model) = (file.tensor(&param.name)?, base.tensor(&param.name)?);
            own.expect_shape(&param.shape)?;
            if own.dtype != of_model.dtype {
                let why = format!(
                    "expected {:?} as in the model, found {:?}; save it in the model's type",
                    of_model.dtype, own.dtype
                );
                return Err(Error::tensor(path, &param.name, why));
            }
            if !can_encode(own.dtype) {
                let why = format!("expected BF16, F16 or F32, found {:?}", own.dtype);
                return Err(Error::tensor(path, &param.name, why));
            }
            own.to_f32()?;
        }
        Ok(Self { file, layers: layers.into_iter().collect() })
    }

    /// The layers, in increasing order.
    pub fn layers(&self) -> &[usize] {
        &self.layers
    }

    /// A note that [`write_layers`] left in the file; none if there is no such note.
    pub fn note(&self, key: &str) -> Option<&str> {
        self.file.metadata(key)
    }

    /// Puts layers into the model in `base` and writes it to `out`, a directory that exists: the weighted mean of
    /// `files`, which must be of the same layers of this model, summed in f64 and rounded once. The weights sum to 1.
    /// Returns the names of the files that are now in `out`.
    pub fn put_into<F: Borrow<Self>>(base: &Path, files: &[(F, f64)], out: &Path) -> Result<Vec<String>> {
        rewrite(base, out, |tensor| {
            let Some(layer) = layer_of(tensor.name) else { return Ok(None) };
            let files = files.iter().map(|(file, weight)| (file.borrow(), weight));
            let own = files.filter(|(file, _)| file.layers.contains(&layer));
            let own = own.map(|(file, weight)| Ok((file.file.tensor(tensor.name)?, *weight)));
            let own = own.collect::<Result<Vec<_>>>()?;
            match own.as_slice() {
                [] => Ok(None),
                // Not by numbers, so that a layer that was not changed keeps its bytes.
                [(only, _)] => Ok(Some(only.bytes.to_vec())),
                several => mean(tensor, several).map(Some),
            }
        })
    }
}

/// The weighted mean of tensors of one shape, in the type of `tensor`.
fn mean(tensor: &TensorData<'_>, several: &[(TensorData<'_>, f64)]) -> Result<Vec<u8>> {
    let mut sum = vec![0.0f64; tensor.len()];
    for (own, weight) in several {
        let values = own.to_f32()?;
        sum.iter_mut().zip(values).for_each(|(sum, x)| *sum += weight * f64::from(x));
    }
    let values: Vec<f32> = sum.into_iter().map(|x| x as f32).collect();
    encode(tensor.dtype, &values).map_err(|why| Error::tensor(tensor.path, tensor.name, why))
}

/// The layers that a file has, all of whose tensors must be there and no other.
fn layers_in(file: &TensorFile, layout: &ParamLayout, model: &DecoderConfig) -> Result<BTreeSet<usize>> {
    let (names, path) = (file.names(), file.path());
    for name in &names {
        if layer_of(name).is_none() || layout.get(name).is_none() {
            let why = format!(
                "expected tensors of whole layers of the model (`{of}0.…` to `{of}{}.…`) and no other",
                model.layers.saturating_sub(1),
                of = model.family.layers()
            );
            return Err(Error::tensor(path, name, why));
        }
    }
    if names.is_empty() {
        return Err(Error::file(path, "has no tensors; expected those of whole layers of a model"));
    }
    let layers: BTreeSet<usize> = names.iter().filter_map(|name| layer_of(name)).collect();
    let names: BTreeSet<&str> = names.iter().map(String::as_str).collect();
    let of_layers = layout.params().iter().filter(|p| layer_of(&p.name).is_some_and(|l| layers.contains(&l)));
    match of_layers.map(|param| param.name.as_str()).find(|name| !names.contains(name)) {
        None => Ok(layers),
        Some(name) => Err(Error::tensor(path, name, "is not there; expected all tensors of each layer")),
    }
}

/// The parameters of layers as the model in `base` has them, `[params]`: what training starts from.
pub fn read_layers(params: &LayerParams, base: &TensorSource) -> Result<Vec<f32>> {
    let mut values = vec![0.0; params.total()];
    for param in params.params() {
        base.tensor(&param.name)?.read_f32(&mut values[param.range()])?;
    }
    Ok(values)
}

/// Writes parameters `[params]` in the types that they have in `base`, with notes that [`LayerFile::note`] reads.
///
/// # Errors
/// If a value is too large for its type; nothing is written then.
pub fn write_layers(
    path: &Path,
    params: &LayerParams,
    values: &[f32],
    base: &TensorSource,
    notes: &BTreeMap<String, String>,
) -> Result<()> {
    let mut bytes = Vec::with_capacity(params.params().len());
    for param in params.params() {
        let dtype = base.tensor(&param.name)?.dtype;
        let values =
            encode(dtype, &values[param.range()]).map_err(|why| Error::tensor(path, &param.name, why))?;
        bytes.push((dtype, values));
    }
    let tensors: Vec<NewTensor<'_>> = params
        .params()
        .iter()
        .zip(&bytes)
        .map(|(param, (dtype, bytes))| (param.name.clone(), *dtype, param.shape.clone(), &bytes[..]))
        .collect();
    let mut metadata = notes.clone();
    metadata.insert("format".into(), "pt".into());
    write_tensors(path, &tensors, &metadata)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::InitialWeights;
    use safetensors::Dtype;
    use std::path::PathBuf;

    struct Home {
        dir: tempfile::TempDir,
        config: DecoderConfig,
    }

    impl Home {
        /// A model of four layers, and one more.
        fn new(half: bool) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let text = r#"{"model_type": "qwen2", "vocab_size": 11, "hidden_size": 12, "intermediate_size": 20,
                "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 1,
                "max_position_embeddings": 64, "tie_word_embeddings": true}"#;
            let config = DecoderConfig::parse(Path::new("config.json"), text).unwrap();
            let initial = InitialWeights { embedding: 1.0, head: 1.0, matrices: None };
            for (name, key) in [("base", 3), ("other", 4)] {
                let decoder = Decoder::<Cpu, f32>::random(&Cpu::new(1), &config, &initial, key).unwrap();
                std::fs::create_dir(dir.path().join(name)).unwrap();
                decoder.save(&dir.path().join(name), half).unwrap();
            }
            std::fs::create_dir(dir.path().join("out")).unwrap();
            Self { dir, config }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn source(&self, name: &str) -> TensorSource {
            TensorSource::open(&self.path(name)).unwrap()
        }

        /// The edge of a model, as a file.
        fn edge(&self, of: &str) -> PathBuf {
            let (params, source) = (LayerParams::new(&self.config, &[0, 3]).unwrap(), self.source(of));
            let path = self.path(&format!("{of}.safetensors"));
            let notes = [("a".to_owned(), "b".to_owned())].into();
            write_layers(&path, &params, &read_layers(&params, &source).unwrap(), &source, &notes).unwrap();
            path
        }

        fn open(&self, path: &Path) -> Result<LayerFile> {
            LayerFile::open(path, &self.config, &self.source("base"))
        }

        /// A change of the tensors of the edge, and what is said of it.
        fn refused(&self, change: impl Fn(&mut Vec<(String, Dtype, Vec<usize>, Vec<u8>)>), words: &[&str]) {
            let file = TensorFile::open(&self.edge("base")).unwrap();
            let mut tensors: Vec<_> = file
                .names()
                .into_iter()
                .map(|name| {
                    let tensor = file.tensor(&name).unwrap();
                    (name.clone(), tensor.dtype, tensor.shape.to_vec(), tensor.bytes.to_vec())
                })
                .collect();
            change(&mut tensors);
            let list: Vec<NewTensor<'_>> =
                tensors.iter().map(|(n, d, s, b)| (n.clone(), *d, s.clone(), &b[..])).collect();
            let path = self.path("bad.safetensors");
            write_tensors(&path, &list, &BTreeMap::new()).unwrap();
            let message = self.open(&path).unwrap_err().to_string();
            for word in words.iter().chain(&["bad.safetensors"]) {
                assert!(message.contains(word), "no `{word}` in: {message}");
            }
        }
    }

    #[test]
    fn an_untouched_edge_leaves_the_models_bytes() {
        for half in [false, true] {
            let home = Home::new(half);
            let file = home.open(&home.edge("base")).unwrap();
            assert_eq!((file.layers(), file.note("a"), file.note("c")), (&[0, 3][..], Some("b"), None));
            let [again, third] = [(); 2].map(|()| home.open(&home.edge("base")).unwrap());
            for files in [vec![(file, 1.0)], vec![(again, 1.0 / 3.0), (third, 2.0 / 3.0)]] {
                LayerFile::put_into(&home.path("base"), &files, &home.path("out")).unwrap();
                let read = |dir: &str| std::fs::read(home.path(dir).join("model.safetensors")).unwrap();
                assert!(read("base") == read("out"), "{} files", files.len());
            }
        }
    }

    #[test]
    fn files_are_averaged_and_other_layers_stay() {
        let home = Home::new(false);
        let files = ["base", "other"].map(|of| home.open(&home.edge(of)).unwrap());
        let files: Vec<_> = files.into_iter().zip([0.25, 0.75]).collect();
        LayerFile::put_into(&home.path("base"), &files, &home.path("out")).unwrap();
        let sources = ["base", "other", "out"].map(|of| home.source(of));
        for name in sources[0].names() {
            let [a, b, found] = [0, 1, 2].map(|i| sources[i].tensor(name).unwrap().to_f32().unwrap());
            let is_edge = [0, 3].map(Some).contains(&layer_of(name));
            for ((a, b), found) in a.iter().zip(b).zip(found) {
                let want = if is_edge { 0.25 * f64::from(*a) + 0.75 * f64::from(b) } else { f64::from(*a) };
                assert!((f64::from(found) - want).abs() <= 1e-7, "{name}: {found}, expected {want}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let home = Home::new(true);
        let bias = "model.layers.0.self_attn.q_proj.bias";
        let at = |tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)]| {
            tensors.iter().position(|(name, ..)| name == bias).unwrap()
        };
        home.refused(|all| drop(all.remove(at(all))), &[bias, "is not there", "all tensors of each layer"]);
        home.refused(
            |all| all.push(("model.embed_tokens.weight".into(), Dtype::BF16, vec![1], vec![0; 2])),
            &["`model.embed_tokens.weight`", "and no other"],
        );
        let extra = "model.layers.3.self_attn.o_proj.bias";
        home.refused(|all| all.push((extra.into(), Dtype::BF16, vec![1], vec![0; 2])), &[extra, "layers.3"]);
        let deeper = "model.layers.4.mlp.up_proj.weight";
        home.refused(
            |all| all.push((deeper.into(), Dtype::BF16, vec![1], vec![0; 2])),
            &[deeper, "layers.3"],
        );
        home.refused(
            |all| {
                let i = at(all);
                all[i].2 = vec![3, 4]
            },
            &[bias, "[12]", "[3, 4]"],
        );
        home.refused(
            |all| {
                let i = at(all);
                (all[i].1, all[i].3) = (Dtype::F32, vec![0; 48]);
            },
            &[bias, "expected BF16", "found F32"],
        );
        for (bits, word) in [(0x7fc0u16, "NaN"), (0x7f80, "inf")] {
            home.refused(
                |all| {
                    let i = at(all);
                    all[i].3[4..6].copy_from_slice(&bits.to_le_bytes());
                },
                &[bias, word, "element 2", "finite"],
            );
        }
        home.refused(Vec::clear, &["no tensors"]);
        // Cut off.
        let path = home.edge("base");
        let bytes = std::fs::read(&path).unwrap();
        for len in [0, 4, 300, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..len]).unwrap();
            let message = home.open(&path).unwrap_err().to_string();
            assert!(message.contains("base.safetensors"), "{len}: {message}");
        }
    }

    #[test]
    fn values_that_are_too_large_are_not_written() {
        let home = Home::new(true);
        let params = LayerParams::new(&home.config, &[1]).unwrap();
        let path = home.path("large.safetensors");
        let values = vec![3.4e38; params.total()];
        let message = write_layers(&path, &params, &values, &home.source("base"), &BTreeMap::new())
            .unwrap_err()
            .to_string();
        assert!(message.contains("model.layers.1.") && message.contains("too large for BF16"), "{message}");
        assert!(!path.exists());
    }
}
