//! [`Record`]: what a stage's directory holds, as `record.json` says it.

use crate::failure::failed;
use anyhow::{Context, Result};
use gradtx_runtime::artifact::{MAX_CONFIG_BYTES, checksum, checksum_file, read_text, write_atomic};
use gradtx_runtime::text::shown;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Component, Path};

/// Name of the record in a stage's directory.
pub const RECORD_FILE: &str = "record.json";

/// What a stage's directory holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The stage that writes here.
    pub stage: String,
    /// Program version of the first run.
    pub version: String,
    /// Settings and inputs that the result depends on.
    pub settings: Value,
    /// Devices and libraries that computed any of it, in all attempts, where its bits depend on them: none on CPUs.
    /// Work may continue with others.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub computed_on: BTreeSet<String>,
    /// What was assumed about data and models where nothing was set, a line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub assumed: Vec<String>,
    /// Checksums of the finished files by their names, relative to the directory and within it;
    /// empty while there is work to do.
    pub outputs: BTreeMap<String, String>,
    /// Their sizes in bytes: what can be compared at a glance.
    #[serde(default)]
    pub sizes: BTreeMap<String, u64>,
    /// Checksum of the record's text with nothing in this place. The last entry of the file.
    #[serde(default)]
    pub(super) xxh3: String,
}

/// What stands before the checksum in the text of a record.
const SEAL: &str = "\"xxh3\": \"";

/// Reads a record.
///
/// # Errors
/// When it is not the text that a stage wrote, or names files outside of its directory.
pub fn read(path: &Path) -> Result<Record> {
    let text = read_text(path, MAX_CONFIG_BYTES)?;
    let place = shown(path);
    let record: Record =
        serde_json::from_str(&text).with_context(|| format!("{place}: not a record of a stage"))?;
    let again = "remove the directory, and run the stage again";
    let mut names = record.outputs.keys().chain(record.sizes.keys());
    if let Some(name) = names.find(|name| !is_within(name)) {
        let what = format!("{place}: names the file `{name}`; expected files within its directory");
        return Err(failed(what, again));
    }
    let why = match seal(&text) {
        // One that lists no files says nothing that could be believed.
        None if record.outputs.is_empty() => return Ok(record),
        None => "has no checksum: an older version of gradtx wrote it, or another program".into(),
        Some((found, want)) if found != want => {
            format!("damaged, or changed by hand: its checksum is {found}, written was {want}")
        }
        Some(_) => return Ok(record),
    };
    Err(failed(format!("{place}: {why}"), again))
}

/// Whether a file's name stays within the directory that it is relative to.
fn is_within(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// The checksum of a record's text without its checksum, and the one that stands there.
fn seal(text: &str) -> Option<(String, &str)> {
    let at = text.rfind(SEAL)? + SEAL.len();
    let want = text[at..].split('"').next()?;
    let without = [&text[..at], &text[at + want.len()..]].concat();
    Some((checksum(without.as_bytes()), want)).filter(|_| !want.is_empty())
}

impl Record {
    pub(super) fn new(stage: &str, settings: &Value) -> Result<Box<Self>> {
        Ok(Box::new(Self {
            stage: stage.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            // As it reads back from its file: numbers may lose their last digit on the way.
            settings: serde_json::from_str(&settings.to_string())?,
            computed_on: BTreeSet::new(),
            assumed: vec![],
            outputs: BTreeMap::new(),
            sizes: BTreeMap::new(),
            xxh3: String::new(),
        }))
    }

    /// Writes the record of a directory, with its checksum.
    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(&Self { xxh3: String::new(), ..self.clone() })? + "\n";
        let sum = checksum(text.as_bytes());
        let at = text.rfind(SEAL).context("a record is written with a place for its checksum")?;
        text.insert_str(at + SEAL.len(), &sum);
        Ok(write_atomic(&dir.join(RECORD_FILE), |out| out.write_all(text.as_bytes()))?)
    }

    /// Finished files that are missing or differ from what was finished, of those that `used`
    /// names; several are read at a time.
    pub fn problems(&self, dir: &Path, used: impl Fn(&str) -> bool) -> Vec<String> {
        let used: Vec<(&String, &String)> = self.outputs.iter().filter(|(name, _)| used(name)).collect();
        used.into_par_iter().filter_map(|(name, sum)| problem(dir, name, sum)).collect()
    }

    /// Names of the files that are missing or differ from what was finished.
    pub fn damaged(&self, dir: &Path) -> Vec<String> {
        let all: Vec<(&String, &String)> = self.outputs.iter().collect();
        let broken = |(name, sum): &(&String, &String)| problem(dir, name, sum).is_some();
        all.into_par_iter().filter(broken).map(|(name, _)| name.clone()).collect()
    }

    /// Files that are missing or have another size than what was finished: a look at the
    /// directory alone, whatever the files hold.
    pub fn missing(&self, dir: &Path) -> Vec<String> {
        let lacks = |name: &&String| match std::fs::metadata(dir.join(name)) {
            Ok(found) => self.sizes.get(*name).is_some_and(|size| *size != found.len()),
            Err(_) => true,
        };
        self.outputs.keys().filter(lacks).cloned().collect()
    }

    /// Finished, and nothing is damaged.
    pub(super) fn is_whole(&self, dir: &Path) -> bool {
        !self.outputs.is_empty() && self.damaged(dir).is_empty()
    }
}

/// What is wrong with a finished file, if anything: it is not there, is not what its checksum
/// is of, or lies elsewhere by way of a link.
fn problem(dir: &Path, name: &str, want: &str) -> Option<String> {
    let path = dir.join(name);
    let found = match checksum_file(&path) {
        Ok(found) => found,
        Err(error) => return Some(error.to_string()),
    };
    let is_here = match (dir.canonicalize(), path.canonicalize()) {
        (Ok(dir), Ok(path)) => path.starts_with(dir),
        _ => false,
    };
    let why = match () {
        () if found != want => format!("damaged: its checksum is {found}, written was {want}"),
        () if !is_here => "is a link to a file outside of its directory".into(),
        () => return None,
    };
    Some(format!("{}: {why}", shown(&path)))
}
