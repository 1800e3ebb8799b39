//! [`rewrite`]: a model's directory written again with some tensors changed.
//!
//! In: a model directory, a directory that exists, what becomes of each tensor. Out: in that directory,
//! the same files with the same names, headers and index, in which only the bytes of
//! changed tensors differ. Files are read through memory maps and written tensor by tensor, so that models
//! larger than the memory can be rewritten.

use gradtx_kernels::{bf16, f16};
use gradtx_runtime::artifact::{
    MAX_CONFIG_BYTES, TensorData, TensorFile, TensorSource, copy_licences, copy_tokenizer, read_file,
    write_atomic,
};
use gradtx_runtime::{Error, Result};
use safetensors::Dtype;
use std::borrow::Cow;
use std::io::Write;
use std::path::Path;

/// What is copied as it is, where the model has it, beside the tokenizer's files and licences.
const COPIED: [&str; 3] = ["config.json", "model.safetensors.index.json", "modeling_gradot.py"];

/// Writes the model in `base` to `out`; `changed` gives the new bytes of a tensor, or none for one that stays. Returns
/// the names of the files that are now in `out`.
///
/// # Errors
/// Those of `changed`, as they are; a file is there whole or not at all.
pub(crate) fn rewrite(
    base: &Path,
    out: &Path,
    changed: impl Fn(&TensorData<'_>) -> Result<Option<Vec<u8>>>,
) -> Result<Vec<String>> {
    let source = TensorSource::open(base)?;
    let mut written = vec![];
    for file in source.files() {
        let name = file.path().file_name().and_then(|name| name.to_str());
        let name = name.ok_or_else(|| Error::file(file.path(), "its name is not valid UTF-8"))?;
        rewrite_file(file, &out.join(name), &changed)?;
        written.push(name.to_string());
    }
    for name in COPIED {
        let path = base.join(name);
        if path.is_file() {
            let content = read_file(&path, MAX_CONFIG_BYTES)?;
            write_atomic(&out.join(name), |file| file.write_all(&content))?;
            written.push(name.to_string());
        }
    }
    written.extend(copy_tokenizer(base, out)?.into_iter().map(String::from));
    written.extend(copy_licences(base, out)?);
    Ok(written)
}

/// Writes one safetensors file: the header as it is, then its tensors in their order.
fn rewrite_file(
    file: &TensorFile,
    out: &Path,
    changed: &impl Fn(&TensorData<'_>) -> Result<Option<Vec<u8>>>,
) -> Result<()> {
    let mut failed = None;
    let written = write_atomic(out, |to| {
        to.write_all(file.header())?;
        for name in file.names() {
            let bytes = file
                .tensor(&name)
                .and_then(|tensor| Ok(changed(&tensor)?.map_or(Cow::Borrowed(tensor.bytes), Cow::Owned)));
            match bytes {
                Ok(bytes) => to.write_all(&bytes)?,
                Err(error) => {
                    failed = Some(error);
                    return Err(std::io::Error::other("the tensor cannot be written"));
                }
            }
        }
        Ok(())
    });
    // The reason, not that writing was given up because of it.
    failed.map_or(written, Err)
}

/// Whether values can be written as this type.
pub(crate) fn can_encode(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)
}

/// The bytes of values as BF16, F16 or F32, rounded once; or why there are none.
pub(crate) fn encode(dtype: Dtype, values: &[f32]) -> std::result::Result<Vec<u8>, String> {
    let bytes = match dtype {
        Dtype::F32 => rounded(values, |x| x.is_finite().then(|| x.to_le_bytes())),
        Dtype::BF16 => rounded(values, |x| {
            let x = bf16::from_f32(x);
            x.is_finite().then(|| x.to_le_bytes())
        }),
        Dtype::F16 => rounded(values, |x| {
            let x = f16::from_f32(x);
            x.is_finite().then(|| x.to_le_bytes())
        }),
        other => return Err(format!("values are written as BF16, F16 or F32, not as {other:?}")),
    };
    bytes.map_err(|at| format!("element {at} is too large for {dtype:?}"))
}

/// The bytes of all values, or the place of the first that has none.
fn rounded<const N: usize>(
    values: &[f32],
    bytes_of: impl Fn(f32) -> Option<[u8; N]>,
) -> std::result::Result<Vec<u8>, usize> {
    let mut bytes = Vec::with_capacity(N * values.len());
    for (at, &value) in values.iter().enumerate() {
        bytes.extend(bytes_of(value).ok_or(at)?);
    }
    Ok(bytes)
}
