//! Checkpoints: everything needed to go on bit-identically, in one file per step.
//!
//! A safetensors file of named flat buffers (parameters, moments, counters), with
//! the rest of the state as JSON in its metadata and a checksum over all of it. It is
//! written under a temporary name and renamed, so a checkpoint is there whole or not
//! at all; [`latest`] steps over one that was damaged afterwards.

use crate::artifact::{NewTensor, TensorData, TensorFile, write_tensors};
use crate::{Error, Result};
use half::bf16;
use safetensors::Dtype;
use serde_json::Value;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::Xxh3;

const FORMAT: &str = "gradtx.checkpoint";
const VERSION: &str = "1";

/// Values of a buffer to be saved.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// 32 bits.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// Counters, keys.
    U64(&'a [u64]),
}

impl<'a> Values<'a> {
    fn parts(self) -> (Dtype, usize, &'a [u8]) {
        match self {
            Self::F32(x) => (Dtype::F32, x.len(), bytemuck::cast_slice(x)),
            Self::Bf16(x) => (Dtype::BF16, x.len(), bytemuck::cast_slice(x)),
            Self::U64(x) => (Dtype::U64, x.len(), bytemuck::cast_slice(x)),
        }
    }
}

// Buffers go to files as they are in memory.
const _: () = assert!(cfg!(target_endian = "little"), "checkpoints are written on little-endian machines");

/// Writes one checkpoint file.
pub fn save(path: &Path, buffers: &[(&str, Values<'_>)], state: &Value) -> Result<()> {
    let tensors: Vec<NewTensor<'_>> = buffers
        .iter()
        .map(|(name, values)| {
            let (dtype, len, bytes) = values.parts();
            ((*name).to_owned(), dtype, vec![len], bytes)
        })
        .collect();
    let state = state.to_string();
    let checksum = checksum(&state, tensors.iter().map(|(name, _, _, bytes)| (name.as_str(), *bytes)));
    let metadata =
        [("format", FORMAT.into()), ("version", VERSION.into()), ("state", state), ("xxh3", checksum)];
    write_tensors(path, &tensors, &metadata.map(|(k, v)| (k.to_owned(), v)).into())
}

/// Over the state and every buffer, by name.
fn checksum<'a>(state: &str, buffers: impl Iterator<Item = (&'a str, &'a [u8])>) -> String {
    let mut buffers: Vec<_> = buffers.collect();
    buffers.sort_by_key(|(name, _)| *name);
    let mut hash = Xxh3::new();
    hash.update(state.as_bytes());
    for (name, bytes) in buffers {
        hash.update(format!("\n{name} {}\n", bytes.len()).as_bytes());
        hash.update(bytes);
    }
    format!("{:032x}", hash.digest128())
}

/// A checkpoint that was opened and found whole.
#[derive(Debug)]
pub struct Checkpoint {
    file: TensorFile,
    state: Value,
}

impl Checkpoint {
    /// Opens a file and verifies its checksum.
    pub fn load(path: &Path) -> Result<Self> {
        let file = TensorFile::open(path)?;
        if !Self::recognises(&file) {
            return Err(Error::file(path, "not a checkpoint"));
        }
        if file.metadata("version") != Some(VERSION) {
            let found = file.metadata("version").unwrap_or("none");
            let why = format!("checkpoint of version {found}; this program reads version {VERSION}");
            return Err(Error::file(path, why));
        }
        let text = file.metadata("state").ok_or_else(|| Error::file(path, "checkpoint without a state"))?;
        let names = file.names();
        let tensors = names.iter().map(|name| file.tensor(name)).collect::<Result<Vec<_>>>()?;
        let found = checksum(text, tensors.iter().map(|t| (t.name, t.bytes)));
        if file.metadata("xxh3") != Some(&found) {
            let why = format!("damaged: its checksum is {found}, it should be {:?}", file.metadata("xxh3"));
            return Err(Error::file(path, why));
        }
        let state = serde_json::from_str(text)
            .map_err(|e| Error::file(path, format!("its state is not valid JSON: {e}")))?;
        Ok(Self { state, file })
    }

    /// True if a safetensors file says that it is a checkpoint.
    pub fn recognises(file: &TensorFile) -> bool {
        file.metadata("format") == Some(FORMAT)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Names of the buffers.
    pub fn names(&self) -> Vec<String> {
        self.file.names()
    }

    /// The JSON part.
    pub fn state(&self) -> &Value {
        &self.state
    }

    /// Copies a buffer of f32; bits are kept, whatever they mean.
    pub fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let bytes = self.buffer(name, Dtype::F32, out.len())?.bytes;
        bytemuck::cast_slice_mut(out).copy_from_slice(bytes);
        Ok(())
    }

    /// Copies a buffer of bfloat16; bits are kept, whatever they mean.
    pub fn read_bf16(&self, name: &str, out: &mut [bf16]) -> Result<()> {
        let bytes = self.buffer(name, Dtype::BF16, out.len())?.bytes;
        bytemuck::cast_slice_mut(out).copy_from_slice(bytes);
        Ok(())
    }

    /// Copies a buffer of u64.
    pub fn read_u64(&self, name: &str, out: &mut [u64]) -> Result<()> {
        let bytes = self.buffer(name, Dtype::U64, out.len())?.bytes;
        bytemuck::cast_slice_mut(out).copy_from_slice(bytes);
        Ok(())
    }

    fn buffer<'a>(&'a self, name: &'a str, dtype: Dtype, len: usize) -> Result<TensorData<'a>> {
        let tensor = self.file.tensor(name)?;
        tensor.expect_shape(&[len])?;
        if tensor.dtype != dtype {
            let why = format!("expected {dtype:?}, found {:?}", tensor.dtype);
            return Err(Error::tensor(self.path(), name, why));
        }
        Ok(tensor)
    }
}

/// Path of the checkpoint of a step.
pub fn step_path(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("step-{step:09}.safetensors"))
}

/// Steps of the checkpoints in a directory, in increasing order; none if there is no such directory.
pub fn steps(dir: &Path) -> Result<Vec<u64>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(Error::io("list", dir, e)),
    };
    let mut steps = vec![];
    for entry in entries {
        let name = entry.map_err(|e| Error::io("list", dir, e))?.file_name();
        let number = name.to_str().and_then(|n| n.strip_prefix("step-")?.strip_suffix(".safetensors"));
        steps.extend(number.and_then(|n| n.parse::<u64>().ok()));
    }
    steps.sort_unstable();
    Ok(steps)
}

/// Saves the checkpoint of a step in a directory, and then removes all but the `keep`
/// newest (at least this one). Checkpoints of later steps are removed as well: they
/// belong to a run that was given up when this one went back.
pub fn save_step(
    dir: &Path,
    step: u64,
    buffers: &[(&str, Values<'_>)],
    state: &Value,
    keep: usize,
) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))?;
    save(&step_path(dir, step), buffers, state)?;
    let (before, after): (Vec<u64>, Vec<u64>) = steps(dir)?.into_iter().partition(|&s| s <= step);
    let old = before.len().saturating_sub(keep.max(1));
    for gone in before[..old].iter().chain(&after) {
        let path = step_path(dir, *gone);
        std::fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
    }
    Ok(())
}

/// The newest checkpoint of a directory that is whole, with its step. Damaged ones are
/// stepped over with a warning; if all are damaged, that is an error.
pub fn latest(dir: &Path) -> Result<Option<(u64, Checkpoint)>> {
    let mut failed = None;
    for step in steps(dir)?.into_iter().rev() {
        match Checkpoint::load(&step_path(dir, step)) {
            Ok(checkpoint) => return Ok(Some((step, checkpoint))),
            Err(e) => {
                tracing::warn!("{e}; trying the checkpoint before it");
                failed.get_or_insert(e);
            }
        }
    }
    failed.map_or(Ok(None), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn sample(step: u64) -> (Vec<f32>, Vec<bf16>, [u64; 1]) {
        let f: Vec<f32> = (0..123).map(|i| (i as f32 + step as f32).sin()).chain([f32::NAN, -0.0]).collect();
        (f.clone(), f[..5].iter().map(|&x| bf16::from_f32(x)).collect(), [u64::MAX - step])
    }

    fn write(dir: &Path, step: u64, keep: usize) {
        let (f, h, u) = sample(step);
        let buffers = [("m", Values::F32(&f)), ("h", Values::Bf16(&h)), ("u", Values::U64(&u))];
        save_step(dir, step, &buffers, &json!({"step": step, "order": [1, 2]}), keep).unwrap();
    }

    #[test]
    fn every_bit_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        assert!(latest(&dir.path().join("none")).unwrap().is_none());
        write(dir.path(), 7, 2);
        let (step, found) = latest(dir.path()).unwrap().unwrap();
        let (mut f, mut h, mut u) = (vec![0.0; 125], vec![bf16::ZERO; 5], [0]);
        found.read_f32("m", &mut f).unwrap();
        found.read_bf16("h", &mut h).unwrap();
        found.read_u64("u", &mut u).unwrap();
        let want = sample(7);
        assert_eq!(f.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), {
            want.0.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        });
        assert_eq!((step, h, u), (7, want.1, want.2));
        assert_eq!(found.state()["order"], json!([1, 2]));
        let message = found.read_f32("m", &mut f[1..]).unwrap_err().to_string();
        assert!(message.contains("[124]") && message.contains("[125]"), "{message}");
        assert!(found.read_f32("h", &mut [0.0; 5]).unwrap_err().to_string().contains("BF16"));
        assert!(found.read_f32("v", &mut f).unwrap_err().to_string().contains("`v`"));
    }

    #[test]
    fn the_newest_whole_one_counts_and_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        (1..=4).for_each(|step| write(dir.path(), step, 2));
        assert_eq!(steps(dir.path()).unwrap(), [3, 4]);
        let path = step_path(dir.path(), 4);
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() - 100;
        bytes[middle] ^= 4;
        std::fs::write(&path, &bytes).unwrap();
        assert!(Checkpoint::load(&path).unwrap_err().to_string().contains("checksum"));
        assert_eq!(latest(dir.path()).unwrap().unwrap().0, 3);
        std::fs::write(step_path(dir.path(), 3), &bytes[..50]).unwrap();
        let message = latest(dir.path()).unwrap_err().to_string();
        assert!(message.contains("step-000000004"), "{message}");
        write(dir.path(), 2, 0);
        assert_eq!(steps(dir.path()).unwrap(), [2], "only the one just written is kept");
    }

    #[test]
    fn a_changed_state_or_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 1, 1);
        let path = step_path(dir.path(), 1);
        let whole = std::fs::read(&path).unwrap();
        for (from, to, say) in
            [("[1,2]", "[1,3]", "checksum"), (r#""version":"1""#, r#""version":"2""#, "version 2")]
        {
            let at = whole.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
            let mut other = whole.clone();
            other[at..at + to.len()].copy_from_slice(to.as_bytes());
            std::fs::write(&path, &other).unwrap();
            let message = Checkpoint::load(&path).unwrap_err().to_string();
            assert!(message.contains(say), "{message}");
        }
    }
}
