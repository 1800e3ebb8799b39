//! [`UpdateVector`]: what a model learned, as one matrix `[L, d]` and where it is from.
//!
//! Row j is block j's change: the flat tensors of the trained adapter less those of
//! the initial adapter, in the order of the block layout; of B alone where A is frozen. It is all that leaves a
//! client, so the file says everything that is needed to use it rightly: which
//! base model and layout it belongs to, from which initial adapter it is counted,
//! and what privacy guarantee it carries. A checksum over all of that and the values finds
//! what was damaged on its way.

use super::privacy::Privacy;
use super::space::UpdateSpace;
use super::{NewTensor, TensorFile, write_tensors};
use crate::{Error, Result};
use safetensors::Dtype;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use xxhash_rust::xxh3::Xxh3;

const FORMAT: &str = "gradtx.update";
/// Version 1 had no checksum.
const VERSION: &str = "2";
const TENSOR: &str = "update";
/// The client's consent to refinement, in the metadata: there only where it is given.
const REFINEMENT: &str = "refinement";
const ALLOWED: &str = "allowed";
/// `true` in the metadata where A is frozen; not there where it is trained.
const FREEZE_A: &str = "freeze_a";
/// Checksum of the values and of all other metadata, in the metadata.
const CHECKSUM: &str = "xxh3";
/// Bytes of an update at most. LoRA of rank 64 on every matrix of a model of 70 billion
/// parameters has 3.3 GB.
const MAX_BYTES: u64 = 64 << 30;

/// Where an update comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct UpdateMeta {
    /// Which models and adapters it fits.
    pub space: UpdateSpace,
    /// Examples that it was trained on.
    pub examples: u64,
    /// What it reveals.
    pub privacy: Privacy,
    /// Its client agrees that the model with this update is asked for answers to public prompts, on which
    /// a translation may be trained.
    pub refinement: bool,
}

/// An update and where it comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct UpdateVector {
    /// Where it comes from.
    pub meta: UpdateMeta,
    /// `[L, d]`
    pub values: Vec<f32>,
}

impl UpdateVector {
    /// Fails unless the values are `[L, d]` finite numbers.
    pub fn check(&self) -> Result<()> {
        let UpdateSpace { blocks, width, .. } = self.meta.space;
        if self.values.len() != self.meta.space.values() || self.values.is_empty() {
            let why = format!("expected {blocks} blocks of {width} values, found {}", self.values.len());
            return Err(Error::invalid("update vector", why));
        }
        match self.values.iter().position(|x| !x.is_finite()) {
            None => Ok(()),
            Some(at) => {
                let (block, value) = (at / width, self.values[at]);
                let why = format!("value {value} in block {block} is not a finite number");
                Err(Error::invalid("update vector", why))
            }
        }
    }

    /// Writes the file, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<()> {
        self.check().map_err(|e| Error::file(path, format!("not written: {e}")))?;
        let UpdateMeta { space, examples, privacy, refinement } = &self.meta;
        let shape = vec![space.blocks, space.width];
        let bytes = super::little_endian(&self.values);
        let tensor: NewTensor<'_> = (TENSOR.into(), Dtype::F32, shape, &bytes);
        let privacy = match privacy {
            Privacy::None => "none".into(),
            stated => to_json(path, stated)?,
        };
        let mut metadata: BTreeMap<String, String> = [
            ("format", FORMAT.into()),
            ("version", VERSION.into()),
            ("layout", space.layout.clone()),
            ("base_model", space.base_model.clone()),
            ("targets", to_json(path, &space.targets)?),
            ("rank", space.rank.to_string()),
            ("alpha", space.alpha.to_string()),
            ("init", space.init.clone()),
            ("examples", examples.to_string()),
            ("privacy", privacy),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
        if *refinement {
            metadata.insert(REFINEMENT.into(), ALLOWED.into());
        }
        if space.freeze_a {
            metadata.insert(FREEZE_A.into(), "true".into());
        }
        let entries = metadata.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let sum = checksum(entries, [space.blocks, space.width], &bytes);
        metadata.insert(CHECKSUM.into(), sum);
        write_tensors(path, &[tensor], &metadata)
    }

    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<Self> {
        UpdateFile::open(path)?.read()
    }

    /// True if a safetensors file says that it is an update vector.
    pub fn recognises(file: &TensorFile) -> bool {
        file.metadata("format") == Some(FORMAT)
    }
}

/// Checksum of an update file: its metadata but for the checksum itself, its shape, its values.
fn checksum<'a>(
    metadata: impl Iterator<Item = (&'a str, &'a str)>,
    shape: [usize; 2],
    bytes: &[u8],
) -> String {
    let mut hash = Xxh3::new();
    for (key, value) in metadata.filter(|(key, _)| *key != CHECKSUM) {
        hash.update(format!("{} {key} {} {value}\n", key.len(), value.len()).as_bytes());
    }
    hash.update(format!("{shape:?}\n").as_bytes());
    hash.update(bytes);
    format!("{:032x}", hash.digest128())
}

/// An update file of which only the header is read: what it says about itself, before its
/// values take memory and time.
#[derive(Debug)]
pub struct UpdateFile {
    file: TensorFile,
    meta: UpdateMeta,
}

impl UpdateFile {
    /// Opens a file and reads what it says about itself.
    pub fn open(path: &Path) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let metadata = file.all_metadata();
        let entry = |key| metadata.get(key).copied().unwrap_or("missing");
        let (format, version) = (entry("format"), entry("version"));
        if format != FORMAT {
            let why = format!("not an update vector: metadata `format` is {format}, expected {FORMAT}");
            return Err(Error::file(path, why));
        }
        if version != VERSION {
            let why = format!(
                "update vector of version {version}; this program reads version {VERSION}; \
                 `gradtx finetune` or `translate` makes it again"
            );
            return Err(Error::file(path, why));
        }
        let tensor = file.tensor(TENSOR)?;
        let &[blocks, width] = tensor.shape else {
            let why = format!("expected shape [L, d], found {:?}", tensor.shape);
            return Err(Error::tensor(path, TENSOR, why));
        };
        if tensor.dtype != Dtype::F32 {
            return Err(Error::tensor(path, TENSOR, format!("expected F32, found {:?}", tensor.dtype)));
        }
        let space = UpdateSpace {
            blocks,
            width,
            layout: text(path, &metadata, "layout")?.into(),
            base_model: text(path, &metadata, "base_model")?.into(),
            targets: parsed(path, &metadata, "targets")?,
            rank: parsed(path, &metadata, "rank")?,
            alpha: parsed(path, &metadata, "alpha")?,
            freeze_a: metadata.contains_key(FREEZE_A) && parsed(path, &metadata, FREEZE_A)?,
            init: text(path, &metadata, "init")?.into(),
        };
        let privacy = match text(path, &metadata, "privacy")? {
            "none" => Privacy::None,
            _ => parsed(path, &metadata, "privacy")?,
        };
        let refinement = metadata.get(REFINEMENT) == Some(&ALLOWED);
        let meta = UpdateMeta { space, examples: parsed(path, &metadata, "examples")?, privacy, refinement };
        Ok(Self { file, meta })
    }

    /// What it says about itself.
    pub fn meta(&self) -> &UpdateMeta {
        &self.meta
    }

    /// Fails if it is larger than any update of an adapter.
    pub fn check_size(&self) -> Result<()> {
        let tensor = self.file.tensor(TENSOR)?;
        if tensor.bytes.len() as u64 <= MAX_BYTES {
            return Ok(());
        }
        let why = format!("shape {:?}: larger than any update of an adapter", tensor.shape);
        Err(Error::tensor(self.file.path(), TENSOR, why))
    }

    /// Reads the values.
    ///
    /// # Errors
    /// When it is too large, a value is not a finite number, or the file is not what was written.
    pub fn read(self) -> Result<UpdateVector> {
        self.check_size()?;
        let path = self.file.path();
        let tensor = self.file.tensor(TENSOR)?;
        let update = UpdateVector { values: tensor.to_f32()?, meta: self.meta };
        update.check().map_err(|e| Error::file(path, e.to_string()))?;
        let UpdateSpace { blocks, width, .. } = update.meta.space;
        let metadata = self.file.all_metadata();
        let want = text(path, &metadata, CHECKSUM)?;
        let entries = metadata.iter().map(|(key, value)| (*key, *value));
        let found = checksum(entries, [blocks, width], tensor.bytes);
        if found != want {
            let why = format!("damaged: its checksum is {found}, written was {want}; copy it again");
            return Err(Error::file(path, why));
        }
        Ok(update)
    }
}

fn to_json<T: Serialize>(path: &Path, value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::file(path, format!("cannot be put into JSON: {e}")))
}

fn text<'a>(path: &Path, metadata: &BTreeMap<&str, &'a str>, key: &str) -> Result<&'a str> {
    let found = metadata.get(key).copied();
    found.ok_or_else(|| Error::file(path, format!("update vector without `{key}` in its metadata")))
}

fn parsed<T: serde::de::DeserializeOwned>(
    path: &Path,
    metadata: &BTreeMap<&str, &str>,
    key: &str,
) -> Result<T> {
    let value = text(path, metadata, key)?;
    serde_json::from_str(value)
        .map_err(|e| Error::file(path, format!("metadata `{key}` is `{value}`, which cannot be read: {e}")))
}

#[cfg(test)]
mod tests {
    use super::super::privacy::{Generator, Neighbours};
    use super::super::space::tests::space;
    use super::*;

    fn sample() -> UpdateVector {
        let values = (0..15).map(|i| (i as f32 - 7.3) * 1e-3).collect();
        let meta =
            UpdateMeta { space: space(3, 5), examples: 1024, privacy: Privacy::None, refinement: false };
        UpdateVector { meta, values }
    }

    fn private() -> Privacy {
        Privacy::DpSgd {
            epsilon: 0.1,
            delta: 1e-5,
            sigma: 1.25,
            sampling_rate: 0.015625,
            steps: 200,
            clip_norm: 1.0,
            neighbours: Neighbours::AddOrRemoveOneExample,
            accountant: "pld".into(),
            generator: Generator::ChaCha20,
        }
    }

    #[test]
    fn reads_back_with_all_it_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("u.safetensors");
        for (privacy, refinement) in [(Privacy::None, false), (private(), true)] {
            let mut update = sample();
            update.meta.refinement = refinement;
            update.meta.privacy = privacy;
            update.write(&path).unwrap();
            assert_eq!(UpdateVector::read(&path).unwrap(), update);
            let first = std::fs::read(&path).unwrap();
            update.write(&path).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), first);
        }
    }

    #[test]
    fn an_update_of_b_alone_says_so_and_is_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("u.safetensors");
        let (whole, mut of_b) = (sample(), sample());
        of_b.meta.space.freeze_a = true;
        of_b.write(&path).unwrap();
        assert_eq!(UpdateVector::read(&path).unwrap(), of_b);
        let (whole, of_b) = (&whole.meta.space, &of_b.meta.space);
        let message = whole.expect_same(of_b, "it").unwrap_err().to_string();
        assert!(message.contains("expected A and B") && message.contains("found B alone"), "{message}");
        assert!(of_b.expect_same(whole, "it").unwrap_err().to_string().contains("found A and B"));
        assert!(of_b.expect_same(of_b, "it").is_ok());
        let json = serde_json::to_string(whole).unwrap();
        assert!(!json.contains("freeze_a"), "{json}");
    }

    #[test]
    fn what_is_not_an_update_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("u.safetensors");
        let mut update = sample();
        update.values[7] = f32::NAN;
        let message = update.write(&path).unwrap_err().to_string();
        assert!(message.contains("block 1") && !path.exists(), "{message}");
        update.values.pop();
        assert!(update.write(&path).is_err());

        sample().write(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        assert!(UpdateVector::read(&path).unwrap_err().to_string().contains("truncated"));
        // NaN in the last value, and an unknown version, at the same lengths.
        let mut nan = whole.clone();
        let at = nan.len() - 4;
        nan[at..].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(&path, &nan).unwrap();
        assert!(UpdateVector::read(&path).unwrap_err().to_string().contains("finite"));
        for (from, to, say) in
            [(r#""version":"2""#, r#""version":"9""#, "version"), (r#""rank":"2""#, r#""rank":"x""#, "rank")]
        {
            let at = whole.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
            let mut other = whole.clone();
            other[at..at + to.len()].copy_from_slice(to.as_bytes());
            std::fs::write(&path, &other).unwrap();
            let message = UpdateVector::read(&path).unwrap_err().to_string();
            assert!(message.contains(say), "{message}");
        }
    }

    #[test]
    fn wrong_shapes_and_foreign_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("u.safetensors");
        let tensor: NewTensor<'_> = (TENSOR.into(), Dtype::F32, vec![4], &[0; 16]);
        write_tensors(&path, std::slice::from_ref(&tensor), &BTreeMap::new()).unwrap();
        assert!(UpdateVector::read(&path).unwrap_err().to_string().contains("not an update vector"));
        let says = [("format", FORMAT), ("version", VERSION)].map(|(k, v)| (k.to_owned(), v.to_owned()));
        write_tensors(&path, &[tensor], &says.into()).unwrap();
        assert!(UpdateVector::read(&path).unwrap_err().to_string().contains("[L, d]"));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("u.safetensors");
        sample().write(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            for bit in [at % 8, (at + 5) % 8] {
                let mut other = whole.clone();
                other[at] ^= 1 << bit;
                std::fs::write(&path, &other).unwrap();
                let found = UpdateVector::read(&path);
                assert!(found.is_err(), "bit {bit} of byte {at} of {}", whole.len());
            }
        }
        std::fs::write(&path, &whole).unwrap();
        assert_eq!(UpdateVector::read(&path).unwrap(), sample());
    }

    #[test]
    fn a_header_is_read_without_the_values() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("u.safetensors");
        sample().write(&path).unwrap();
        let file = UpdateFile::open(&path).unwrap();
        assert_eq!(file.meta(), &sample().meta);
        assert_eq!(file.read().unwrap(), sample());
        // A file of holes takes no room on the disk, whatever it claims to hold.
        let whole = std::fs::read(&path).unwrap();
        let header = String::from_utf8(whole[8..whole.len() - 60].to_vec()).unwrap();
        let (len, values) = (1u64 << 39, 1u64 << 37);
        let large = header.trim_end().replace("[3,5]", &format!("[1,{values}]"));
        let large = large.replace("[0,60]", &format!("[0,{len}]"));
        let mut file = std::fs::File::create(&path).unwrap();
        std::io::Write::write_all(&mut file, &(large.len() as u64).to_le_bytes()).unwrap();
        std::io::Write::write_all(&mut file, large.as_bytes()).unwrap();
        file.set_len(8 + large.len() as u64 + len).unwrap();
        let message = UpdateVector::read(&path).unwrap_err().to_string();
        assert!(message.contains("larger than any update"), "{message}");
    }

    #[test]
    fn an_update_without_a_checksum_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("u.safetensors");
        sample().write(&path).unwrap();
        for (from, to, say) in
            [(r#""xxh3""#, r#""xxh4""#, "xxh3"), (r#""version":"2""#, r#""version":"1""#, "makes it again")]
        {
            let mut bytes = std::fs::read(&path).unwrap();
            let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
            std::fs::write(dir.path().join("other"), &bytes).unwrap();
            let message = UpdateVector::read(&dir.path().join("other")).unwrap_err().to_string();
            assert!(message.contains(say), "{message}");
        }
    }
}
