//! Who works in a stage's directory, and how far the work is.
//!
//! In: a directory, from [`crate::record::open`], and the steps that [`crate::ui`] is told
//! of. Out, while a stage works there, for people who look from another shell:
//!
//! * `.lock`, on which this process holds an advisory lock, so that no second one works in
//!   the same directory. The lock vanishes with the process, however that ends.
//! * `progress.json`, a [`Standing`]: replaced about once a second while steps are made, and
//!   at least every ten seconds as a sign of life, by a thread of its own.
//!   It is rank 0's, which tells of the other ranks too. Processes that share a directory
//!   without being ranks of one world write `progress.NAME.json`.
//! * `failed.json`, a [`Failed`]: the error that ended the last attempt. Removed when the
//!   work goes on.
//!
//! Nothing of this stays in the directory of a finished stage. After a kill `progress.json`
//! stays, and tells where the work stopped.

use crate::failure::{self, Told};
use anyhow::{Context, Result};
use gradtx_runtime::artifact::write_json;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

/// How far the work is.
pub const PROGRESS_FILE: &str = "progress.json";
/// Why the last attempt ended.
pub const FAILED_FILE: &str = "failed.json";
/// What is locked while a process works in a directory.
pub const LOCK_FILE: &str = ".lock";
/// A progress file while it is written begins so, and is swept like every temporary file.
const TEMPORARY: &str = ".gradtx-";

/// Progress is written at most this often,
const WRITE_EVERY: Duration = Duration::from_secs(1);
/// and at least this often, whether there is any or not.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// A process on another host that wrote nothing for this long is taken for gone, in seconds.
pub const SILENCE: f64 = 60.0;

/// The content of progress.json. Times are seconds since 1970.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Standing {
    /// The stage.
    pub stage: String,
    /// The part of it that is worked at; empty before the first.
    pub part: String,
    /// Steps of the part that are done,
    pub done: u64,
    /// of so many.
    pub total: u64,
    /// What the stage says about the last step.
    pub message: String,
    /// Steps per second of this process in this part, once there are any.
    pub rate: Option<f64>,
    /// Seconds that are left of the part, where its steps are not alike.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<f64>,
    /// The ranks that work together here; none where one process works.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranks: Vec<RankStanding>,
    /// When this process began.
    pub started: f64,
    /// When `done` last grew.
    pub advanced: f64,
    /// When this was written.
    pub updated: f64,
    /// Name of the host.
    pub host: String,
    /// The process there,
    pub pid: u32,
    /// and when it was started, in the host's clock ticks since boot: a later process may
    /// have the same number.
    pub pid_started: u64,
}

/// The part of a rank that has nothing left to do.
pub const NO_MORE: &str = "nothing";

/// How far one of several ranks is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RankStanding {
    /// The rank.
    pub rank: usize,
    /// Its node.
    pub node: String,
    /// Its process there.
    pub pid: u32,
    /// What it works at; empty before it begins.
    pub part: String,
    /// Steps of that that are done,
    pub done: u64,
    /// of so many.
    pub total: u64,
    /// How large that is, in the unit that work is divided by.
    pub cost: f64,
    /// Parts that it finished.
    pub groups: usize,
    /// What it does in a second,
    pub rate: f64,
    /// in these: tokens, tuples.
    pub unit: String,
    /// When it told this.
    pub updated: f64,
}

/// The content of failed.json: where an attempt ended, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failed {
    /// Where.
    #[serde(flatten)]
    pub standing: Standing,
    /// Why.
    pub error: Told,
    /// When, in seconds since 1970.
    pub at: f64,
}

impl Standing {
    fn new(stage: &str) -> Self {
        let now = unix_now();
        let pid = std::process::id();
        Self {
            stage: stage.into(),
            started: now,
            advanced: now,
            updated: now,
            host: host_name(),
            pid,
            pid_started: start_of(pid).unwrap_or_default(),
            ..Self::default()
        }
    }

    /// Whether the process that wrote this is still at work: on this host by asking for it,
    /// on another by the age of what it wrote.
    pub fn is_alive(&self) -> bool {
        if self.host == host_name() {
            start_of(self.pid) == Some(self.pid_started)
        } else {
            unix_now() - self.updated <= SILENCE
        }
    }

    /// Seconds that the rest of the part will take at the present rate.
    pub fn seconds_left(&self) -> Option<f64> {
        if self.left.is_some() {
            return self.left;
        }
        let rate = self.rate.filter(|rate| *rate > 0.0)?;
        Some(self.total.saturating_sub(self.done) as f64 / rate)
    }

    /// `step 130 of 400`, with the part if it has another name than the stage; nothing
    /// before the first part.
    pub fn steps(&self) -> Option<String> {
        let part = self.part.strip_prefix(&self.stage).unwrap_or(&self.part).trim();
        let part = if part.is_empty() { String::new() } else { format!("{part}, ") };
        (self.total > 0).then(|| format!("{part}step {} of {}", self.done, self.total))
    }
}

/// Seconds since 1970, to the millisecond.
pub fn unix_now() -> f64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    since.as_millis() as f64 / 1e3
}

/// Name of this host.
pub fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map_or("unknown".into(), |name| name.trim().into())
}

/// When a process of this host was started, in ticks since boot; nothing once it has ended.
fn start_of(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Counting starts after the program's name, which may hold anything: state, then 18 others.
    let mut fields = stat.rsplit(')').next()?.split_whitespace();
    let state = fields.next()?;
    // Ended, but its parent has not asked yet.
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// What the processes say that share a directory, by name; see [`Place::share`].
pub fn read_shared(dir: &Path) -> Vec<(String, Standing)> {
    let Ok(entries) = std::fs::read_dir(dir) else { return vec![] };
    let read = |entry: std::fs::DirEntry| {
        let file = entry.file_name().into_string().ok()?;
        let name = file.strip_prefix("progress.")?.strip_suffix(".json")?.to_string();
        Some((name, serde_json::from_slice(&std::fs::read(entry.path()).ok()?).ok()?))
    };
    let mut found: Vec<(String, Standing)> = entries.flatten().filter_map(read).collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// Removes what processes left that shared a directory and were killed. To be called by one
/// that is alone there.
pub fn forget_shared(dir: &Path) {
    for (name, _) in read_shared(dir) {
        let _ = std::fs::remove_file(dir.join(format!("progress.{name}.json")));
    }
}

/// Reads progress.json of a directory; nothing when it is not there or not readable, for
/// it may be replaced or removed at any moment.
pub fn read(dir: &Path) -> Option<Standing> {
    serde_json::from_slice(&std::fs::read(dir.join(PROGRESS_FILE)).ok()?).ok()
}

/// Reads failed.json of a directory.
pub fn read_failed(dir: &Path) -> Option<Failed> {
    serde_json::from_slice(&std::fs::read(dir.join(FAILED_FILE)).ok()?).ok()
}

/// What a stage's thread and the writing thread share.
pub struct Desk {
    dir: PathBuf,
    /// Name of the progress file.
    file: String,
    inner: Mutex<Inner>,
    wake: Condvar,
}

struct Inner {
    standing: Standing,
    /// Steps at the beginning of the part, and when that was: what the rate is counted from.
    base: (u64, Instant),
    changed: bool,
    closed: bool,
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere leaves plain numbers, which are good enough to be shown.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A part of `total` steps begins, `done` of which were done before.
    pub fn begin(&self, part: &str, done: u64, total: u64) {
        let mut inner = self.lock();
        inner.base = (done, Instant::now());
        inner.changed = true;
        let standing = &mut inner.standing;
        (standing.part, standing.message) = (part.into(), String::new());
        (standing.done, standing.total, standing.rate) = (done, total, None);
        standing.advanced = unix_now();
    }

    /// `done` steps of the part are done.
    pub fn set(&self, done: u64, left: Option<f64>, message: &str) {
        let mut inner = self.lock();
        let (base, since) = inner.base;
        let seconds = since.elapsed().as_secs_f64();
        inner.changed = true;
        let standing = &mut inner.standing;
        standing.rate = (done > base && seconds > 0.0).then(|| (done - base) as f64 / seconds);
        (standing.done, standing.left) = (done, left);
        standing.message = message.into();
        standing.advanced = unix_now();
    }

    /// How far every rank is.
    pub fn set_ranks(&self, ranks: &[RankStanding]) {
        if ranks.len() > 1 {
            self.lock().standing.ranks = ranks.to_vec();
        }
    }

    /// How far the work is now.
    pub fn standing(&self) -> Standing {
        self.lock().standing.clone()
    }

    /// Writes until the desk is closed.
    fn keep_writing(&self) {
        let mut written = Instant::now();
        let mut inner = self.lock();
        while !inner.closed {
            let waited = self.wake.wait_timeout(inner, WRITE_EVERY);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
            if !inner.closed && (inner.changed || written.elapsed() >= HEARTBEAT) {
                inner.changed = false;
                inner.standing.updated = unix_now();
                let standing = inner.standing.clone();
                drop(inner);
                write(&self.dir, &self.file, &standing);
                written = Instant::now();
                inner = self.lock();
            }
        }
    }
}

/// Replaces progress.json. Not synced, and an error is no error: a full disk must not end
/// the work by way of the file that tells about it.
fn write(dir: &Path, file: &str, standing: &Standing) {
    let temporary = dir.join(format!("{TEMPORARY}{file}.tmp"));
    let text = serde_json::to_string(standing).expect("numbers and texts can be put into JSON");
    let written =
        std::fs::write(&temporary, text + "\n").and_then(|()| std::fs::rename(&temporary, dir.join(file)));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
}

/// A directory while this process works in it.
pub struct Place {
    desk: Arc<Desk>,
    writer: Option<JoinHandle<()>>,
    /// Held for its lock; none where the file system has no locks.
    lock: Option<File>,
    began: Instant,
    finished: bool,
}

/// What this thread works at. Stages run one at a time, on one thread, some within others.
#[derive(Default)]
struct Here {
    /// The directories, innermost last.
    open: Vec<Arc<Desk>>,
    /// Directories that were left unfinished, and how far they were.
    left: Vec<(PathBuf, Standing)>,
    /// Directories that were finished, and the seconds it took.
    finished: Vec<(PathBuf, f64)>,
}

thread_local! {
    static HERE: RefCell<Here> = RefCell::default();
}

/// The directory that this thread works in, the innermost of several.
pub fn current() -> Option<Arc<Desk>> {
    HERE.with_borrow(|here| here.open.last().cloned())
}

/// The seconds that this process worked in a directory that it finished; nothing where
/// there was nothing to do.
pub fn seconds_in(dir: &Path) -> Option<f64> {
    HERE.with_borrow(|here| here.finished.iter().rfind(|(d, _)| d == dir).map(|(_, seconds)| *seconds))
}

/// Writes `failed.json` into the directories that were left unfinished because of an error.
pub fn note_failure(error: &Told) {
    if error.was_asked_for() {
        return;
    }
    for (dir, standing) in HERE.with_borrow_mut(|here| std::mem::take(&mut here.left)) {
        let failed = Failed { standing, error: error.clone(), at: unix_now() };
        // Removed first, for on a full disk that makes the room. What fails here is not told:
        // the error itself is, and would say the same.
        let _ = std::fs::remove_file(dir.join(PROGRESS_FILE));
        let _ = write_json(&dir.join(FAILED_FILE), &failed);
    }
}

impl Place {
    /// Begins work in a directory. Fails if another process is at work there.
    pub fn open(dir: &Path, stage: &str) -> Result<Self> {
        Self::begin(dir, stage, lock(dir, false)?, PROGRESS_FILE.into())
    }

    /// Begins work in a directory beside other processes that do the same, each with a name
    /// of its own. Fails if a process works there that wants to be alone.
    pub fn share(dir: &Path, stage: &str, name: &str) -> Result<Self> {
        Self::begin(dir, stage, lock(dir, true)?, format!("progress.{name}.json"))
    }

    fn begin(dir: &Path, stage: &str, lock: Option<File>, file: String) -> Result<Self> {
        let _ = std::fs::remove_file(dir.join(FAILED_FILE));
        let standing = Standing::new(stage);
        write(dir, &file, &standing);
        let base = (0, Instant::now());
        let inner = Mutex::new(Inner { standing, base, changed: false, closed: false });
        let desk = Arc::new(Desk { dir: dir.to_owned(), file, inner, wake: Condvar::new() });
        let shared = desk.clone();
        let writer = std::thread::Builder::new().name("progress".into()).spawn(move || shared.keep_writing());
        HERE.with_borrow_mut(|here| {
            here.left.retain(|(left, _)| left != dir);
            here.open.push(desk.clone());
        });
        // Without the thread nobody can watch, and the work goes on.
        Ok(Self { desk, writer: writer.ok(), lock, began: Instant::now(), finished: false })
    }

    /// Ends work in a directory that is finished.
    pub fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.desk.lock().closed = true;
        self.desk.wake.notify_all();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
        let standing = self.desk.standing();
        let dir = self.desk.dir.clone();
        if self.finished {
            let _ = std::fs::remove_file(dir.join(&self.desk.file));
        } else {
            write(&dir, &self.desk.file, &standing);
        }
        // Removed by whoever has it alone, so that nobody else can hold the one that goes.
        if self.lock.as_ref().is_none_or(|lock| lock.try_lock().is_ok()) {
            let _ = std::fs::remove_file(dir.join(LOCK_FILE));
        }
        let seconds = self.began.elapsed().as_secs_f64();
        HERE.with_borrow_mut(|here| {
            here.open.retain(|desk| !Arc::ptr_eq(desk, &self.desk));
            match self.finished {
                true => here.finished.push((dir, seconds)),
                false => here.left.push((dir, standing)),
            }
        });
    }
}

/// A directory in which this process works for another one, rank 0, that holds it. If this
/// one fails, `failed.json` tells so there.
pub struct Guest {
    /// Nothing once it is finished.
    here: Option<Box<(PathBuf, Standing)>>,
}

impl Guest {
    /// In this directory, at this stage.
    pub fn of(dir: &Path, stage: &str) -> Self {
        Self { here: Some(Box::new((dir.to_owned(), Standing::new(stage)))) }
    }

    /// The work is done.
    pub fn finish(mut self) {
        self.here = None;
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(left) = self.here.take() {
            HERE.with_borrow_mut(|here| here.left.push(*left));
        }
    }
}

/// Takes the lock of a directory, alone or together with others.
fn lock(dir: &Path, shared: bool) -> Result<Option<File>> {
    let path = dir.join(LOCK_FILE);
    loop {
        let opened = OpenOptions::new().create(true).write(true).truncate(false).open(&path);
        let file = opened.with_context(|| format!("{}: cannot write here", dir.display()))?;
        match if shared { file.try_lock_shared() } else { file.try_lock() } {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(busy(dir)),
            // Some cluster file systems have none. What there is then is progress.json.
            Err(TryLockError::Error(_)) => {
                let other = |found: &Standing| found.pid != std::process::id() && found.host == host_name();
                return match !shared && read(dir).filter(other).is_some_and(|found| found.is_alive()) {
                    true => Err(busy(dir)),
                    false => Ok(None),
                };
            }
        }
        // Whoever finished between our opening and our locking has removed the file that we
        // hold; the next process would lock another one.
        let same = |a: std::fs::Metadata, b: std::fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
        if let (Ok(held), Ok(there)) = (file.metadata(), std::fs::metadata(&path))
            && same(held, there)
        {
            return Ok(Some(file));
        }
    }
}

fn busy(dir: &Path) -> anyhow::Error {
    let who = match read(dir) {
        Some(found) => {
            let ago = ago(unix_now() - found.started);
            format!("process {} on {} (`{}`, begun {ago} ago)", found.pid, found.host, found.stage)
        }
        None => "another process".into(),
    };
    failure::busy(
        format!("{}: {who} is working here", dir.display()),
        "wait until it has finished, or end it; `gradtx status` on the run shows how far it is",
    )
}

/// Seconds as people say them: `40 s`, `12 min`, `3 h 5 min`.
pub fn ago(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} days {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn one_process_at_a_time_and_nothing_is_left_of_a_finished_stage() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::open(dir.path(), "train").unwrap();
        assert_eq!(names(dir.path()), [LOCK_FILE, PROGRESS_FILE]);
        let error = Place::open(dir.path(), "train").err().unwrap();
        let message = error.to_string();
        assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
        assert_eq!(Told::from(&error).code, failure::BUSY);
        place.finish();
        assert!(names(dir.path()).is_empty(), "{:?}", names(dir.path()));
        assert!(seconds_in(dir.path()).is_some());
        Place::open(dir.path(), "train").unwrap();
    }

    #[test]
    fn steps_are_told_and_what_is_left_says_where_it_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::open(dir.path(), "train").unwrap();
        let desk = current().unwrap();
        desk.begin("train", 100, 400);
        desk.set(130, None, "loss 0.5");
        let standing = desk.standing();
        assert!(standing.rate.unwrap() > 30.0, "counted from step 100, not from 0: {standing:?}");
        assert!(standing.is_alive());
        drop(place);
        assert!(current().is_none());
        let found = read(dir.path()).unwrap();
        assert_eq!((found.steps().as_deref(), &*found.message), (Some("step 130 of 400"), "loss 0.5"));
        let part = Standing { part: "curate llm".into(), stage: "curate".into(), ..found };
        assert_eq!(part.steps().as_deref(), Some("llm, step 130 of 400"));

        note_failure(&Told { message: "no more paper".into(), hint: None, code: 1 });
        assert_eq!(names(dir.path()), [FAILED_FILE]);
        let failed = read_failed(dir.path()).unwrap();
        assert_eq!((failed.standing.done, failed.error.message.as_str()), (130, "no more paper"));
        Place::open(dir.path(), "train").unwrap().finish();
        assert!(names(dir.path()).is_empty(), "going on removes what failed before");
    }

    #[test]
    fn inner_work_is_reported_first() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let outer_place = Place::open(dir.path(), "world").unwrap();
        let inner_place = Place::open(&inner, "pretrain").unwrap();
        assert_eq!(current().unwrap().standing().stage, "pretrain");
        inner_place.finish();
        assert_eq!(current().unwrap().standing().stage, "world");
        outer_place.finish();
    }

    #[test]
    fn the_dead_and_the_silent_are_not_alive() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let mut standing = Standing { pid: child.id(), ..Standing::new("train") };
        standing.pid_started = start_of(child.id()).unwrap();
        assert!(standing.is_alive());
        standing.pid_started -= 1;
        assert!(!standing.is_alive(), "another process has that number now");
        standing.pid_started += 1;
        child.kill().unwrap();
        while start_of(child.id()).is_some() {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!standing.is_alive(), "ended, though its parent has not asked");
        child.wait().unwrap();
        standing.host = "elsewhere".into();
        assert!(standing.is_alive(), "wrote a moment ago");
        standing.updated -= 2.0 * SILENCE;
        assert!(!standing.is_alive());
    }

    #[test]
    fn times_read_well() {
        let said = [0.4, 119.0, 121.0, 7300.0, 180_000.0].map(ago);
        assert_eq!(said, ["0 s", "119 s", "2 min", "2 h 1 min", "2 days 2 h"]);
    }
}
