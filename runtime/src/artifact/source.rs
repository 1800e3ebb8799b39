//! [`TensorSource`]: the tensors of a model, in one file or in several that an index names.

use super::{TensorData, TensorFile, not_a_model};
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The tensors of a model: `model.safetensors`, or the shards of `model.safetensors.index.json`.
#[derive(Debug)]
pub struct TensorSource {
    origin: PathBuf,
    files: Vec<TensorFile>,
    place: HashMap<String, usize>,
}

impl TensorSource {
    /// Opens a file, or a directory in the Hugging Face layout. Every shard that the
    /// index names must be there and hold the tensors that the index says.
    ///
    /// # Errors
    /// Where a directory holds two sets of weights, or none, that is said.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_file() {
            return Self::from_files(path, vec![TensorFile::open(path)?]);
        }
        let [index, single] = [INDEX, SINGLE].map(|name| path.join(name));
        let is_there = |file: &Path| file.symlink_metadata().is_ok();
        if !is_there(&index) && !is_there(&single) {
            return Err(not_a_model(path));
        }
        let map = if is_there(&index) { read_index(&index)? } else { BTreeMap::new() };
        let shards: BTreeSet<&str> = map.values().map(String::as_str).collect();
        one_set_of_weights(path, &shards, is_there(&single))?;
        if map.is_empty() {
            return Self::from_files(path, vec![TensorFile::open(&single)?]);
        }
        let mut files = Vec::with_capacity(shards.len());
        for shard in shards {
            let file = path.join(shard);
            if !is_there(&file) {
                let why = format!(
                    "this shard is named in {INDEX} but missing: an incomplete download; fetch it again"
                );
                return Err(Error::file(&file, why));
            }
            files.push(TensorFile::open(&file)?);
        }
        let source = Self::from_files(path, files)?;
        for (tensor, shard) in &map {
            match source.place.get(tensor) {
                Some(&at) if source.files[at].path().ends_with(shard) => {}
                _ => {
                    return Err(Error::tensor(
                        &path.join(shard),
                        tensor,
                        "the index promises it in this shard",
                    ));
                }
            }
        }
        Ok(source)
    }

    fn from_files(origin: &Path, files: Vec<TensorFile>) -> Result<Self> {
        let mut place = HashMap::new();
        for (i, file) in files.iter().enumerate() {
            for name in file.names() {
                if let Some(before) = place.insert(name.clone(), i) {
                    let why = format!("also in {}", files[before].path().display());
                    return Err(Error::tensor(file.path(), &name, why));
                }
            }
        }
        Ok(Self { origin: origin.to_owned(), files, place })
    }

    /// The file or directory that was opened.
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// The files behind it, sorted by name.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.place.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// True if there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.place.contains_key(name)
    }

    /// A tensor by its name.
    pub fn tensor<'a>(&'a self, name: &'a str) -> Result<TensorData<'a>> {
        match self.place.get(name) {
            Some(&at) => self.files[at].tensor(name),
            None => Err(Error::tensor(&self.origin, name, "there is no tensor of that name")),
        }
    }
}

/// Fails where a directory holds weights beside those that would be read: the shards that the
/// index names, or the single file. Which of two sets is meant, nobody can say; transformers
/// would take the single file.
fn one_set_of_weights(dir: &Path, shards: &BTreeSet<&str>, has_single: bool) -> Result<()> {
    let two = |first: &str, second: &str| {
        let why = format!(
            "holds two sets of weights, {first} and {second}; only one can be meant: move the other away"
        );
        Err(Error::file(dir, why))
    };
    if has_single && !shards.is_empty() && !shards.contains(SINGLE) {
        return two(SINGLE, INDEX);
    }
    let entries = std::fs::read_dir(dir).map_err(|e| Error::io("list", dir, e))?;
    let mut names: Vec<String> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    match names.iter().find(|name| is_shard(name) && !shards.contains(name.as_str())) {
        None => Ok(()),
        Some(other) if shards.is_empty() => two(SINGLE, other),
        Some(other) => two(&format!("the shards of {INDEX}"), &format!("{other}, which it does not name")),
    }
}

/// `model-00001-of-00002.safetensors`.
fn is_shard(name: &str) -> bool {
    let numbers = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    numbers.and_then(|n| n.split_once("-of-")).is_some_and(|(a, b)| is_number(a) && is_number(b))
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let value = super::read_json(path)?;
    let entries = value.get("weight_map").and_then(|map| map.as_object()).filter(|map| !map.is_empty());
    let entries =
        entries.ok_or_else(|| Error::file(path, "expected an object `weight_map` that names tensors"))?;
    entries
        .iter()
        .map(|(tensor, shard)| {
            let is_name =
                |s: &&str| !s.is_empty() && !s.contains(['/', '\\', '\0']) && !["..", "."].contains(s);
            let shard = shard.as_str().filter(is_name).ok_or_else(|| {
                let why =
                    format!("`weight_map.{tensor}` = {shard}: expected the name of a file beside the index");
                Error::file(path, why)
            })?;
            Ok((tensor.clone(), shard.to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::write_tensors;
    use safetensors::Dtype;

    fn write(dir: &Path, file: &str, tensors: &[&str]) {
        let list: Vec<_> =
            tensors.iter().map(|t| (t.to_string(), Dtype::F32, vec![1], &[0u8; 4][..])).collect();
        write_tensors(&dir.join(file), &list, &BTreeMap::new()).unwrap();
    }

    fn index(dir: &Path, entries: &[(&str, &str)]) {
        let map: serde_json::Map<String, serde_json::Value> =
            entries.iter().map(|(t, f)| (t.to_string(), (*f).into())).collect();
        let text = serde_json::json!({"metadata": {"total_size": 8}, "weight_map": map}).to_string();
        std::fs::write(dir.join(INDEX), text).unwrap();
    }

    const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

    /// A directory of two shards.
    fn sharded() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), SHARDS[0], &["a"]);
        write(dir.path(), SHARDS[1], &["b"]);
        index(dir.path(), &[("a", SHARDS[0]), ("b", SHARDS[1])]);
        dir
    }

    fn refused(dir: &Path, words: &[&str]) {
        let message = TensorSource::open(dir).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(message.contains(word), "no `{word}` in: {message}"));
    }

    #[test]
    fn one_set_is_read_whatever_else_lies_beside_it() {
        let dir = sharded();
        // What other loaders read: their own formats and names.
        write(dir.path(), "consolidated.safetensors", &["layers.0.attention.wq.weight"]);
        write(dir.path(), "model.fp16.safetensors", &["a"]);
        std::fs::write(dir.path().join("pytorch_model.bin"), "PK").unwrap();
        assert_eq!(TensorSource::open(dir.path()).unwrap().names(), ["a", "b"]);
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), SINGLE, &["a", "b"]);
        index(dir.path(), &[("a", SINGLE), ("b", SINGLE)]);
        assert_eq!(TensorSource::open(dir.path()).unwrap().names(), ["a", "b"]);
    }

    #[test]
    fn two_sets_of_weights_are_refused() {
        let dir = sharded();
        write(dir.path(), SINGLE, &["a", "b"]);
        refused(dir.path(), &["two sets", SINGLE, INDEX]);
        std::fs::remove_file(dir.path().join(INDEX)).unwrap();
        refused(dir.path(), &["two sets", SINGLE, SHARDS[0]]);
        let dir = sharded();
        write(dir.path(), "model-00001-of-00003.safetensors", &["a"]);
        refused(dir.path(), &["model-00001-of-00003", "does not name"]);
    }

    #[test]
    fn indices_that_name_absent_files_are_refused() {
        let dir = sharded();
        std::fs::remove_file(dir.path().join(SHARDS[1])).unwrap();
        refused(dir.path(), &[SHARDS[1], "missing"]);
        std::os::unix::fs::symlink("../../blobs/123", dir.path().join(SHARDS[1])).unwrap();
        refused(dir.path(), &[SHARDS[1], "link to ../../blobs/123"]);
        let dir = sharded();
        write(dir.path(), SHARDS[1], &["c"]);
        refused(dir.path(), &["`b`", SHARDS[1]]);
        write(dir.path(), SHARDS[1], &["a", "b"]);
        refused(dir.path(), &["`a`", "also in"]);
        for name in ["../a.safetensors", "", ".."] {
            index(dir.path(), &[("a", name)]);
            refused(dir.path(), &[INDEX, "weight_map.a"]);
        }
        index(dir.path(), &[]);
        refused(dir.path(), &[INDEX, "weight_map"]);
    }
}
