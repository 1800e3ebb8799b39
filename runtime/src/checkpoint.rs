//! Checkpoints: everything needed to continue bit-identically.
//!
//! [`Checkpoint`] is a file: safetensors of named flat buffers (parameters, moments,
//! counters), with the rest of the state as JSON in its metadata and a checksum over all of
//! it. It is written under a temporary name and renamed, so it is there whole or not at all.
//!
//! [`Parts`] is the checkpoint of a step: one file of every rank, each with what that rank
//! owns of the flat buffers. It counts when all are there, and can be read by any number of
//! ranks.

mod parts;

pub use parts::{Parts, Saved, part_path, remove_others, save_part, saved};

use crate::artifact::{NewTensor, TensorData, TensorFile, write_tensors};
use crate::{Error, Result};
use half::bf16;
use safetensors::Dtype;
use serde_json::Value;
use std::path::Path;
use xxhash_rust::xxh3::Xxh3;

const FORMAT: &str = "gradtx.checkpoint";
/// Version 1 had no shapes and types in its checksum.
const VERSION: &str = "2";

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
    let buffers =
        tensors.iter().map(|(name, dtype, shape, bytes)| (name.as_str(), *dtype, &shape[..], *bytes));
    let checksum = checksum(&state, buffers);
    let metadata =
        [("format", FORMAT.into()), ("version", VERSION.into()), ("state", state), ("xxh3", checksum)];
    write_tensors(path, &tensors, &metadata.map(|(k, v)| (k.to_owned(), v)).into())
}

/// A buffer as its file has it: name, type, shape, bytes.
type Buffer<'a> = (&'a str, Dtype, &'a [usize], &'a [u8]);

/// Over the state and every buffer with all that the header says of it, by name.
fn checksum<'a>(state: &str, buffers: impl Iterator<Item = Buffer<'a>>) -> String {
    let mut buffers: Vec<_> = buffers.collect();
    buffers.sort_by_key(|(name, ..)| *name);
    let mut hash = Xxh3::new();
    hash.update(format!("{}\n{state}", state.len()).as_bytes());
    for (name, dtype, shape, bytes) in buffers {
        hash.update(format!("\n{} {name} {dtype:?} {shape:?}\n", name.len()).as_bytes());
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
        let found = checksum(text, tensors.iter().map(|t| (t.name, t.dtype, t.shape, t.bytes)));
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

    /// Elements of a buffer.
    pub fn len_of(&self, name: &str) -> Result<usize> {
        Ok(self.file.tensor(name)?.len())
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

    /// Copies elements of a buffer of `len` f32, from element `from` on.
    fn read_f32_from(&self, name: &str, len: usize, from: usize, out: &mut [f32]) -> Result<()> {
        let bytes = self.buffer(name, Dtype::F32, len)?.bytes;
        let bytes = &bytes[4 * from..4 * (from + out.len())];
        bytemuck::cast_slice_mut(out).copy_from_slice(bytes);
        Ok(())
    }

    /// Copies a buffer of bfloat16; bits are kept, whatever they mean.
    #[cfg(test)]
    pub(crate) fn read_bf16(&self, name: &str, out: &mut [bf16]) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn sample(step: u64) -> (Vec<f32>, Vec<bf16>, [u64; 1]) {
        let f: Vec<f32> = (0..123).map(|i| (i as f32 + step as f32).sin()).chain([f32::NAN, -0.0]).collect();
        (f.clone(), f[..5].iter().map(|&x| bf16::from_f32(x)).collect(), [u64::MAX - step])
    }

    fn write(path: &Path) {
        let (f, h, u) = sample(7);
        let buffers = [("m", Values::F32(&f)), ("h", Values::Bf16(&h)), ("u", Values::U64(&u))];
        save(path, &buffers, &json!({"step": 7, "order": [1, 2]})).unwrap();
    }

    #[test]
    fn every_bit_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.safetensors");
        write(&path);
        let found = Checkpoint::load(&path).unwrap();
        let (mut f, mut h, mut u) = (vec![0.0; 125], vec![bf16::ZERO; 5], [0]);
        found.read_f32("m", &mut f).unwrap();
        found.read_bf16("h", &mut h).unwrap();
        found.read_u64("u", &mut u).unwrap();
        let want = sample(7);
        assert_eq!(f.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), {
            want.0.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        });
        assert_eq!((h, u), (want.1, want.2));
        assert_eq!(found.state()["order"], json!([1, 2]));
        let message = found.read_f32("m", &mut f[1..]).unwrap_err().to_string();
        assert!(message.contains("[124]") && message.contains("[125]"), "{message}");
        assert!(found.read_f32("h", &mut [0.0; 5]).unwrap_err().to_string().contains("BF16"));
        assert!(found.read_f32("v", &mut f).unwrap_err().to_string().contains("`v`"));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.safetensors");
        write(&path);
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut other = whole.clone();
            other[at] ^= 1 << (at % 8);
            std::fs::write(&path, &other).unwrap();
            assert!(Checkpoint::load(&path).is_err(), "byte {at} of {}", whole.len());
        }
        std::fs::write(&path, &whole).unwrap();
        assert_eq!(Checkpoint::load(&path).unwrap().len_of("m").unwrap(), 125);
    }

    #[test]
    fn a_changed_state_or_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.safetensors");
        write(&path);
        let whole = std::fs::read(&path).unwrap();
        for (from, to, say) in
            [("[1,2]", "[1,3]", "checksum"), (r#""version":"2""#, r#""version":"3""#, "version 3")]
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
