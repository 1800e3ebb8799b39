//! [`ProgressWriter`]: what a stage says of its steps, and the thread that writes it down.

use super::claim;
use super::state::{RankProgress, StageProgress, unix_now};
use crate::failure::{self, ErrorReport};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// A progress file while it is written begins so, and is swept like every temporary file.
const TEMPORARY: &str = ".gradtx-";
/// Progress is written at most this often,
const WRITE_EVERY: Duration = Duration::from_secs(1);
/// and at least this often, whether there is any or not.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// What a stage's thread and the writing thread share.
pub struct ProgressWriter {
    dir: PathBuf,
    /// Name of the progress file.
    file: String,
    /// The claim of the directory, where there are no locks.
    claim: Option<PathBuf>,
    inner: Mutex<Inner>,
    wake: Condvar,
}

struct Inner {
    state: StageProgress,
    /// Steps at the beginning of the part, and when that was: what the rate is counted from.
    base: (u64, Instant),
    changed: bool,
    closed: bool,
}

impl ProgressWriter {
    pub(super) fn new(dir: &Path, file: String, claim: Option<PathBuf>, state: StageProgress) -> Self {
        let base = (0, Instant::now());
        let inner = Mutex::new(Inner { state, base, changed: false, closed: false });
        Self { dir: dir.to_owned(), file, claim, inner, wake: Condvar::new() }
    }

    /// The directory.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The progress file.
    pub(super) fn file(&self) -> PathBuf {
        self.dir.join(&self.file)
    }

    /// Ends the writing.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.wake.notify_all();
    }

    /// Writes how far the work is now.
    pub(super) fn write(&self) {
        write(&self.dir, &self.file, &self.state());
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere leaves plain numbers, which are good enough to be shown.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A part of `total` steps begins, `done` of which were done before.
    pub fn begin(&self, part: &str, done: u64, total: u64) {
        let mut inner = self.lock();
        inner.base = (done, Instant::now());
        inner.changed = true;
        let state = &mut inner.state;
        (state.part, state.message) = (part.into(), String::new());
        (state.done, state.total, state.rate) = (done, total, None);
        state.advanced = unix_now();
    }

    /// `done` steps of the part are done.
    pub fn set(&self, done: u64, left: Option<f64>, message: &str) {
        let mut inner = self.lock();
        let (base, since) = inner.base;
        let seconds = since.elapsed().as_secs_f64();
        inner.changed = true;
        let state = &mut inner.state;
        state.rate = (done > base && seconds > 0.0).then(|| (done - base) as f64 / seconds);
        (state.done, state.left) = (done, left);
        state.message = message.into();
        state.advanced = unix_now();
    }

    /// How far every rank is.
    pub fn set_ranks(&self, ranks: &[RankProgress]) {
        if ranks.len() > 1 {
            self.lock().state.ranks = ranks.to_vec();
        }
    }

    /// How far the work is now.
    pub fn state(&self) -> StageProgress {
        self.lock().state.clone()
    }

    /// Shows other machines that the claim is held, also where the disk is full. Ends the process
    /// if another one has replaced the claim: two may not write to one directory.
    fn renew_claim(&self) {
        let Some(claim) = &self.claim else { return };
        if claim::is_lost(&self.dir, claim) {
            let dir = self.dir.display();
            let message = format!("{dir}: another process has taken this directory over");
            let hint = "this one was silent for too long, e.g. suspended; what is finished is safe";
            ErrorReport { message, hint: Some(hint.into()), code: failure::BUSY }.print(false);
            signal_hook::low_level::exit(failure::BUSY.into());
        }
        // What fails here is not shown: the work does not depend on it.
        let _ =
            File::options().append(true).open(claim).and_then(|file| file.set_modified(SystemTime::now()));
    }

    /// Writes until the output is closed.
    pub(super) fn keep_writing(&self) {
        let mut written = Instant::now();
        let mut inner = self.lock();
        while !inner.closed {
            let waited = self.wake.wait_timeout(inner, WRITE_EVERY);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
            if !inner.closed && (inner.changed || written.elapsed() >= HEARTBEAT) {
                inner.changed = false;
                inner.state.updated = unix_now();
                let state = inner.state.clone();
                drop(inner);
                write(&self.dir, &self.file, &state);
                self.renew_claim();
                written = Instant::now();
                inner = self.lock();
            }
        }
    }
}

/// Replaces progress.json. Not synced, and an error is no error: a full disk must not end
/// the work by way of the file that reports it.
fn write(dir: &Path, file: &str, state: &StageProgress) {
    let temporary = dir.join(format!("{TEMPORARY}{file}.tmp"));
    let text = serde_json::to_string(state).expect("numbers and texts can be put into JSON");
    let written =
        std::fs::write(&temporary, text + "\n").and_then(|()| std::fs::rename(&temporary, dir.join(file)));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
}
