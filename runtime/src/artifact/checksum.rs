//! Checksums (XXH3, 128 bits, in hex) of bytes and files, and fingerprints of models.
//!
//! They find accidents: truncated copies, mixed-up models, flipped bits. They are no
//! protection against someone who wants two files to look the same.

use super::read::open_regular;
use super::{TensorSource, json::read_json, write_atomic};
use crate::{Error, Result};
use serde_json::Value;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// Entries of config.json that do not change what a model computes: who wrote the
/// file, with what, and how it is to be loaded.
const NOT_MATHEMATICS: [&str; 7] = [
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

/// Checksum of bytes.
pub fn checksum(bytes: &[u8]) -> String {
    format!("{:032x}", xxh3_128(bytes))
}

/// Checksum of a file, read in pieces.
pub fn checksum_file(path: &Path) -> Result<String> {
    checksum_files(&[path])
}

/// Checksum of the bytes of several files, one after the other.
pub fn checksum_files(paths: &[impl AsRef<Path>]) -> Result<String> {
    let mut hash = Xxh3::new();
    let mut block = vec![0; 1 << 20];
    for path in paths.iter().map(AsRef::as_ref) {
        let mut file = open_regular(path)?;
        loop {
            match file.read(&mut block).map_err(|e| Error::io("read", path, e))? {
                0 => break,
                n => hash.update(&block[..n]),
            }
        }
    }
    Ok(format!("{:032x}", hash.digest128()))
}

/// Copies a file whose checksum is known; the copy is there whole or not at all.
///
/// # Errors
/// When the file is not what the checksum is of. Then there is no copy, and what stood in its
/// place stays.
pub fn copy_checked(from: &Path, to: &Path, want: &str) -> Result<()> {
    let mut file = open_regular(from)?;
    let mut found = String::new();
    let copied = write_atomic(to, |out| {
        let mut hash = Xxh3::new();
        let mut block = vec![0; 1 << 20];
        loop {
            match file.read(&mut block)? {
                0 => break,
                n => {
                    hash.update(&block[..n]);
                    out.write_all(&block[..n])?;
                }
            }
        }
        found = format!("{:032x}", hash.digest128());
        if found == want { Ok(()) } else { Err(std::io::Error::other("the source is damaged")) }
    });
    if !found.is_empty() && found != want {
        return Err(Error::file(from, format!("damaged: its checksum is {found}, written was {want}")));
    }
    copied
}

/// Fingerprint of a model directory: what its config.json says about the mathematics,
/// and name, type, shape and bytes of every tensor. It does not depend on how tensors
/// are spread over files, nor on the order of anything.
///
/// `threads` share the reading, tensor by tensor.
pub fn fingerprint(dir: &Path, threads: usize) -> Result<String> {
    let mut config = read_json(&dir.join("config.json"))?;
    if let Some(entries) = config.as_object_mut() {
        entries.retain(|key, _| !NOT_MATHEMATICS.contains(&key.as_str()));
    }
    let source = TensorSource::open(dir)?;
    let names = source.names();
    let tensors = hash_tensors(&source, &names, threads)?;
    let mut whole = Xxh3::new();
    whole.update(sorted(config).to_string().as_bytes());
    tensors.iter().for_each(|hash| whole.update(&hash.to_le_bytes()));
    Ok(format!("{:032x}", whole.digest128()))
}

/// One hash per tensor, in the order of `names`.
fn hash_tensors(source: &TensorSource, names: &[&str], threads: usize) -> Result<Vec<u128>> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, u128)>> {
        let mut done = vec![];
        while let Some((at, name)) = take(&next, names) {
            let tensor = source.tensor(name)?;
            let mut hash = Xxh3::new();
            hash.update(format!("{name} {:?} {:?}\n", tensor.dtype, tensor.shape).as_bytes());
            hash.update(tensor.bytes);
            done.push((at, hash.digest128()));
        }
        Ok(done)
    };
    let mut hashes = vec![0; names.len()];
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            let done = worker.join().expect("hashing does not panic")?;
            done.into_iter().for_each(|(at, hash)| hashes[at] = hash);
        }
        Ok(hashes)
    })
}

fn take<'a>(next: &AtomicUsize, names: &[&'a str]) -> Option<(usize, &'a str)> {
    let at = next.fetch_add(1, Ordering::Relaxed);
    names.get(at).map(|name| (at, *name))
}

/// The same value with the keys of all objects in order.
fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.into_iter().map(|(k, v)| (k, sorted(v))).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(entries.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::write_tensors;
    use safetensors::Dtype;
    use std::collections::BTreeMap;

    fn model(dir: &Path, config: &str, files: &[(&str, &[(&str, [f32; 2])])]) -> String {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("config.json"), config).unwrap();
        let mut index = serde_json::Map::new();
        for (file, tensors) in files {
            let tensors: Vec<_> = tensors
                .iter()
                .map(|(name, x)| (name.to_string(), Dtype::F32, vec![2], bytemuck::bytes_of(x)))
                .collect();
            tensors.iter().for_each(|t| _ = index.insert(t.0.clone(), (*file).into()));
            write_tensors(&dir.join(file), &tensors, &BTreeMap::new()).unwrap();
        }
        if files.len() > 1 {
            let text = serde_json::json!({ "weight_map": index }).to_string();
            std::fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
        }
        fingerprint(dir, 3).unwrap()
    }

    #[test]
    fn known_answer_and_streaming() {
        // The reference implementation's value for empty input.
        assert_eq!(checksum(b""), "99aa06d3014798d86001c324468d497f");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let bytes: Vec<u8> = (0..3_000_001u32).map(|i| (i * 7 % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(checksum_file(&path).unwrap(), checksum(&bytes));
        assert_eq!(checksum_files(&[&path, &path]).unwrap(), checksum(&bytes.repeat(2)));
        assert!(checksum_file(&dir.path().join("none")).unwrap_err().to_string().contains("none"));
    }

    #[test]
    fn a_damaged_file_is_not_copied() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        std::fs::write(&from, "value").unwrap();
        std::fs::write(&to, "before").unwrap();
        let message = copy_checked(&from, &to, &checksum(b"valuE")).unwrap_err().to_string();
        assert!(message.contains("from") && message.contains("damaged"), "{message}");
        assert_eq!(std::fs::read(&to).unwrap(), b"before");
        copy_checked(&from, &to, &checksum(b"value")).unwrap();
        assert_eq!(std::fs::read(&to).unwrap(), b"value");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file is left");
        assert!(copy_checked(&dir.path().join("none"), &to, "").is_err());
    }

    #[test]
    fn what_is_no_regular_file_has_no_checksum() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for (path, say) in [(&*pipe, "a named pipe"), (Path::new("/dev/zero"), "a device")] {
            assert!(checksum_file(path).unwrap_err().to_string().contains(say));
        }
        let empty = dir.path().join("empty");
        std::fs::write(&empty, "").unwrap();
        assert_eq!(checksum_file(&empty).unwrap(), checksum(b""));
    }

    #[test]
    fn a_fingerprint_is_of_the_model_not_of_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (("a", [1.0, 2.0]), ("b", [3.0, -0.5]));
        let config = r#"{"hidden_size": 2, "rope": {"x": 1, "y": 2}, "use_cache": true}"#;
        let one = model(&dir.path().join("one"), config, &[("model.safetensors", &[a, b])]);
        let other = r#"{"rope": {"y": 2, "x": 1}, "hidden_size": 2, "transformers_version": "4"}"#;
        let two = model(&dir.path().join("two"), other, &[("1.safetensors", &[b]), ("2.safetensors", &[a])]);
        assert_eq!(one, two);
        let changes: [(&str, (&str, [f32; 2])); 3] = [
            (r#"{"hidden_size": 3, "rope": {"x": 1, "y": 2}}"#, b),
            (config, ("b", [3.0, -0.25])),
            (config, ("c", [3.0, -0.5])),
        ];
        for (i, (config, b)) in changes.into_iter().enumerate() {
            let found = model(&dir.path().join(i.to_string()), config, &[("model.safetensors", &[a, b])]);
            assert_ne!(found, one, "change {i} is not seen");
        }
    }
}
