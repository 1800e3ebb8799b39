//! Who works in a directory, where the file system has no locks (NFS without its lock service,
//! Lustre without `-o flock`).
//!
//! A process claims a directory with a file `.claim-N` that it makes together with its content,
//! which succeeds for one process only. Whether an earlier claim is still held is asked of the
//! processes where it was made on this machine. Of another machine, signs of life are what its
//! process writes: a file that changes while this process watches. No clock is compared with
//! another one, except the file system's with itself, which spares the waiting.
//!
//! A claim that was made by a process that is gone is replaced by the claim of the next number,
//! so that of several starters again one succeeds.

use super::state::{SILENCE, StageProgress, host_name, read_shared, start_of};
use super::{PROGRESS_FILE, read};
use anyhow::{Context, Result};
use gradtx_runtime::artifact::{MAX_CONFIG_BYTES, MAX_LINES_BYTES, read_regular};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Claims are named so, with a number.
const CLAIM: &str = ".claim-";
/// A claim while it is made; swept like every temporary file.
const TEMPORARY: &str = ".gradtx-";
/// A process on another machine that changes nothing for this long is gone: three times the
/// interval in which it writes at least.
pub const WATCHED: Duration = Duration::from_secs(15);
/// How often it is watched.
const INTERVAL: Duration = Duration::from_millis(200);
/// Starters that get into each other's way begin again, so often at most.
const ATTEMPTS: u32 = 20;

/// Content of a claim.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Owner {
    host: String,
    /// The machine since its start, and its space of process numbers: containers of one host name
    /// differ in it.
    machine: String,
    pid: u32,
    /// When the process was started, since a later one may have its number.
    pid_started: u64,
    /// Tells this claim from any other.
    token: String,
}

/// A directory that this process has claimed. Given up when dropped.
pub struct Claim {
    path: PathBuf,
}

impl Claim {
    /// The claim's file; its time is renewed as a sign of life.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Claims a directory; `None` where another process is working in it.
///
/// # Errors
/// If nothing can be written there.
pub fn take(dir: &Path) -> Result<Option<Claim>> {
    let own = Owner::own();
    for attempt in 0..ATTEMPTS {
        let before = claims(dir);
        if is_held(dir, &before, true)? {
            return Ok(None);
        }
        let number = before.keys().next_back().map_or(1, |last| last + 1);
        let path = dir.join(format!("{CLAIM}{number}"));
        match create(dir, &path, &own) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
            made => made.with_context(|| format!("{}: cannot write here", dir.display()))?,
        }
        let claim = Claim { path };
        let now = claims(dir);
        let is_new = |(n, text): (&u64, &Vec<u8>)| *n != number && before.get(n) != Some(text);
        if !now.iter().any(is_new) {
            for stale in before.keys() {
                let _ = std::fs::remove_file(dir.join(format!("{CLAIM}{stale}")));
            }
            return Ok(Some(claim));
        }
        // Another one began at the same moment. Both give up, and come back at different times.
        drop(claim);
        std::thread::sleep(Duration::from_millis(20 + random() % 200 * u64::from(attempt + 1)));
    }
    Ok(None)
}

/// Whether a process works in a directory that wants to be alone there.
pub fn is_taken(dir: &Path) -> Result<bool> {
    is_held(dir, &claims(dir), false)
}

/// Whether the claim of this process was replaced by that of another one: this one was silent
/// for too long, as a process is that was suspended.
pub(crate) fn is_lost(dir: &Path, claim: &Path) -> bool {
    let is_gone = std::fs::metadata(claim).is_err_and(|error| error.kind() == ErrorKind::NotFound);
    is_gone && !claims(dir).is_empty()
}

impl Owner {
    fn own() -> Self {
        let pid = std::process::id();
        let pid_started = start_of(pid).unwrap_or_default();
        Self { host: host_name(), machine: machine(), pid, pid_started, token: format!("{:016x}", random()) }
    }
}

fn machine() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let space = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    format!("{} {}", boot.trim(), space.display())
}

fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// Makes a claim with its content at once; fails where there is one of that name.
fn create(dir: &Path, path: &Path, own: &Owner) -> std::io::Result<()> {
    let text = serde_json::to_vec(own).expect("texts and numbers can be put into JSON");
    let temporary = dir.join(format!("{TEMPORARY}claim.{}.tmp", own.token));
    let linked = std::fs::write(&temporary, &text).and_then(|()| std::fs::hard_link(&temporary, path));
    let _ = std::fs::remove_file(&temporary);
    match linked {
        // Some file systems have no links either.
        Err(error) if error.kind() != ErrorKind::AlreadyExists => File::create_new(path)?.write_all(&text),
        linked => linked,
    }
}

/// All claims in a directory: number and content.
fn claims(dir: &Path) -> BTreeMap<u64, Vec<u8>> {
    let number = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let number = name.strip_prefix(CLAIM)?.parse().ok()?;
        Some((number, read_regular(&entry.path(), MAX_CONFIG_BYTES).ok()?))
    };
    std::fs::read_dir(dir).into_iter().flatten().flatten().filter_map(number).collect()
}

/// What is known of a process without watching it.
enum Sign {
    Alive,
    Gone,
    /// On another machine: a file shows it.
    File(PathBuf),
}

/// Whether a process is working in a directory; with `shared` also one that shares it with others.
fn is_held(dir: &Path, claims: &BTreeMap<u64, Vec<u8>>, shared: bool) -> Result<bool> {
    let mut signs: Vec<Sign> = claims.iter().map(|(n, text)| of_claim(dir, *n, text)).collect();
    let state = read(dir).map(|state| of_state(&state, dir.join(PROGRESS_FILE)));
    signs.extend(state);
    if shared {
        let named = read_shared(dir).into_iter();
        signs.extend(named.map(|(name, at)| of_state(&at, dir.join(format!("progress.{name}.json")))));
    }
    if signs.iter().any(|sign| matches!(sign, Sign::Alive)) {
        return Ok(true);
    }
    let files = signs.into_iter().filter_map(|sign| match sign {
        Sign::File(path) => Some(path),
        Sign::Alive | Sign::Gone => None,
    });
    let mut files: Vec<PathBuf> = files.collect();
    // A claim's process renews the claim and writes its progress: either shows that it lives.
    if !files.is_empty() {
        files.push(dir.join(PROGRESS_FILE));
    }
    changes(dir, &files)
}

fn of_claim(dir: &Path, number: u64, text: &[u8]) -> Sign {
    match serde_json::from_slice::<Owner>(text) {
        Ok(owner) if owner.machine == machine() => match start_of(owner.pid) == Some(owner.pid_started) {
            true => Sign::Alive,
            false => Sign::Gone,
        },
        _ => Sign::File(dir.join(format!("{CLAIM}{number}"))),
    }
}

/// Of a process that may hold the directory by a lock, which this machine does not see.
fn of_state(state: &StageProgress, file: PathBuf) -> Sign {
    match state.host == host_name() {
        // This process works there no more: it would have a claim.
        true if state.pid == std::process::id() => Sign::Gone,
        true if state.is_alive() => Sign::Alive,
        true => Sign::Gone,
        false => Sign::File(file),
    }
}

/// Whether one of the files changes, which is waited for as long as one was written lately by
/// the file system's own clock.
fn changes(dir: &Path, files: &[PathBuf]) -> Result<bool> {
    let now = clock(dir)?;
    let is_recent = |file: &PathBuf| {
        let written = std::fs::metadata(file).and_then(|found| found.modified());
        let age = written.map(|at| now.duration_since(at).unwrap_or_default().as_secs_f64());
        age.is_ok_and(|age| age <= SILENCE)
    };
    if !files.iter().any(is_recent) {
        return Ok(false);
    }
    let (begin, seconds) = (Instant::now(), WATCHED.as_secs());
    let shown = dir.display();
    tracing::warn!(
        "{shown}: this file system has no locks; waiting up to {seconds} s to see whether a process on another host \
         still works here"
    );
    let first = looks(files);
    while begin.elapsed() < WATCHED {
        std::thread::sleep(INTERVAL);
        let now = looks(files);
        // What vanishes is left by a process that ends.
        if now.iter().zip(&first).any(|(now, first)| now.is_some() && now != first) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Content and time of every file; none of one that is not there.
fn looks(files: &[PathBuf]) -> Vec<Option<(Vec<u8>, Option<SystemTime>)>> {
    let look = |file: &PathBuf| {
        let written = std::fs::metadata(file).and_then(|found| found.modified()).ok();
        Some((read_regular(file, MAX_LINES_BYTES).ok()?, written))
    };
    files.iter().map(look).collect()
}

/// The time by the clock of the file system that a directory is on.
fn clock(dir: &Path) -> Result<SystemTime> {
    let path = dir.join(format!("{TEMPORARY}clock.{:016x}.tmp", random()));
    let written = File::create_new(&path).and_then(|file| file.metadata()?.modified());
    let _ = std::fs::remove_file(&path);
    written.with_context(|| format!("{}: cannot write here", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    fn elsewhere() -> Owner {
        Owner { host: "elsewhere".into(), machine: "another".into(), ..Owner::own() }
    }

    fn age(path: &Path, seconds: u64) {
        let at = SystemTime::now() - Duration::from_secs(seconds);
        File::options().append(true).open(path).unwrap().set_modified(at).unwrap();
    }

    #[test]
    fn of_starters_at_one_moment_one_succeeds() {
        let dir = tempfile::tempdir().unwrap();
        let start = Barrier::new(6);
        let held: Vec<Option<Claim>> = std::thread::scope(|scope| {
            let one = || {
                start.wait();
                take(dir.path()).unwrap()
            };
            let starters: Vec<_> = (0..6).map(|_| scope.spawn(one)).collect();
            starters.into_iter().map(|starter| starter.join().unwrap()).collect()
        });
        assert_eq!(held.iter().flatten().count(), 1);
        assert!(is_taken(dir.path()).unwrap());
        drop(held);
        assert!(take(dir.path()).unwrap().is_some());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn claims_of_dead_local_processes_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let gone = Owner { pid_started: 1, ..Owner::own() };
        create(dir.path(), &dir.path().join(".claim-3"), &gone).unwrap();
        let began = Instant::now();
        let claim = take(dir.path()).unwrap().unwrap();
        assert!(began.elapsed() < Duration::from_secs(2));
        assert!(claim.path().ends_with(".claim-4") && !dir.path().join(".claim-3").exists());
        assert!(!is_lost(dir.path(), claim.path()));
        std::fs::rename(claim.path(), dir.path().join(".claim-5")).unwrap();
        assert!(is_lost(dir.path(), claim.path()), "another process has replaced it");
    }

    #[test]
    fn old_files_of_another_host_are_no_sign_of_life() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".claim-1");
        create(dir.path(), &path, &elsewhere()).unwrap();
        age(&path, 1000);
        // Its own clock is an hour ahead.
        let ahead = StageProgress {
            host: "elsewhere".into(),
            updated: super::super::unix_now() + 3600.0,
            ..StageProgress::new("x")
        };
        let progress = dir.path().join(PROGRESS_FILE);
        std::fs::write(&progress, serde_json::to_string(&ahead).unwrap()).unwrap();
        age(&progress, 1000);
        let began = Instant::now();
        assert!(take(dir.path()).unwrap().is_some());
        assert!(began.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn changing_files_are_signs_of_life() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".claim-1");
        create(dir.path(), &path, &elsewhere()).unwrap();
        std::thread::scope(|scope| {
            let taken = scope.spawn(|| take(dir.path()).unwrap().is_some());
            std::thread::sleep(Duration::from_millis(700));
            age(&path, 30);
            assert!(!taken.join().unwrap(), "it is held, though its time is in the past");
        });
        age(&path, 0);
        let began = Instant::now();
        assert!(take(dir.path()).unwrap().is_some());
        assert!((WATCHED..2 * WATCHED).contains(&began.elapsed()), "{:?}", began.elapsed());
    }
}
