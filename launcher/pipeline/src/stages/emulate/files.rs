//! Files of statistics. Each says what it is of and has the checksum of its values: one that is damaged, half written or
//! of other data is not used.

use anyhow::Result;
use gradtx_runtime::artifact::{NewTensor, TensorFile, TensorSource, checksum, little_endian, write_tensors};
use safetensors::Dtype;
use std::path::Path;

/// What a file is of, in its metadata.
const OF: &str = "of";
/// Checksum of its values.
const SUM: &str = "values_xxh3";

/// Names, shapes and values.
pub(super) type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

/// The checksum of the values of a file, if it is intact and of this.
pub(super) fn intact(path: &Path, of: &str) -> Option<String> {
    let file = TensorFile::open(path).ok()?;
    let sum = file.metadata(SUM)?;
    let values = &file.bytes()[file.header().len()..];
    (file.metadata(OF) == Some(of) && checksum(values) == sum).then(|| sum.to_owned())
}

/// Writes tensors in f32, as they are given.
pub(super) fn write(path: &Path, of: &str, tensors: &Tensors) -> Result<()> {
    let mut bytes = vec![];
    let mut ranges = vec![];
    for (_, _, values) in tensors {
        let start = bytes.len();
        bytes.extend_from_slice(&little_endian(values));
        ranges.push(start..bytes.len());
    }
    let new: Vec<NewTensor<'_>> = tensors
        .iter()
        .zip(ranges)
        .map(|((name, shape, _), range)| (name.clone(), Dtype::F32, shape.clone(), &bytes[range]))
        .collect();
    let metadata = [(OF.to_owned(), of.to_owned()), (SUM.to_owned(), checksum(&bytes))].into();
    Ok(write_tensors(path, &new, &metadata)?)
}

/// The values of a tensor, which must be of this shape.
pub(super) fn read(file: &TensorFile, name: &str, shape: &[usize]) -> Result<Vec<f64>> {
    let tensor = file.tensor(name)?;
    tensor.expect_shape(shape)?;
    Ok(wide(&tensor.to_f32()?))
}

pub(super) fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

pub(super) fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}

/// Values of a tensor of the LLM, by rows.
pub(super) fn weight(dir: &Path, name: &str, shape: [usize; 2]) -> Result<Vec<f32>> {
    let source = TensorSource::open(dir)?;
    let tensor = source.tensor(name)?;
    tensor.expect_shape(&shape)?;
    Ok(tensor.to_f32()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_believed_if_every_byte_is_theirs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        assert_eq!(intact(&path, "x"), None);
        let tensors = vec![("a".into(), vec![3], vec![1.0, -2.0, 3.5]), ("b".into(), vec![1, 1], vec![4.0])];
        write(&path, "x", &tensors).unwrap();
        assert!(intact(&path, "x").is_some());
        assert_eq!(intact(&path, "y"), None, "of something else");
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(read(&file, "a", &[3]).unwrap(), [1.0, -2.0, 3.5]);
        assert!(read(&file, "b", &[1]).is_err());
        let bytes = std::fs::read(&path).unwrap();
        for at in bytes.len() - 16..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(intact(&path, "x"), None, "byte {at}");
        }
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(intact(&path, "x"), None, "truncated");
    }
}
