//! What makes a stage repeatable: `record.json` in the directory that it writes.
//!
//! A stage opens its directory with the settings and inputs that its result depends on.
//! The record says whether the result is there and intact ([`State::Finished`]), must be
//! made or completed ([`State::Open`]), or belongs to other settings, which is refused
//! with the lines that differ. Finished files are known by their checksums, and the record
//! itself by one of its own text: what it says is believed by the stages after this one.
//!
//! While a directory is open no other process can open it (see [`crate::progress`]).
//! For ranks that work together in one directory, rank 0 opens it ([`open_for_all`]).

use crate::failure::{failed, refused};
use crate::progress::{DirLock, Guest, LOCK_FILE};
use anyhow::{Context, Result, bail};
use gradtx_runtime::artifact::{
    MAX_CONFIG_BYTES, checksum, checksum_file, read_text, sweep_temporary, sweep_tree, write_atomic,
};
use gradtx_runtime::comm::Comm;
use gradtx_runtime::text::shown;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Component, Path, PathBuf};

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
    /// Checksums of the finished files by their names, relative to the directory and within it;
    /// empty while there is work to do.
    pub outputs: BTreeMap<String, String>,
    /// Their sizes in bytes: what can be compared at a glance.
    #[serde(default)]
    pub sizes: BTreeMap<String, u64>,
    /// Checksum of the record's text with nothing in this place. The last entry of the file.
    #[serde(default)]
    xxh3: String,
}

/// What stands before the checksum in the text of a record.
const SEAL: &str = "\"xxh3\": \"";

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
pub fn open_for_all(comm: &dyn Comm, dir: &Path, stage: &str, settings: Value) -> Result<SharedState> {
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
    Err(refused(what, lines, "write to another directory, or remove this one to start over"))
}

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
    fn new(stage: &str, settings: &Value) -> Result<Box<Self>> {
        Ok(Box::new(Self {
            stage: stage.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            // As it reads back from its file: numbers may lose their last digit on the way.
            settings: serde_json::from_str(&settings.to_string())?,
            computed_on: BTreeSet::new(),
            outputs: BTreeMap::new(),
            sizes: BTreeMap::new(),
            xxh3: String::new(),
        }))
    }

    /// Writes the record of a directory, with its checksum.
    fn write(&self, dir: &Path) -> Result<()> {
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
    fn is_whole(&self, dir: &Path) -> bool {
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

    /// They are no settings: work continues with others, and the same result stays finished.
    #[test]
    fn devices_of_all_attempts_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = || std::fs::read_to_string(dir.path().join(RECORD_FILE)).unwrap();
        let mut output = opened(dir.path(), json!({"a": 1}));
        let before = text();
        output.computed_on(BTreeSet::new()).unwrap();
        assert_eq!(text(), before, "on a CPU");
        assert!(!before.contains("computed_on"), "{before}");
        output.computed_on(["GPU 1".into()].into()).unwrap();
        // Stopped, and resumed elsewhere.
        drop(output);
        std::fs::write(dir.path().join("x"), "result").unwrap();
        let mut output = opened(dir.path(), json!({"a": 1}));
        output.computed_on(["GPU 2".into()].into()).unwrap();
        output.finish(&["x".into()]).unwrap();
        let record = read(&dir.path().join(RECORD_FILE)).unwrap();
        assert_eq!(record.computed_on, ["GPU 1".to_string(), "GPU 2".into()].into());
        assert!(matches!(open(dir.path(), "test", json!({"a": 1})).unwrap(), State::Finished));
    }

    /// A finished directory with a file `sub/x`.
    fn finished() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let output = opened(dir.path(), json!({"a": 1, "xxh3": "", "lr": 0.1}));
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("sub/x"), "result").unwrap();
        output.finish(&["sub/x".into()]).unwrap();
        dir
    }

    #[test]
    fn a_record_that_was_changed_is_refused() {
        let dir = finished();
        let path = dir.path().join(RECORD_FILE);
        let text = std::fs::read_to_string(&path).unwrap();
        let record = read(&path).unwrap();
        assert!(record.damaged(dir.path()).is_empty());
        let refused = |changed: String, say: &str| {
            assert_ne!(changed, text);
            std::fs::write(&path, changed).unwrap();
            let error = read(&path).unwrap_err();
            assert!(format!("{error:#}").contains(say), "{error:#}");
        };
        for at in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1 << (at % 7);
            std::fs::write(&path, &bytes).unwrap();
            assert!(read(&path).is_err(), "byte {at}: {}", String::from_utf8_lossy(&bytes));
        }
        refused(text.replace("\"test\"", "\"curate\""), "damaged, or changed by hand");
        refused(text.replace(&record.xxh3, ""), "has no checksum");
        for name in ["../x", "/etc/passwd", "sub/../../x", "./x", "", ".."] {
            refused(text.replace("sub/x", name), "within its directory");
        }
        std::fs::write(&path, &text).unwrap();
        assert_eq!(read(&path).unwrap(), record);
    }

    #[test]
    fn finished_files_are_regular_files_of_the_directory() {
        let dir = finished();
        let file = dir.path().join("sub/x");
        let elsewhere = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(elsewhere.path(), "result").unwrap();
        let record = read(&dir.path().join(RECORD_FILE)).unwrap();
        assert!(record.problems(dir.path(), |_| true).is_empty());
        for (target, say) in
            [(elsewhere.path(), "outside of its directory"), (Path::new("/dev/zero"), "a device")]
        {
            std::fs::remove_file(&file).unwrap();
            std::os::unix::fs::symlink(target, &file).unwrap();
            let problems = record.problems(dir.path(), |_| true);
            assert!(problems.len() == 1 && problems[0].contains(say), "{problems:?}");
            assert_eq!(record.damaged(dir.path()), ["sub/x"]);
        }
        assert!(record.problems(dir.path(), |name| name != "sub/x").is_empty());
    }

    #[test]
    fn what_a_killed_process_left_half_written_goes() {
        let dir = finished();
        let left = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, "half").unwrap();
            path
        };
        let names = [".gradtx-a.tmp", "sub/.gradtx-b.tmp"].map(left);
        std::fs::remove_file(dir.path().join("sub/x")).unwrap();
        opened(dir.path(), json!({"a": 1, "xxh3": "", "lr": 0.1}));
        assert!(names.iter().all(|path| !path.exists()));
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
