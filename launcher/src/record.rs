//! What makes a stage repeatable: `record.json` in the directory that it writes.
//!
//! A stage opens its directory with the settings and inputs that its result depends on.
//! The record says whether the result is there and intact ([`State::Finished`]), must be
//! made or completed ([`State::Open`]), or belongs to other settings, which is refused
//! with the lines that differ. Finished files are known by their checksums.
//!
//! While a directory is open no other process can open it (see [`crate::progress`]).
//! For ranks that work together in one directory, rank 0 opens it ([`open_for_all`]).

use crate::cluster::World;
use crate::failure::refused;
use crate::progress::{Guest, LOCK_FILE, Place};
use anyhow::{Context, Result, bail};
use gradtx_runtime::artifact::{checksum_file, write_json};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

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
    /// Checksums of the finished files; empty while there is work to do.
    pub outputs: BTreeMap<String, String>,
    /// Their sizes in bytes: what can be compared at a glance.
    #[serde(default)]
    pub sizes: BTreeMap<String, u64>,
}

/// Whether there is work to do.
pub enum State {
    /// The result is there and intact.
    Finished,
    /// There is work to do; [`Output::finish`] ends it.
    Open(Output),
}

/// Whether there is work to do for the ranks of a world.
pub enum SharedState {
    /// The result is there and intact.
    Finished,
    /// There is work to do; [`Seat::finish`] ends it.
    Open(Seat),
}

/// What a rank is in a directory that several work in.
pub enum Seat {
    /// Rank 0, which has the directory open.
    Host(Output),
    /// Any other.
    Guest(Guest),
}

impl Seat {
    /// Ends the work of this rank. The host notes the finished files, as [`Output::finish`] does.
    pub fn finish(self, files: &[String]) -> Result<()> {
        match self {
            Self::Host(output) => output.finish(files)?,
            Self::Guest(guest) => guest.finish(),
        }
        Ok(())
    }
}

/// A directory that a stage is writing to, and that no other process can open meanwhile.
pub struct Output {
    dir: PathBuf,
    record: Box<Record>,
    place: Place,
}

/// Makes a directory, unless it is there.
pub fn make_dir(dir: &Path) -> Result<()> {
    let in_the_way = dir.ancestors().find(|above| above.exists()).filter(|above| !above.is_dir());
    if let Some(file) = in_the_way {
        bail!("{}: cannot make this directory: {} is a file", dir.display(), file.display());
    }
    std::fs::create_dir_all(dir).with_context(|| format!("{}: cannot make this directory", dir.display()))
}

/// Opens a stage's directory; makes it when it is not there.
pub fn open(dir: &Path, stage: &str, settings: Value) -> Result<State> {
    make_dir(dir)?;
    let mut record = Record::new(stage, &settings)?;
    let before = read_same(dir, &record)?;
    if before.as_ref().is_some_and(|before| before.is_whole(dir)) {
        // Killed when nothing was left to do but to leave. A process that is about to do so still
        // has the lock, and where nothing can be written, nothing needs to be tidied.
        if dir.join(LOCK_FILE).exists()
            && let Ok(place) = Place::open(dir, stage)
        {
            place.finish();
        }
        return Ok(State::Finished);
    }
    let place = Place::open(dir, stage)?;
    // Another process may have finished here just before the place was ours.
    let now = read_same(dir, &record)?;
    if now != before && now.as_ref().is_some_and(|now| now.is_whole(dir)) {
        place.finish();
        return Ok(State::Finished);
    }
    gradtx_runtime::artifact::sweep_temporary(dir)?;
    if let Some(before) = now {
        record.version = before.version;
    }
    let output = Output { dir: dir.to_owned(), record, place };
    output.write()?;
    Ok(State::Open(output))
}

/// [`open`] for all ranks of a world: rank 0 opens the directory, the others learn what it
/// found. Fails on all of them unless all have the same settings and inputs.
pub fn open_for_all(world: &World, dir: &Path, stage: &str, settings: Value) -> Result<SharedState> {
    let comm = world.comm();
    let mut first = settings.to_string().into_bytes();
    comm.broadcast_bytes(0, &mut first)?;
    let first: Value = serde_json::from_slice(&first)?;
    let lines = diff(&first, &serde_json::from_str(&settings.to_string())?);
    if !lines.is_empty() {
        let hint = "all nodes must see the same models and data";
        return Err(refused("this rank has other inputs than rank 0", lines, hint));
    }
    // Nothing is touched before all ranks have come here.
    comm.barrier()?;
    let state = if comm.rank() == 0 { Some(open(dir, stage, settings)?) } else { None };
    let mut is_open = vec![matches!(state, Some(State::Open(_))) as u8];
    comm.broadcast_bytes(0, &mut is_open)?;
    Ok(match state {
        Some(State::Open(output)) => SharedState::Open(Seat::Host(output)),
        None if is_open == [1] => SharedState::Open(Seat::Guest(Guest::of(dir, stage))),
        _ => SharedState::Finished,
    })
}

/// Opens a stage's directory beside other processes that do the same work there, and that
/// know by themselves who does what. `name` tells this one from the others.
pub fn share(dir: &Path, stage: &str, settings: Value, name: &str) -> Result<State> {
    make_dir(dir)?;
    let record = Record::new(stage, &settings)?;
    let before = read_same(dir, &record)?;
    if before.as_ref().is_some_and(|before| before.is_whole(dir)) {
        return Ok(State::Finished);
    }
    let place = Place::share(dir, stage, name)?;
    // Others may have begun, and written the same.
    if before.is_none() {
        write_json(&dir.join(RECORD_FILE), &*record)?;
    }
    Ok(State::Open(Output { dir: dir.to_owned(), record, place }))
}

/// The record in a directory, if there is one; refused if it is of another stage or settings.
fn read_same(dir: &Path, wanted: &Record) -> Result<Option<Record>> {
    let path = dir.join(RECORD_FILE);
    if !path.is_file() {
        return Ok(None);
    }
    let before = read(&path)?;
    if (&before.stage, &before.settings) == (&wanted.stage, &wanted.settings) {
        return Ok(Some(before));
    }
    let mut lines = String::new();
    if before.stage != wanted.stage {
        lines += &format!("  - stage = {}\n  + stage = {}\n", before.stage, wanted.stage);
    }
    lines += &diff(&before.settings, &wanted.settings);
    let what = format!("{}: holds a result of other settings or inputs", dir.display());
    Err(refused(what, lines, "write to another directory, or remove this one to make it anew"))
}

/// Reads a record.
pub fn read(path: &Path) -> Result<Record> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}: cannot read", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{}: not a record of a stage", path.display()))
}

impl Record {
    fn new(stage: &str, settings: &Value) -> Result<Box<Self>> {
        Ok(Box::new(Self {
            stage: stage.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            // As it reads back from its file: numbers may lose their last digit on the way.
            settings: serde_json::from_str(&settings.to_string())?,
            outputs: BTreeMap::new(),
            sizes: BTreeMap::new(),
        }))
    }

    /// Files that are missing or differ from what was finished.
    pub fn damaged(&self, dir: &Path) -> Vec<String> {
        let broken = |(name, sum): &(&String, &String)| {
            checksum_file(&dir.join(name)).map_or(true, |found| found != **sum)
        };
        self.outputs.iter().filter(broken).map(|(name, _)| name.clone()).collect()
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
    fn is_whole(&self, dir: &Path) -> bool {
        !self.outputs.is_empty() && self.damaged(dir).is_empty()
    }
}

impl Output {
    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Ends this process's part of work that is shared ([`share`]); what is to be done when
    /// everything is done remains.
    pub fn leave(self) {
        self.place.finish();
    }

    /// Notes that these files, relative to the directory, are the finished result.
    pub fn finish(mut self, files: &[String]) -> Result<()> {
        for name in files {
            let path = self.dir.join(name);
            self.record.outputs.insert(name.clone(), checksum_file(&path)?);
            let size =
                std::fs::metadata(&path).with_context(|| format!("{}: cannot look at", path.display()))?;
            self.record.sizes.insert(name.clone(), size.len());
        }
        self.write()?;
        self.place.finish();
        Ok(())
    }

    fn write(&self) -> Result<()> {
        Ok(write_json(&self.dir.join(RECORD_FILE), &*self.record)?)
    }
}

/// The leaves of two JSON values that differ, as lines `- key = before` and `+ key = now`.
fn diff(before: &Value, now: &Value) -> String {
    let (mut a, mut b) = (BTreeMap::new(), BTreeMap::new());
    leaves("", before, &mut a);
    leaves("", now, &mut b);
    let mut lines = String::new();
    let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
    keys.sort();
    keys.dedup();
    for key in keys.into_iter().filter(|key| a.get(*key) != b.get(*key)) {
        for (sign, side) in [('-', &a), ('+', &b)] {
            if let Some(value) = side.get(key) {
                lines += &format!("  {sign} {key} = {value}\n");
            }
        }
    }
    lines
}

fn leaves(at: &str, value: &Value, out: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(entries) => {
            for (key, inner) in entries {
                let key = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                leaves(&key, inner, out);
            }
        }
        other => {
            out.insert(at.to_string(), other.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn opened(dir: &Path, settings: Value) -> Output {
        match open(dir, "test", settings).unwrap() {
            State::Open(output) => output,
            State::Finished => panic!("expected work to do"),
        }
    }

    #[test]
    fn finished_work_is_recognised_and_damage_reopens_it() {
        let dir = tempfile::tempdir().unwrap();
        let output = opened(dir.path(), json!({"a": 1}));
        std::fs::write(dir.path().join("x"), "result").unwrap();
        output.finish(&["x".into()]).unwrap();
        let finished = || matches!(open(dir.path(), "test", json!({"a": 1})).unwrap(), State::Finished);
        assert!(finished());
        // As a kill leaves it after the last thing that was done.
        for name in [LOCK_FILE, "progress.json"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        assert!(finished());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "the record and the result");
        std::fs::write(dir.path().join("x"), "resulT").unwrap();
        opened(dir.path(), json!({"a": 1}));
    }

    #[test]
    fn other_settings_are_refused_with_a_diff() {
        let dir = tempfile::tempdir().unwrap();
        opened(dir.path(), json!({"a": {"lr": 1}, "b": 2}));
        let message = open(dir.path(), "test", json!({"a": {"lr": 3}, "b": 2})).err().unwrap().to_string();
        assert!(message.contains("- a.lr = 1\n  + a.lr = 3"), "{message}");
        assert!(!message.contains("b ="), "{message}");
    }
}
