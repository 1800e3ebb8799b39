//! Directories in the Hugging Face layout: parameters in and out of a flat buffer,
//! and the tokenizer files that a model travels with.

use super::{
    MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES, NewTensor, little_endian, read_file, write_atomic, write_tensors,
};
use crate::params::ParamLayout;
use crate::{Error, Result};
use half::{bf16, slice::HalfFloatSliceExt};
use safetensors::Dtype;
use std::borrow::Cow;
use std::path::Path;

/// What tokenizers and generation are made of, where a model has it.
const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
];

/// True if a directory holds a model in the Hugging Face layout.
pub fn is_model_dir(dir: &Path) -> bool {
    dir.join("config.json").is_file()
        && ["model.safetensors", "model.safetensors.index.json"].iter().any(|f| dir.join(f).is_file())
}

/// Writes all parameters of the layout to one safetensors file, as `BF16` or `F32`.
pub fn write_params(path: &Path, layout: &ParamLayout, values: &[f32], dtype: Dtype) -> Result<()> {
    let mut bytes: Vec<Cow<'_, [u8]>> = Vec::with_capacity(layout.params().len());
    for param in layout.params() {
        let part = &values[param.range()];
        bytes.push(match dtype {
            Dtype::F32 => little_endian(part),
            Dtype::BF16 => {
                let mut halves = vec![bf16::ZERO; part.len()];
                halves.convert_from_f32_slice(part);
                Cow::Owned(halves.iter().flat_map(|h| h.to_le_bytes()).collect())
            }
            other => {
                return Err(Error::file(path, format!("models are written as F32 or BF16, not {other:?}")));
            }
        });
    }
    let tensors: Vec<NewTensor<'_>> = layout
        .params()
        .iter()
        .zip(&bytes)
        .map(|(param, bytes)| (param.name.clone(), dtype, param.shape.clone(), &bytes[..]))
        .collect();
    // Readers in Python ask for this entry before they believe a file.
    write_tensors(path, &tensors, &[("format".to_owned(), "pt".to_owned())].into())
}

/// Copies tokenizer and generation settings from one model directory to another.
/// Returns the names of the files that were there.
pub fn copy_tokenizer(from: &Path, to: &Path) -> Result<Vec<&'static str>> {
    let mut copied = vec![];
    for name in TOKENIZER_FILES {
        if from.join(name).is_file() {
            copy(from, to, name, MAX_TOKENIZER_BYTES)?;
            copied.push(name);
        }
    }
    Ok(copied)
}

fn copy(from: &Path, to: &Path, name: &str, limit: u64) -> Result<()> {
    let content = read_file(&from.join(name), limit)?;
    write_atomic(&to.join(name), |out| std::io::Write::write_all(out, &content))
}

/// Copies licences and notices from one model directory to another: LICENSE, NOTICE,
/// USE_POLICY and the like, whatever their endings. Returns their names, sorted.
pub fn copy_licences(from: &Path, to: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(from).map_err(|e| Error::io("list", from, e))?;
    let is_licence = |name: &String| {
        let upper = name.to_ascii_uppercase();
        let begins =
            ["LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "USAGE_POLICY", "COPYING", "COPYRIGHT", "TERMS"];
        begins.iter().any(|begin| upper.starts_with(begin)) && from.join(name).is_file()
    };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(is_licence).collect();
    names.sort();
    names.iter().try_for_each(|name| copy(from, to, name, MAX_CONFIG_BYTES))?;
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::TensorSource;

    fn layout() -> ParamLayout {
        let mut layout = ParamLayout::new();
        layout.push([("a", vec![3, 5])]);
        layout.push([("b", vec![7])]);
        layout
    }

    fn read_params(source: &TensorSource, layout: &ParamLayout, values: &mut [f32]) -> Result<()> {
        for param in layout.params() {
            let tensor = source.tensor(&param.name)?;
            tensor.expect_shape(&param.shape)?;
            tensor.read_f32(&mut values[param.range()])?;
        }
        Ok(())
    }

    #[test]
    fn parameters_come_back_to_their_places() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let values: Vec<f32> = (0..layout().total()).map(|i| (i as f32 - 20.5) / 7.0).collect();
        for (dtype, tolerance) in [(Dtype::F32, 0.0), (Dtype::BF16, 1.0 / 256.0)] {
            write_params(&path, &layout(), &values, dtype).unwrap();
            let mut found = vec![f32::NAN; values.len()];
            read_params(&TensorSource::open(dir.path()).unwrap(), &layout(), &mut found).unwrap();
            for param in layout().params() {
                for i in param.range() {
                    assert!((found[i] - values[i]).abs() <= tolerance * values[i].abs(), "element {i}");
                }
            }
            assert!(found[20].is_nan(), "gaps are nobody's");
        }
        assert!(write_params(&path, &layout(), &values, Dtype::I64).is_err());
    }

    #[test]
    fn missing_and_misshapen_parameters_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut other = ParamLayout::new();
        other.push([("a", vec![5, 3])]);
        let path = dir.path().join("model.safetensors");
        write_params(&path, &other, &[1.0; 15], Dtype::F32).unwrap();
        let source = TensorSource::open(&path).unwrap();
        let mut values = vec![0.0; 71];
        let message = read_params(&source, &layout(), &mut values).unwrap_err().to_string();
        assert!(
            message.contains("`a`") && message.contains("[3, 5]") && message.contains("[5, 3]"),
            "{message}"
        );
    }

    #[test]
    fn tokenizer_files_travel() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(from.path().join("tokenizer.json"), "{}").unwrap();
        std::fs::write(from.path().join("model.safetensors"), "x").unwrap();
        for name in ["LICENSE", "NOTICE.txt", "USE_POLICY.md", "Licence.md"] {
            std::fs::write(from.path().join(name), "terms").unwrap();
        }
        let licences = copy_licences(from.path(), to.path()).unwrap();
        assert_eq!(licences, ["LICENSE", "Licence.md", "NOTICE.txt", "USE_POLICY.md"]);
        assert_eq!(std::fs::read_to_string(to.path().join("NOTICE.txt")).unwrap(), "terms");
        assert_eq!(copy_tokenizer(from.path(), to.path()).unwrap(), ["tokenizer.json"]);
        assert!(!to.path().join("model.safetensors").exists());
        assert!(!is_model_dir(from.path()));
        std::fs::write(from.path().join("config.json"), "{}").unwrap();
        assert!(is_model_dir(from.path()));
    }
}
