//! [`StageProgress`]: how far a process is, as it says in a file.

use super::{FAILED_FILE, PROGRESS_FILE};
use crate::failure::ErrorReport;
use gradtx_runtime::artifact::{MAX_CONFIG_BYTES, read_file};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::SystemTime;

/// A process on another host that wrote nothing for this long is taken for gone, in seconds.
pub const SILENCE: f64 = 60.0;

/// The content of progress.json. Times are seconds since 1970.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StageProgress {
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
    pub ranks: Vec<RankProgress>,
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
    /// When the file was written, by the file system's clock; 0 where it is not known.
    #[serde(skip)]
    pub written: f64,
}

/// The part of a rank that has nothing left to do.
pub const NO_MORE: &str = "nothing";

/// How far one of several ranks is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RankProgress {
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
    /// Loss of its last step, where it trains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// When it reported this.
    pub updated: f64,
}

/// The content of failed.json: where an attempt ended, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failed {
    /// Where.
    #[serde(flatten)]
    pub state: StageProgress,
    /// Why.
    pub error: ErrorReport,
    /// When, in seconds since 1970.
    pub at: f64,
}

impl StageProgress {
    pub(super) fn new(stage: &str) -> Self {
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
    /// on another by the age of what it wrote, by its clock or the file system's. A time in the
    /// future says that clocks differ, and nothing else.
    pub fn is_alive(&self) -> bool {
        if self.host == host_name() {
            return start_of(self.pid) == Some(self.pid_started);
        }
        let now = unix_now();
        [self.updated, self.written].iter().any(|at| (now - at).abs() <= SILENCE)
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
pub(super) fn start_of(pid: u32) -> Option<u64> {
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

/// What the processes say that share a directory, by name; see [`super::DirLock::share`].
pub fn read_shared(dir: &Path) -> Vec<(String, StageProgress)> {
    let Ok(entries) = std::fs::read_dir(dir) else { return vec![] };
    let read = |entry: std::fs::DirEntry| {
        let file = entry.file_name().into_string().ok()?;
        let name = file.strip_prefix("progress.")?.strip_suffix(".json")?.to_string();
        Some((name, read_state(&entry.path())?))
    };
    let mut found: Vec<(String, StageProgress)> = entries.flatten().filter_map(read).collect();
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

/// A regular JSON file of ordinary size; nothing where there is none.
fn parse<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&read_file(path, MAX_CONFIG_BYTES).ok()?).ok()
}

/// Reads progress.json of a directory; nothing when it is not there or not readable, for
/// it may be replaced or removed at any moment.
pub fn read(dir: &Path) -> Option<StageProgress> {
    read_state(&dir.join(PROGRESS_FILE))
}

fn read_state(path: &Path) -> Option<StageProgress> {
    let written = std::fs::metadata(path).and_then(|found| found.modified()).ok();
    let written = written.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
    let state: StageProgress = parse(path)?;
    Some(StageProgress { written: written.map_or(0.0, |since| since.as_secs_f64()), ..state })
}

/// Reads failed.json of a directory.
pub fn read_failed(dir: &Path) -> Option<Failed> {
    parse(&dir.join(FAILED_FILE))
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
    use std::time::Duration;

    #[test]
    fn the_dead_and_the_silent_are_not_alive() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let mut state = StageProgress { pid: child.id(), ..StageProgress::new("train") };
        state.pid_started = start_of(child.id()).unwrap();
        assert!(state.is_alive());
        state.pid_started -= 1;
        assert!(!state.is_alive(), "another process has that number now");
        state.pid_started += 1;
        child.kill().unwrap();
        while start_of(child.id()).is_some() {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!state.is_alive(), "ended, though its parent has not asked");
        child.wait().unwrap();
        state.host = "elsewhere".into();
        assert!(state.is_alive(), "wrote a moment ago");
        state.updated -= 2.0 * SILENCE;
        assert!(!state.is_alive());
        state.updated = unix_now() + 3600.0;
        assert!(!state.is_alive(), "a clock that is ahead is no sign of life");
        state.written = unix_now();
        assert!(state.is_alive(), "the file system has just seen it");
    }

    #[test]
    fn times_read_well() {
        let said = [0.4, 119.0, 121.0, 7300.0, 180_000.0].map(ago);
        assert_eq!(said, ["0 s", "119 s", "2 min", "2 h 1 min", "2 days 2 h"]);
    }
}
