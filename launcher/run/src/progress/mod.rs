//! Who works in a stage's directory, and how far the work is.
//!
//! In: a directory, from [`crate::record::open`], and the steps that [`crate::ui`] is told
//! of. Out, while a stage works there, for people who look from another shell:
//!
//! * `.lock`, on which this process holds an advisory lock, so that no second one works in
//!   the same directory. The lock vanishes with the process, however that ends. Where the file
//!   system has no locks, `.claim-N` takes its place; see `claim`.
//! * `progress.json`, a [`StageProgress`]: replaced about once a second while steps are made, and
//!   at least every five seconds as a sign of life, by a thread of its own.
//!   It is rank 0's, which reports the other ranks too. Processes that share a directory
//!   without being ranks of one world write `progress.NAME.json`.
//! * `failed.json`, a [`Failed`]: the error that ended the last attempt. Removed when the
//!   work continues.
//!
//! Nothing of this stays in the directory of a finished stage. After a kill `progress.json`
//! stays, and says where the work stopped.

mod claim;
mod state;
mod writer;

pub use state::{
    Failed, NO_MORE, RankProgress, SILENCE, StageProgress, ago, forget_shared, host_name, read, read_failed,
    read_shared, unix_now,
};
pub use writer::ProgressWriter;

use crate::failure::{self, ErrorReport};
use anyhow::{Context, Result};
use claim::Claim;
use gradtx_runtime::artifact::write_json;
use std::cell::RefCell;
use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

/// How far the work is.
pub const PROGRESS_FILE: &str = "progress.json";
/// Why the last attempt ended.
pub const FAILED_FILE: &str = "failed.json";
/// What is locked while a process works in a directory.
pub(crate) const LOCK_FILE: &str = ".lock";

/// A directory while this process works in it.
pub struct DirLock {
    output: Arc<ProgressWriter>,
    writer: Option<JoinHandle<()>>,
    hold: Hold,
    began: Instant,
    finished: bool,
}

/// What keeps other processes out of a directory.
enum Hold {
    /// A lock on this file.
    Lock(File),
    /// A claim, where the file system has no locks.
    Claim(Claim),
    /// Nothing: the directory is shared on a file system without locks.
    Nothing,
}

/// What this thread works at. Stages run one at a time, on one thread, some within others.
#[derive(Default)]
struct ActiveStages {
    /// The directories, innermost last.
    open: Vec<Arc<ProgressWriter>>,
    /// Directories that were left unfinished, and how far they were.
    left: Vec<(PathBuf, StageProgress)>,
    /// Directories that were finished, and the seconds it took.
    finished: Vec<(PathBuf, f64)>,
}

thread_local! {
    static ACTIVE: RefCell<ActiveStages> = RefCell::default();
}

/// The directory that this thread works in, the innermost of several.
pub fn current() -> Option<Arc<ProgressWriter>> {
    ACTIVE.with_borrow(|active| active.open.last().cloned())
}

/// The seconds that this process worked in a directory that it finished; nothing where
/// there was nothing to do.
pub(crate) fn seconds_in(dir: &Path) -> Option<f64> {
    ACTIVE.with_borrow(|active| active.finished.iter().rfind(|(d, _)| d == dir).map(|(_, seconds)| *seconds))
}

/// Writes `failed.json` into the directories that were left unfinished because of an error.
pub fn note_failure(error: &ErrorReport) {
    if error.was_asked_for() {
        return;
    }
    for (dir, state) in ACTIVE.with_borrow_mut(|active| std::mem::take(&mut active.left)) {
        let failed = Failed { state, error: error.clone(), at: unix_now() };
        // Removed first, for on a full disk that makes the room. What fails here is not reported:
        // the error itself is, and would say the same.
        let _ = std::fs::remove_file(dir.join(PROGRESS_FILE));
        let _ = write_json(&dir.join(FAILED_FILE), &failed);
    }
}

impl DirLock {
    /// Begins work in a directory. Fails if another process is working there.
    pub fn open(dir: &Path, stage: &str) -> Result<Self> {
        Self::begin(dir, stage, hold(dir, false)?, PROGRESS_FILE.into())
    }

    /// Begins work in a directory beside other processes that do the same, each with a name
    /// of its own. Fails if a process works there that wants to be alone.
    pub fn share(dir: &Path, stage: &str, name: &str) -> Result<Self> {
        Self::begin(dir, stage, hold(dir, true)?, format!("progress.{name}.json"))
    }

    fn begin(dir: &Path, stage: &str, hold: Hold, file: String) -> Result<Self> {
        let _ = std::fs::remove_file(dir.join(FAILED_FILE));
        let claim = match &hold {
            Hold::Claim(claim) => Some(claim.path().to_owned()),
            Hold::Lock(_) | Hold::Nothing => None,
        };
        let output = Arc::new(ProgressWriter::new(dir, file, claim, StageProgress::new(stage)));
        output.write();
        let shared = output.clone();
        let writer = std::thread::Builder::new().name("progress".into()).spawn(move || shared.keep_writing());
        ACTIVE.with_borrow_mut(|active| {
            active.left.retain(|(left, _)| left != dir);
            active.open.push(output.clone());
        });
        // Without the thread nobody can watch, and the work continues.
        Ok(Self { output, writer: writer.ok(), hold, began: Instant::now(), finished: false })
    }

    /// Whether a lock keeps all other processes from this directory.
    pub(crate) fn is_alone(&self) -> bool {
        matches!(self.hold, Hold::Lock(_))
    }

    /// Ends work in a directory that is finished.
    pub fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for DirLock {
    fn drop(&mut self) {
        self.output.close();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
        let state = self.output.state();
        let dir = self.output.dir().to_owned();
        if self.finished {
            let _ = std::fs::remove_file(self.output.file());
        } else {
            self.output.write();
        }
        // Removed by whoever has it alone, so that nobody else can hold the one that goes.
        let is_alone = match &self.hold {
            Hold::Lock(lock) => lock.try_lock().is_ok(),
            Hold::Claim(_) | Hold::Nothing => true,
        };
        if is_alone {
            let _ = std::fs::remove_file(dir.join(LOCK_FILE));
        }
        let seconds = self.began.elapsed().as_secs_f64();
        ACTIVE.with_borrow_mut(|active| {
            active.open.retain(|output| !Arc::ptr_eq(output, &self.output));
            match self.finished {
                true => active.finished.push((dir, seconds)),
                false => active.left.push((dir, state)),
            }
        });
    }
}

/// A directory in which this process works for another one, rank 0, that holds it. If this
/// one fails, `failed.json` gives so there.
pub struct Guest {
    /// Nothing once it is finished.
    active: Option<Box<(PathBuf, StageProgress)>>,
}

impl Guest {
    /// In this directory, at this stage.
    pub fn of(dir: &Path, stage: &str) -> Self {
        Self { active: Some(Box::new((dir.to_owned(), StageProgress::new(stage)))) }
    }

    /// The work is done.
    pub fn finish(mut self) {
        self.active = None;
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(left) = self.active.take() {
            ACTIVE.with_borrow_mut(|active| active.left.push(*left));
        }
    }
}

/// Keeps other processes out of a directory, or, `shared`, those that want to be alone there.
fn hold(dir: &Path, shared: bool) -> Result<Hold> {
    let path = dir.join(LOCK_FILE);
    loop {
        // For reading too: a shared lock on a file server needs that.
        let opened = OpenOptions::new().create(true).read(true).write(true).truncate(false).open(&path);
        let file = opened.with_context(|| format!("{}: cannot write here", dir.display()))?;
        match if shared { file.try_lock_shared() } else { file.try_lock() } {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(busy(dir)),
            // Some file systems of clusters have no locks.
            Err(TryLockError::Error(_)) => return hold_without_locks(dir, shared),
        }
        // Whoever finished between our opening and our locking has removed the file that we
        // hold; the next process would lock another one.
        let same = |a: std::fs::Metadata, b: std::fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
        if let (Ok(held), Ok(there)) = (file.metadata(), std::fs::metadata(&path))
            && same(held, there)
        {
            return Ok(Hold::Lock(file));
        }
    }
}

fn hold_without_locks(dir: &Path, shared: bool) -> Result<Hold> {
    if shared {
        return if claim::is_taken(dir)? { Err(busy(dir)) } else { Ok(Hold::Nothing) };
    }
    claim::take(dir)?.map(Hold::Claim).ok_or_else(|| busy(dir))
}

fn busy(dir: &Path) -> anyhow::Error {
    let who = match read(dir) {
        Some(found) => {
            let ago = ago(unix_now() - found.started);
            format!("process {} on {} (`{}`, started {ago} ago)", found.pid, found.host, found.stage)
        }
        None => "another process".into(),
    };
    failure::busy(
        format!("{}: {who} is working here", dir.display()),
        "wait until it has finished, or end it; `gradtx status` on the run shows how far it is",
    )
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
    fn stages_run_one_at_a_time_and_leave_no_progress() {
        let dir = tempfile::tempdir().unwrap();
        let place = DirLock::open(dir.path(), "train").unwrap();
        assert_eq!(names(dir.path()), [LOCK_FILE, PROGRESS_FILE]);
        let error = DirLock::open(dir.path(), "train").err().unwrap();
        let message = error.to_string();
        assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
        assert_eq!(ErrorReport::from(&error).code, failure::BUSY);
        place.finish();
        assert!(names(dir.path()).is_empty(), "{:?}", names(dir.path()));
        assert!(seconds_in(dir.path()).is_some());
        DirLock::open(dir.path(), "train").unwrap();
    }

    #[test]
    fn progress_left_behind_says_where_it_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let place = DirLock::open(dir.path(), "train").unwrap();
        let output = current().unwrap();
        output.begin("train", 100, 400);
        output.set(130, None, "loss 0.5");
        let state = output.state();
        assert!(state.rate.unwrap() > 30.0, "counted from step 100, not from 0: {state:?}");
        assert!(state.is_alive());
        drop(place);
        assert!(current().is_none());
        let found = read(dir.path()).unwrap();
        assert_eq!((found.steps().as_deref(), &*found.message), (Some("step 130 of 400"), "loss 0.5"));
        let part = StageProgress { part: "curate llm".into(), stage: "curate".into(), ..found };
        assert_eq!(part.steps().as_deref(), Some("llm, step 130 of 400"));

        note_failure(&ErrorReport { message: "no more paper".into(), hint: None, code: 1 });
        assert_eq!(names(dir.path()), [FAILED_FILE]);
        let failed = read_failed(dir.path()).unwrap();
        assert_eq!((failed.state.done, failed.error.message.as_str()), (130, "no more paper"));
        DirLock::open(dir.path(), "train").unwrap().finish();
        assert!(names(dir.path()).is_empty(), "going on removes what failed before");
    }

    #[test]
    fn inner_work_is_reported_first() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let outer_place = DirLock::open(dir.path(), "world").unwrap();
        let inner_place = DirLock::open(&inner, "pretrain").unwrap();
        assert_eq!(current().unwrap().state().stage, "pretrain");
        inner_place.finish();
        assert_eq!(current().unwrap().state().stage, "world");
        outer_place.finish();
    }
}
