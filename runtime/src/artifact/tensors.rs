//! Safetensors files: reading with errors that name file and tensor,
//! and atomic, byte-reproducible writing.
//!
//! Values are converted while they are copied to their place (`bf16`, `f16`, `f32` and `f64`
//! to `f32`). Files of moderate size are read into own memory, so that nobody changes them
//! between a check and their use; larger ones are mapped.

use super::mapped::Content;
use crate::{Error, Result};
use half::{f16, slice::HalfFloatSliceExt};
use safetensors::{Dtype, SafeTensorError, SafeTensors, tensor::Metadata};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Bytes of a header at most. Those of the largest published files are below 1 MiB.
const MAX_HEADER_BYTES: u64 = 32 << 20;
/// Tensors of a file at most.
const MAX_TENSORS: usize = 200_000;

/// An open safetensors file.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    content: Content,
    header: Metadata,
    data_start: usize,
}

/// One tensor in a file.
#[derive(Clone, Debug)]
pub struct TensorData<'a> {
    /// Its file.
    pub path: &'a Path,
    /// Its name.
    pub name: &'a str,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape, row-major.
    pub shape: &'a [usize],
    /// Its bytes, little-endian.
    pub bytes: &'a [u8],
}

impl TensorFile {
    /// Opens a file and checks its header against its length. A file of at most 64 MiB is read
    /// into memory.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Err(Error::file(path, "is a directory; expected a safetensors file"));
        }
        Self::parse(path, Content::open(path)?)
    }

    /// The same, but a file of any size is mapped: for files that are open in large numbers.
    pub fn map(path: &Path) -> Result<Self> {
        Self::parse(path, Content::map(path)?)
    }

    fn parse(path: &Path, content: Content) -> Result<Self> {
        check_header_size(path, &content)?;
        let (header_len, header) = SafeTensors::read_metadata(&content).map_err(|e| {
            let why = match e {
                SafeTensorError::MetadataIncompleteBuffer | SafeTensorError::InvalidHeaderLength => {
                    format!(
                        "truncated or overlong: its header promises another length than {}",
                        content.len()
                    )
                }
                other => format!("not an intact safetensors file: {other}"),
            };
            Error::file(path, why)
        })?;
        let data_start = header_len + 8;
        Ok(Self { path: path.to_owned(), content, header, data_start })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file.
    pub fn size(&self) -> usize {
        self.content.len()
    }

    /// All bytes of the file.
    pub fn bytes(&self) -> &[u8] {
        &self.content
    }

    /// What stands before the first tensor: the header and its length.
    pub fn header(&self) -> &[u8] {
        &self.content[..self.data_start]
    }

    /// Names of all tensors, in file order: they follow each other without gaps.
    pub fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    /// An entry of the file's own metadata.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.header.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// The file's own metadata, sorted by key.
    pub fn all_metadata(&self) -> BTreeMap<&str, &str> {
        let entries = self.header.metadata().iter().flatten();
        entries.map(|(k, v)| (k.as_str(), v.as_str())).collect()
    }

    /// A tensor by its name.
    pub fn tensor<'a>(&'a self, name: &'a str) -> Result<TensorData<'a>> {
        let info = self
            .header
            .info(name)
            .ok_or_else(|| Error::tensor(&self.path, name, "there is no tensor of that name in this file"))?;
        let (start, end) = info.data_offsets;
        let bytes = &self.content[self.data_start + start..self.data_start + end];
        Ok(TensorData { path: &self.path, name, dtype: info.dtype, shape: &info.shape, bytes })
    }
}

impl TensorData<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True for a tensor without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fails unless the shape is this one.
    pub fn expect_shape(&self, shape: &[usize]) -> Result<()> {
        if self.shape == shape {
            return Ok(());
        }
        Err(self.error(format!("expected shape {shape:?}, found {:?}", self.shape)))
    }

    /// Converts to f32 into `out`; fails on another length, type, or a value that is not finite.
    pub fn read_f32(&self, out: &mut [f32]) -> Result<()> {
        if out.len() != self.len() {
            return Err(self.error(format!("expected {} values, found {}", out.len(), self.len())));
        }
        self.read_f32_from(0, out)
    }

    /// The same of as many elements as `out` has room for, from element `from` on.
    ///
    /// # Panics
    /// When the tensor ends before.
    pub(crate) fn read_f32_from(&self, from: usize, out: &mut [f32]) -> Result<()> {
        let size = self.dtype.bitsize() / 8;
        let bytes = &self.bytes[from * size..(from + out.len()) * size];
        match self.dtype {
            Dtype::F32 => convert(bytes, out, f32::from_le_bytes),
            Dtype::F64 => convert(bytes, out, |b| f64::from_le_bytes(b) as f32),
            Dtype::F16 => convert_half(bytes, out, f16::from_le_bytes, |h, o| h.convert_to_f32_slice(o)),
            Dtype::BF16 => convert(bytes, out, |b| f32::from_bits((u16::from_le_bytes(b) as u32) << 16)),
            other => {
                return Err(self.error(format!(
                    "expected floating-point values (BF16, F16, F32 or F64), found {other:?}"
                )));
            }
        }
        if all_finite(out) {
            return Ok(());
        }
        let (at, value) =
            out.iter().enumerate().find(|(_, x)| !x.is_finite()).expect("one of them is not finite");
        Err(self.error(format!("value {value} at element {} is not a finite number", from + at)))
    }

    /// A new vector of f32, with the checks of [`Self::read_f32`].
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.len()];
        self.read_f32(&mut out)?;
        Ok(out)
    }

    /// Integers (I32, I64, U32) as u32.
    pub fn to_u32(&self) -> Result<Vec<u32>> {
        let wide: Vec<i64> = match self.dtype {
            Dtype::I32 => words(self.bytes, |b| i32::from_le_bytes(b) as i64),
            Dtype::U32 => words(self.bytes, |b| u32::from_le_bytes(b) as i64),
            Dtype::I64 => words(self.bytes, i64::from_le_bytes),
            other => return Err(self.error(format!("expected integers (I32, U32 or I64), found {other:?}"))),
        };
        wide.into_iter()
            .map(|x| u32::try_from(x).map_err(|_| self.error(format!("{x} is not in the range of u32"))))
            .collect()
    }

    fn error(&self, why: String) -> Error {
        Error::tensor(self.path, self.name, why)
    }
}

/// Fails on a header that would take long to read, before it is read.
fn check_header_size(path: &Path, content: &[u8]) -> Result<()> {
    let Some((length, rest)) = content.split_first_chunk::<8>() else { return Ok(()) };
    let length = u64::from_le_bytes(*length);
    if length > rest.len() as u64 {
        let kind = not_safetensors(content);
        let why = kind.unwrap_or_else(|| match length <= MAX_HEADER_BYTES {
            true => format!("truncated: its header takes {length} bytes, the file has {}", content.len()),
            false => "not an intact safetensors file: it does not begin with the length of a header".into(),
        });
        return Err(Error::file(path, why));
    }
    if length > MAX_HEADER_BYTES {
        let why = format!("its header has {length} bytes; at most {MAX_HEADER_BYTES} are read");
        return Err(Error::file(path, why));
    }
    const ENTRY: &[u8] = b"\"data_offsets\"";
    let tensors = rest[..length as usize].windows(ENTRY.len()).filter(|window| *window == ENTRY).count();
    if tensors > MAX_TENSORS {
        let why = format!("its header names {tensors} tensors; at most {MAX_TENSORS} are read");
        return Err(Error::file(path, why));
    }
    Ok(())
}

/// What a file is whose first bytes are known, and how its content gets into safetensors.
fn not_safetensors(content: &[u8]) -> Option<String> {
    let kinds: [(&[u8], &str); 5] = [
        (b"PK\x03\x04", "a file of torch.save (or another zip archive)"),
        (b"\x80\x02", "a pickled file of Python"),
        (b"GGUF", "a GGUF file"),
        (b"\x89HDF", "an HDF5 file"),
        (b"<", "a web page: an address that did not lead to the file"),
    ];
    let (_, kind) = kinds.into_iter().find(|(begin, _)| content.starts_with(begin))?;
    Some(format!("is {kind}, not a safetensors file"))
}

/// Whether all values are finite numbers: a loop without exits, which vectorises.
fn all_finite(values: &[f32]) -> bool {
    // Of a value that is not, all bits of the exponent are set: one more there carries into the sign.
    let carry = |x: f32| (x.to_bits() & 0x7FFF_FFFF) + 0x0080_0000;
    values.iter().fold(0, |carries, &x| carries | carry(x)) >> 31 == 0
}

fn words<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.chunks_exact(N).map(|c| f(c.try_into().expect("chunks_exact gives N bytes"))).collect()
}

fn convert<const N: usize>(bytes: &[u8], out: &mut [f32], f: impl Fn([u8; N]) -> f32) {
    for (o, c) in out.iter_mut().zip(bytes.chunks_exact(N)) {
        *o = f(c.try_into().expect("chunks_exact gives N bytes"));
    }
}

/// Half-precision values by blocks, so that the vector conversion of `half` is used
/// although file bytes need not be aligned.
fn convert_half<H: Copy>(
    bytes: &[u8],
    out: &mut [f32],
    parse: impl Fn([u8; 2]) -> H,
    widen: impl Fn(&[H], &mut [f32]),
) {
    let mut block = Vec::with_capacity(4096);
    for (o, b) in out.chunks_mut(4096).zip(bytes.chunks(2 * 4096)) {
        block.clear();
        block.extend(b.chunks_exact(2).map(|c| parse([c[0], c[1]])));
        widen(&block, o);
    }
}

/// A tensor to be written: name, element type, shape, little-endian bytes.
pub type NewTensor<'a> = (String, Dtype, Vec<usize>, &'a [u8]);

/// Writes a safetensors file: under a temporary name in the same directory, synced,
/// then renamed. The same input gives the same bytes (metadata is sorted by key;
/// tensors keep their order within one element size, wider types first).
pub fn write_tensors(
    path: &Path,
    tensors: &[NewTensor<'_>],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let mut order: Vec<&NewTensor<'_>> = tensors.iter().collect();
    order.sort_by_key(|(_, dtype, _, _)| std::cmp::Reverse(dtype.bitsize()));
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), json!(metadata));
    }
    let mut offset = 0;
    for (name, dtype, shape, bytes) in &order {
        let want = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        if bytes.len() != want {
            return Err(Error::tensor(
                path,
                name,
                format!("shape {shape:?} of {dtype:?} takes {want} bytes, got {}", bytes.len()),
            ));
        }
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + want]});
        if header.insert(name.clone(), entry).is_some() {
            return Err(Error::tensor(path, name, "given twice"));
        }
        offset += want;
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    super::write_atomic(path, |out| {
        out.write_all(&(text.len() as u64).to_le_bytes())?;
        out.write_all(&text)?;
        order.iter().try_for_each(|(_, _, _, bytes)| out.write_all(bytes))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn sample(dir: &Path) -> PathBuf {
        let path = dir.join("a.safetensors");
        let values: Vec<u8> = [1.5f32, -2.0, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        let halves: Vec<u8> = [0.5f32, 8.0].iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        let tensors = [
            ("h".into(), Dtype::BF16, vec![2, 1], &halves[..]),
            ("x".into(), Dtype::F32, vec![3], &values[..]),
        ];
        let metadata = [("b", "2"), ("a", "1")].map(|(k, v)| (k.to_string(), v.to_string()));
        write_tensors(&path, &tensors, &metadata.into()).unwrap();
        path
    }

    #[test]
    fn what_is_written_reads_back_and_is_reproducible() {
        let dir = tempfile::tempdir().unwrap();
        let path = sample(dir.path());
        let first = std::fs::read(&path).unwrap();
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.tensor("x").unwrap().to_f32().unwrap(), [1.5, -2.0, 3.0]);
        assert_eq!(file.tensor("h").unwrap().to_f32().unwrap(), [0.5, 8.0]);
        assert_eq!(file.metadata("a"), Some("1"));
        assert_eq!(std::fs::read(sample(dir.path())).unwrap(), first);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = sample(dir.path());
        let whole = std::fs::read(&path).unwrap();
        for keep in [0, 4, 20, whole.len() - 1] {
            std::fs::write(&path, &whole[..keep]).unwrap();
            let message = TensorFile::open(&path).unwrap_err().to_string();
            assert!(message.contains("a.safetensors"), "{message}");
        }
    }

    #[test]
    fn absurd_headers_are_refused_before_they_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let refused = |header: &[u8], claimed: u64, word: &str| {
            let mut bytes = claimed.to_le_bytes().to_vec();
            bytes.extend_from_slice(header);
            std::fs::write(&path, bytes).unwrap();
            let message = TensorFile::open(&path).unwrap_err().to_string();
            assert!(message.contains("a.safetensors") && message.contains(word), "{message}");
        };
        let entries: Vec<String> = (0..MAX_TENSORS + 1)
            .map(|i| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#))
            .collect();
        let many = format!("{{{}}}", entries.join(","));
        refused(many.as_bytes(), many.len() as u64, "tensors; at most");
        let long = vec![b' '; MAX_HEADER_BYTES as usize + 1];
        refused(&long, long.len() as u64, "at most");
        refused(b"{}", 1000, "truncated");
        refused(b"{}", u64::MAX, "does not begin");
        refused(&[b'['; 100_000], 100_000, "intact");
        std::fs::write(&path, "GGUF\x03\0\0\0\0\0\0\0\0").unwrap();
        assert!(TensorFile::open(&path).unwrap_err().to_string().contains("GGUF"));
        std::fs::write(&path, "PK\x03\x04 and the rest of an archive").unwrap();
        assert!(TensorFile::open(&path).unwrap_err().to_string().contains("torch.save"));
    }

    #[test]
    fn parts_of_a_tensor_are_those_of_the_whole() {
        let values: Vec<f32> = (0..50).map(|i| bf16::from_f32(i as f32 * 0.37 - 9.0).to_f32()).collect();
        let each =
            |bytes: &dyn Fn(f32) -> Vec<u8>| values.iter().flat_map(|&x| bytes(x)).collect::<Vec<u8>>();
        for (dtype, bytes) in [
            (Dtype::F32, each(&|x| x.to_le_bytes().to_vec())),
            (Dtype::F64, each(&|x| f64::from(x).to_le_bytes().to_vec())),
            (Dtype::BF16, each(&|x| bf16::from_f32(x).to_le_bytes().to_vec())),
        ] {
            let shape = [5, 10];
            let tensor = TensorData { path: Path::new("x"), name: "w", dtype, shape: &shape, bytes: &bytes };
            assert_eq!(tensor.to_f32().unwrap(), values, "{dtype:?}");
            let mut part = [0.0; 7];
            tensor.read_f32_from(41, &mut part).unwrap();
            assert_eq!(part, values[41..48], "{dtype:?}");
        }
    }

    #[test]
    fn every_value_that_is_not_finite_is_found() {
        let finite = [0.0, -0.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-42, -1.0];
        assert!(all_finite(&finite) && all_finite(&[]));
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7F80_0001)] {
            for at in 0..finite.len() {
                let mut values = finite;
                values[at] = bad;
                assert!(!all_finite(&values), "{bad} at {at}");
            }
        }
    }

    #[test]
    fn values_that_are_not_numbers_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nan.safetensors");
        let values: Vec<u8> = [1.0f32, f32::NAN].iter().flat_map(|x| x.to_le_bytes()).collect();
        write_tensors(&path, &[("w".into(), Dtype::F32, vec![2], &values)], &BTreeMap::new()).unwrap();
        let message = TensorFile::open(&path).unwrap().tensor("w").unwrap().to_f32().unwrap_err().to_string();
        assert!(message.contains("`w`") && message.contains("element 1"), "{message}");
    }
}
