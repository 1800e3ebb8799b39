//! What makes a stage repeatable: `record.json` in the directory that it writes.
//!
//! A stage opens its directory with the settings and inputs that its result depends on.
//! The record says whether the result is there and intact ([`State::Finished`]), must be
//! made or completed ([`State::Open`]), or belongs to other settings, which is refused
//! with the lines that differ. Finished files are known by their checksums, and the record
//! itself by one of its own text: what it says is believed by the stages after this one.
//!
//! While a directory is open no other process can open it (see [`crate::progress`]).
//! For ranks that work together in one directory, rank 0 opens it (`open_for_all`).
//!
//! * file: the record itself, its checksum, and what is wrong with finished files.
//! * diff: the lines that differ.

mod diff;
mod file;
#[cfg(test)]
mod tests;

pub use diff::{diff, leaves};
pub use file::{RECORD_FILE, Record, read};

use crate::failure::refused;
use crate::progress::{DirLock, Guest, LOCK_FILE};
use anyhow::{Context, Result, bail};
use gradtx_runtime::artifact::{checksum_file, sweep_temporary, sweep_tree};
use gradtx_runtime::comm::Comm;
use gradtx_runtime::text::shown;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What to do where a directory holds a result of other settings, unless its stage knows better.
pub const OTHER_SETTINGS: &str = "write to another directory, or remove this one to start over";

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
    /// There is work to do; [`StageHandle::finish`] ends it.
    Open(StageHandle),
}

/// What a rank is in a directory that several work in.
pub enum StageHandle {
    /// Rank 0, which has the directory open.
    Leader(Output),
    /// Any other.
    Follower(Guest),
}

impl StageHandle {
    /// [`Output::computed_on`], by the host.
    pub fn computed_on(&mut self, devices: BTreeSet<String>) -> Result<()> {
        match self {
            Self::Leader(output) => output.computed_on(devices),
            Self::Follower(_) => Ok(()),
        }
    }

    /// [`Output::assume`], by the host.
    pub fn assume(&mut self, lines: Vec<String>) -> Result<()> {
        match self {
            Self::Leader(output) => output.assume(lines),
            Self::Follower(_) => Ok(()),
        }
    }

    /// Ends the work of this rank. The host notes the finished files, as [`Output::finish`] does.
    pub fn finish(self, files: &[String]) -> Result<()> {
        match self {
            Self::Leader(output) => output.finish(files)?,
            Self::Follower(guest) => guest.finish(),
        }
        Ok(())
    }
}

/// A directory that a stage is writing to, and that no other process can open meanwhile.
pub struct Output {
    dir: PathBuf,
    record: Box<Record>,
    place: DirLock,
}

/// Makes a directory, unless it is there.
pub fn make_dir(dir: &Path) -> Result<()> {
    let in_the_way = dir.ancestors().find(|above| above.exists()).filter(|above| !above.is_dir());
    if let Some(file) = in_the_way {
        bail!("{}: cannot make this directory: {} is a file", shown(dir), shown(file));
    }
    std::fs::create_dir_all(dir).with_context(|| format!("{}: cannot make this directory", shown(dir)))
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
            && let Ok(place) = DirLock::open(dir, stage)
        {
            place.finish();
        }
        // What a killed process left is not worth an error where the result is there.
        let _ = sweep_temporary(dir);
        return Ok(State::Finished);
    }
    let place = DirLock::open(dir, stage)?;
    // Another process may have finished here just before the place was ours.
    let now = read_same(dir, &record)?;
    if now != before && now.as_ref().is_some_and(|now| now.is_whole(dir)) {
        place.finish();
        return Ok(State::Finished);
    }
    sweep(dir, &place)?;
    if let Some(before) = now {
        record.version = before.version;
        record.computed_on = before.computed_on;
    }
    let output = Output { dir: dir.to_owned(), record, place };
    output.write()?;
    Ok(State::Open(output))
}

/// Removes the temporary files of processes before this one: all of them where the lock says
/// that nobody else is here, otherwise those that are older than this process. Directories
/// within that are another stage's are its own business.
fn sweep(dir: &Path, place: &DirLock) -> Result<()> {
    let is_other = |dir: &Path| [RECORD_FILE, LOCK_FILE].iter().any(|name| dir.join(name).exists());
    match place.is_alone() {
        true => sweep_tree(dir, &is_other)?,
        false => sweep_temporary(dir)?,
    };
    Ok(())
}

/// [`open`] for all ranks: rank 0 opens the directory, the others learn what it
/// found. Fails on all of them unless all have the same settings and inputs.
pub(crate) fn open_for_all(comm: &dyn Comm, dir: &Path, stage: &str, settings: Value) -> Result<SharedState> {
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
        Some(State::Open(output)) => SharedState::Open(StageHandle::Leader(output)),
        None if is_open == [1] => SharedState::Open(StageHandle::Follower(Guest::of(dir, stage))),
        _ => SharedState::Finished,
    })
}

/// Opens a stage's directory beside other processes that do the same work there, and that
/// know by themselves who does what. `name` gives this one from the others.
pub fn share(dir: &Path, stage: &str, settings: Value, name: &str) -> Result<State> {
    make_dir(dir)?;
    let record = Record::new(stage, &settings)?;
    let before = read_same(dir, &record)?;
    if before.as_ref().is_some_and(|before| before.is_whole(dir)) {
        return Ok(State::Finished);
    }
    let place = DirLock::share(dir, stage, name)?;
    // Others may have started, and written the same.
    if before.is_none() {
        record.write(dir)?;
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
    let what = format!("{}: holds a result of other settings or inputs", shown(dir));
    Err(refused(what, lines, OTHER_SETTINGS))
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

    /// Notes on which devices work was done so far, finished or not.
    pub fn computed_on(&mut self, mut devices: BTreeSet<String>) -> Result<()> {
        devices.extend(self.record.computed_on.iter().cloned());
        if devices != self.record.computed_on {
            self.record.computed_on = devices;
            self.write()?;
        }
        Ok(())
    }

    /// Notes what was assumed about data and models.
    pub fn assume(&mut self, lines: Vec<String>) -> Result<()> {
        if lines != self.record.assumed {
            self.record.assumed = lines;
            self.write()?;
        }
        Ok(())
    }

    /// Notes that these files, relative to the directory, are the finished result.
    pub fn finish(mut self, files: &[String]) -> Result<()> {
        for name in files {
            let path = self.dir.join(name);
            self.record.outputs.insert(name.clone(), checksum_file(&path)?);
            let size =
                std::fs::metadata(&path).with_context(|| format!("{}: cannot look at", shown(&path)))?;
            self.record.sizes.insert(name.clone(), size.len());
        }
        self.write()?;
        self.place.finish();
        Ok(())
    }

    fn write(&self) -> Result<()> {
        self.record.write(&self.dir)
    }
}
