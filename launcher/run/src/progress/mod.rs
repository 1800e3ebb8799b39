//! Who works in a stage's directory, and how far the work is.
//!
//! In: a directory, from [`crate::record::open`], and the steps that [`crate::ui`] is told
//! of. Out, while a stage works there, for people who look from another shell:
//!
//! * `.lock`, on which this process holds an advisory lock, so that no second one works in
//!   the same directory. The lock vanishes with the process, however that ends. Where the file
//!   system has no locks, `.claim-N` takes its place; see `claim`.
//! * `progress.json`, a [`Standing`]: replaced about once a second while steps are made, and
//!   at least every five seconds as a sign of life, by a thread of its own.
//!   It is rank 0's, which tells of the other ranks too. Processes that share a directory
//!   without being ranks of one world write `progress.NAME.json`.
//! * `failed.json`, a [`Failed`]: the error that ended the last attempt. Removed when the
//!   work goes on.
//!
//! Nothing of this stays in the directory of a finished stage. After a kill `progress.json`
//! stays, and tells where the work stopped.

mod claim;
mod desk;
mod standing;

pub use desk::Desk;
pub use standing::{
    Failed, NO_MORE, RankStanding, SILENCE, Standing, ago, forget_shared, host_name, read, read_failed,
    read_shared, unix_now,
};

use crate::failure::{self, Told};
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
pub const LOCK_FILE: &str = ".lock";

/// A directory while this process works in it.
pub struct Place {
    desk: Arc<Desk>,
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
        let desk = Arc::new(Desk::new(dir, file, claim, Standing::new(stage)));
        desk.write();
        let shared = desk.clone();
        let writer = std::thread::Builder::new().name("progress".into()).spawn(move || shared.keep_writing());
        HERE.with_borrow_mut(|here| {
            here.left.retain(|(left, _)| left != dir);
            here.open.push(desk.clone());
        });
        // Without the thread nobody can watch, and the work goes on.
        Ok(Self { desk, writer: writer.ok(), hold, began: Instant::now(), finished: false })
    }

    /// Whether a lock keeps all other processes from this directory.
    pub fn is_alone(&self) -> bool {
        matches!(self.hold, Hold::Lock(_))
    }

    /// Ends work in a directory that is finished.
    pub fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.desk.close();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
        let standing = self.desk.standing();
        let dir = self.desk.dir().to_owned();
        if self.finished {
            let _ = std::fs::remove_file(self.desk.file());
        } else {
            self.desk.write();
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
            format!("process {} on {} (`{}`, begun {ago} ago)", found.pid, found.host, found.stage)
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
}
