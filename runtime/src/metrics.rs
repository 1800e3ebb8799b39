//! What a run reports itself while it runs: JSON lines, and tokens per second.
//!
//! One record per line with a `step`, flushed at once, so that a file can be followed
//! and survives a crash up to the last whole line. A run that continues from a
//! checkpoint first drops the records after it, so no step stands there twice.

use crate::artifact::{MAX_LINES_BYTES, read_regular, write_atomic};
use crate::{Error, Result};
use serde::Serialize;
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A file of JSON records, one per line.
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: File,
}

impl JsonLines {
    /// Opens a file for appending after the records of the steps before `step`
    /// (counted as the records count them); records of later steps, records without
    /// one and an unfinished last line are dropped. With `step` 0, begins again.
    pub fn resume(path: &Path, step: u64) -> Result<Self> {
        let kept = match path.try_exists().map_err(|e| Error::io("read", path, e))? {
            true => keep_before(&read_regular(path, MAX_LINES_BYTES)?, step),
            false => vec![],
        };
        write_atomic(path, |out| out.write_all(&kept))?;
        let file = OpenOptions::new().append(true).open(path).map_err(|e| Error::io("open", path, e))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Appends a record, which should be an object with a `step`.
    pub fn write<T: Serialize>(&mut self, record: &T) -> Result<()> {
        let failed = |e: serde_json::Error| Error::file(&self.path, format!("cannot be put into JSON: {e}"));
        let mut line = serde_json::to_vec(record).map_err(failed)?;
        line.push(b'\n');
        // One write per line: readers see whole lines, with or without us.
        self.file.write_all(&line).map_err(|e| Error::io("write", &self.path, e))
    }

    /// Waits until everything written is on the disk.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::io("sync", &self.path, e))
    }

    /// All whole records of a file.
    pub fn read(path: &Path) -> Result<Vec<Value>> {
        let bytes = read_regular(path, MAX_LINES_BYTES)?;
        let whole = bytes.split_inclusive(|&b| b == b'\n').filter(|line| line.ends_with(b"\n"));
        whole
            .enumerate()
            .map(|(i, line)| {
                serde_json::from_slice(line)
                    .map_err(|e| Error::file(path, format!("line {} is not valid JSON: {e}", i + 1)))
            })
            .collect()
    }
}

fn keep_before(bytes: &[u8], step: u64) -> Vec<u8> {
    let keep = |line: &&[u8]| {
        let record = serde_json::from_slice::<Value>(line).ok().filter(|_| line.ends_with(b"\n"));
        record.and_then(|r| r["step"].as_u64()).is_some_and(|s| s < step)
    };
    bytes.split_inclusive(|&b| b == b'\n').filter(keep).flatten().copied().collect()
}

/// Tokens per second.
#[derive(Debug)]
pub struct TokenMeter {
    begin: Instant,
    tokens: u64,
}

/// Tokens in a time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// Tokens.
    pub tokens: u64,
    /// Time.
    pub time: Duration,
}

impl Rate {
    /// Tokens per second; 0 for no time.
    pub fn per_second(self) -> f64 {
        let seconds = self.time.as_secs_f64();
        if seconds > 0.0 { self.tokens as f64 / seconds } else { 0.0 }
    }
}

impl TokenMeter {
    /// Starts now.
    pub fn start() -> Self {
        Self { begin: Instant::now(), tokens: 0 }
    }

    /// Counts tokens.
    pub fn add(&mut self, tokens: usize) {
        self.tokens += tokens as u64;
    }

    /// Since the start.
    pub fn total(&self) -> Rate {
        Rate { tokens: self.tokens, time: self.begin.elapsed() }
    }
}

/// Bytes of main memory that this process has had at most; none where the system does not tell.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_resumed_file_has_every_step_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        let mut lines = JsonLines::resume(&path, 0).unwrap();
        (0..5).for_each(|step| lines.write(&json!({"step": step, "run": 1})).unwrap());
        drop(lines);
        // A crash in the middle of a line.
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend(b"{\"step\": 5, \"ru");
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(JsonLines::read(&path).unwrap().len(), 5);
        let mut lines = JsonLines::resume(&path, 3).unwrap();
        lines.write(&json!({"step": 3, "run": 2})).unwrap();
        let found = JsonLines::read(&path).unwrap();
        let steps: Vec<_> = found.iter().map(|r| (r["step"].as_u64().unwrap(), r["run"] == 1)).collect();
        assert_eq!(steps, [(0, true), (1, true), (2, true), (3, false)]);
        JsonLines::resume(&path, 0).unwrap();
        assert!(JsonLines::read(&path).unwrap().is_empty());
    }

    #[test]
    fn damaged_lines_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.jsonl");
        std::fs::write(&path, "{\"step\": 0}\n{x}\n").unwrap();
        assert!(JsonLines::read(&path).unwrap_err().to_string().contains("line 2"));
        assert!(JsonLines::resume(dir.path(), 0).is_err());
    }

    #[test]
    fn a_process_has_had_memory() {
        assert!(peak_memory().is_none_or(|bytes| bytes > 1 << 20));
    }

    #[test]
    fn tokens_add_up() {
        let mut meter = TokenMeter::start();
        meter.add(10);
        meter.add(5);
        assert_eq!(meter.total().tokens, 15);
        assert_eq!(Rate { tokens: 30, time: Duration::from_millis(1500) }.per_second(), 20.0);
        assert_eq!(Rate { tokens: 30, time: Duration::ZERO }.per_second(), 0.0);
    }
}
