//! The emulator's directory: the LLM's files with other matrices in the middle layers.

use super::choose::Chosen;
use super::parts::decomposition;
use super::statistics::Statistics;
use anyhow::Result;
use gradtx_kernels::{bf16, f16};
use gradtx_models::decoder::{DecoderConfig, Emulator, Family, LayerShape, Ranks};
use gradtx_models::gradot::{Choice, Compressed, Matrix};
use gradtx_models::lora::Module;
use gradtx_run::failure::failed;
use gradtx_runtime::artifact::{
    NewTensor, TensorData, TensorSource, copy_licences, copy_tokenizer, write_json, write_tensors,
};
use safetensors::Dtype;
use serde_json::{Map, json};
use std::path::Path;

const INDEX: &str = "model.safetensors.index.json";

/// An emulator that is to be written.
pub(super) struct Writing<'a> {
    pub statistics: &'a Statistics<'a>,
    /// Without shapes of layers.
    pub emulator: &'a Emulator,
    /// What stays of the middle layers, in order.
    pub chosen: &'a Chosen,
    /// As whole matrices, for the family's own code.
    pub is_dense: bool,
}

impl Writing<'_> {
    /// Writes it into a directory that exists; returns the names of its files.
    pub fn write(&self, out: &Path) -> Result<Vec<String>> {
        let side = self.statistics.side;
        let source = TensorSource::open(&side.dir)?;
        let mut files = vec![];
        let mut index = Map::new();
        let mut dtype = "float32";
        for file in source.files() {
            let name = file.path().file_name().and_then(|name| name.to_str());
            let name = name.ok_or_else(|| {
                failed(format!("{}: its name is not valid UTF-8", file.path().display()), "rename it")
            })?;
            let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = vec![];
            for name in file.names() {
                let tensor = file.tensor(&name)?;
                dtype = if tensor.dtype == Dtype::BF16 { "bfloat16" } else { dtype };
                dtype = if tensor.dtype == Dtype::F16 { "float16" } else { dtype };
                self.tensor(&tensor, &mut tensors)?;
            }
            index.extend(tensors.iter().map(|(tensor, ..)| (tensor.clone(), json!(name))));
            let list: Vec<NewTensor<'_>> = tensors
                .iter()
                .map(|(name, dtype, shape, bytes)| (name.clone(), *dtype, shape.clone(), &bytes[..]))
                .collect();
            write_tensors(&out.join(name), &list, &[("format".to_owned(), "pt".to_owned())].into())?;
            files.push(name.to_owned());
        }
        if files.len() > 1 {
            write_json(&out.join(INDEX), &json!({ "metadata": {}, "weight_map": index }))?;
            files.push(INDEX.into());
        }
        files.extend(self.config().write(out, dtype)?);
        files.extend(copy_tokenizer(&side.dir, out)?.into_iter().map(String::from));
        files.extend(copy_licences(&side.dir, out)?);
        Ok(files)
    }

    /// The emulator's configuration; that of the LLM for whole matrices.
    fn config(&self) -> DecoderConfig {
        let Self { statistics, emulator, chosen, is_dense } = self;
        let model = &statistics.side.model;
        if *is_dense {
            return model.clone();
        }
        let whole = LayerShape { ranks: Ranks::default(), intermediate: model.intermediate };
        let mut layers = vec![whole; model.layers];
        for (&layer, shape) in statistics.layers.iter().zip(&chosen.shapes) {
            layers[layer] = *shape;
        }
        let emulator = Emulator { layers, ..(*emulator).clone() };
        DecoderConfig { emulator: Some(emulator), ..model.clone() }
    }

    /// What of the emulator is in the place of a tensor of the LLM.
    fn tensor(
        &self,
        tensor: &TensorData<'_>,
        out: &mut Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
    ) -> Result<()> {
        let as_it_is = |name: String| (name, tensor.dtype, tensor.shape.to_vec(), tensor.bytes.to_vec());
        let family = self.statistics.side.model.family;
        let Some((layer, module, suffix)) = place(family, tensor.name) else {
            out.push(as_it_is(tensor.name.into()));
            return Ok(());
        };
        let Ok(at) = self.statistics.layers.binary_search(&layer) else {
            out.push(as_it_is(tensor.name.into()));
            return Ok(());
        };
        let choice = &self.chosen.choices[at];
        let stem = family.tensor(layer, module, "");
        if suffix == "bias" {
            let rank = if self.is_dense { 0 } else { module.rank(&self.chosen.shapes[at].ranks) };
            out.push(as_it_is(format!("{stem}.{}bias", if rank > 0 { "up." } else { "" })));
            return Ok(());
        }
        for Compressed { suffix, shape, values } in self.compressed(layer, module, choice)? {
            let bytes = bytes_of(tensor, &values)?;
            out.push((format!("{stem}.{suffix}"), tensor.dtype, shape.to_vec(), bytes));
        }
        Ok(())
    }

    fn compressed(&self, layer: usize, module: Module, choice: &Choice) -> Result<Vec<Compressed>> {
        let (whole, [rows, cols]) = self.statistics.weight(layer, module)?;
        if !Module::ATTENTION.contains(&module) {
            return Ok(vec![Compressed::mlp(&whole, module, [rows, cols], &choice.channels, self.is_dense)]);
        }
        let svd = decomposition(self.statistics, layer, module)?;
        let matrix = Matrix { layer, rows, cols, scores: vec![] };
        let kept = &choice.components[module as usize];
        Ok(Compressed::attention(&whole, &matrix, &svd, kept, self.is_dense))
    }
}

/// Layer and module of a tensor's name, and `weight` or `bias`.
fn place(family: Family, name: &str) -> Option<(usize, Module, &str)> {
    let (layer, rest) = name.strip_prefix(&family.layers())?.split_once('.')?;
    let (path, suffix) = rest.rsplit_once('.')?;
    let module = family.modules().find(|module| family.module_path(*module) == path)?;
    Some((layer.parse().ok()?, module, suffix))
}

/// Values in the type of the LLM's tensor.
fn bytes_of(tensor: &TensorData<'_>, values: &[f32]) -> Result<Vec<u8>> {
    match tensor.dtype {
        Dtype::F32 => Ok(values.iter().flat_map(|x| x.to_le_bytes()).collect()),
        Dtype::BF16 => Ok(values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()),
        Dtype::F16 => Ok(values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect()),
        other => Err(failed(
            format!("{}: tensor `{}` is {other:?}", tensor.path.display(), tensor.name),
            "use a model in BF16, F16 or F32",
        )),
    }
}
