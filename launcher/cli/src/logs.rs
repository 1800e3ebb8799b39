//! The end of the log that a batch job left: what a stage said before it went.
//!
//! In: a run directory. Out: the newest file of its `logs/`, where the batch scripts put one
//! for every rank, and its last lines.

use gradtx_runtime::artifact::open_regular;
use serde::Serialize;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Directory of the logs in a run directory.
pub const LOGS_DIR: &str = "logs";
/// Lines that are shown.
const LINES: usize = 5;
/// More than that is not read of a log, however large it is.
const BYTES: u64 = 8 << 10;

/// The end of a log.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LogEnd {
    /// The file.
    pub path: PathBuf,
    /// Its last lines.
    pub lines: Vec<String>,
}

/// The log that was written to last, if that was not before `since` (seconds since 1970).
pub fn newest(run: &Path, since: f64) -> Option<LogEnd> {
    let since = SystemTime::UNIX_EPOCH + Duration::try_from_secs_f64(since.max(0.0)).ok()?;
    let entries = std::fs::read_dir(run.join(LOGS_DIR)).ok()?.flatten();
    let written = entries.filter_map(|entry| {
        let data = entry.metadata().ok()?;
        (data.is_file() && data.len() > 0).then_some((data.modified().ok()?, entry.path()))
    });
    let (at, path) = written.max()?;
    if at < since {
        return None;
    }
    let lines = end_of(&path).ok()?;
    Some(LogEnd { path, lines })
}

fn end_of(path: &Path) -> anyhow::Result<Vec<String>> {
    let mut file = open_regular(path)?;
    let from = file.metadata()?.len().saturating_sub(BYTES);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = vec![];
    file.take(BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    Ok(lines[lines.len().saturating_sub(LINES)..].iter().map(|line| line.to_string()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn the_last_lines_of_the_newest_log() {
        let run = tempfile::tempdir().unwrap();
        assert_eq!(newest(run.path(), 0.0), None);
        let logs = run.path().join(LOGS_DIR);
        std::fs::create_dir(&logs).unwrap();
        let write = |name: &str, lines: usize, age: u64| {
            let path = logs.join(name);
            let text: String = (0..lines).map(|i| format!("{name} line {i}\n\n")).collect();
            std::fs::write(&path, text).unwrap();
            let at = SystemTime::now() - Duration::from_secs(age);
            File::options().append(true).open(&path).unwrap().set_modified(at).unwrap();
        };
        write("old.0.log", 9, 500);
        write("new.1.log", 2000, 60);
        write("empty.2.log", 0, 0);
        let found = newest(run.path(), 0.0).unwrap();
        assert_eq!(found.path, logs.join("new.1.log"));
        assert_eq!(found.lines, [1995, 1996, 1997, 1998, 1999].map(|i| format!("new.1.log line {i}")));
        let now = gradtx_run::progress::unix_now();
        assert_eq!(newest(run.path(), now - 10.0), None, "that was another attempt's");
    }
}
