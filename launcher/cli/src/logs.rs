//! `logs`: what the batch jobs of a run said; and the end of a log, for `status`.
//!
//! In: a run directory. Out: of its `logs/`, where the batch scripts put a file for the job and
//! one for every rank, the last lines; with `--follow` also what is appended, until Ctrl-C.

use crate::slurm::options::JobKind;
use anyhow::Result;
use gradtx_run::config::run_dir;
use gradtx_run::context::Context;
use gradtx_run::failure::{failed, unusable};
use gradtx_run::text::quoted;
use gradtx_runtime::artifact::open_regular;
use gradtx_runtime::text::printable;
use serde::Serialize;
use serde_json::json;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Directory of the logs in a run directory.
pub(crate) const LOGS_DIR: &str = "logs";
/// Lines that `status` shows.
const LINES: usize = 5;
/// Bytes that are read for a line, however long it is.
const LINE_BYTES: u64 = 2 << 10;
/// From one look at what was appended to the next.
const INTERVAL: Duration = Duration::from_millis(250);

/// Which logs to show.
#[derive(Debug, clap::Args)]
pub struct Job {
    /// Run directory.
    pub run: PathBuf,
    /// Which job's (default: the one that said something last).
    #[arg(value_enum, value_name = "JOB")]
    pub job: Option<JobKind>,
    /// The rank whose log is shown beside the job's own.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub rank: u32,
    /// Last lines of each log.
    #[arg(long, short = 'n', default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub lines: u32,
    /// Also show what is appended, until Ctrl-C.
    #[arg(long, short)]
    pub follow: bool,
}

/// A log, by what its name says: `gradtx-JOB-NUMBER.log` of the job itself, or
/// `gradtx-JOB-NUMBER[-rRESTARTS].RANK.log` of a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
struct LogFile {
    path: PathBuf,
    kind: JobKind,
    number: String,
    restarts: u32,
    rank: Option<u32>,
    written: SystemTime,
}

impl LogFile {
    fn read(path: PathBuf) -> Option<Self> {
        let name = path.file_name()?.to_str()?.strip_prefix("gradtx-")?.strip_suffix(".log")?;
        let (kind, rest) = name.split_once('-')?;
        let kind = JobKind::ALL.into_iter().find(|known| known.name() == kind)?;
        let (start, rank) = match rest.split_once('.') {
            Some((start, rank)) => (start, Some(rank.parse().ok()?)),
            None => (rest, None),
        };
        let (number, restarts) = match start.split_once("-r") {
            Some((number, restarts)) => (number, restarts.parse().ok()?),
            None => (start, 0),
        };
        let written = std::fs::metadata(&path).ok()?.modified().ok()?;
        Some(Self { kind, number: number.into(), restarts, rank, written, path })
    }
}

/// The logs to show: the newest job's own, and that of a rank in its last start.
fn select(run: &Path, kind: Option<JobKind>, rank: u32) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(run.join(LOGS_DIR)).into_iter().flatten().flatten();
    let all: Vec<LogFile> = entries.filter_map(|entry| LogFile::read(entry.path())).collect();
    let fits = |log: &&LogFile| kind.is_none_or(|kind| log.kind == kind);
    let Some(newest) = all.iter().filter(fits).max_by_key(|log| (log.written, &log.path)) else {
        return vec![];
    };
    let of_job = || all.iter().filter(|log| log.kind == newest.kind && log.number == newest.number);
    let own = of_job().find(|log| log.rank.is_none());
    let of_rank = of_job().filter(|log| log.rank == Some(rank)).max_by_key(|log| log.restarts);
    own.into_iter().chain(of_rank).map(|log| log.path.clone()).collect()
}

/// Shows the logs of a run.
///
/// # Errors
/// If the run has none.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    if !job.run.is_dir() {
        return Err(run_dir::no_run(&job.run));
    }
    if job.follow && context.ui.is_json() {
        return Err(unusable("--follow: expected without --json, since what is appended is text"));
    }
    let paths = select(&job.run, job.job, job.rank);
    if paths.is_empty() && !job.follow {
        let what = job.job.map_or(String::new(), |kind| format!(" of a job {}", kind.name()));
        let hint = format!("gradtx status {} shows how far the run is", quoted(&job.run.to_string_lossy()));
        return Err(failed(format!("{}: there are no logs{what}", job.run.join(LOGS_DIR).display()), hint));
    }
    let mut shown = vec![];
    for path in &paths {
        // From here on it is followed: what is appended meanwhile is not lost.
        let length = std::fs::metadata(path)?.len();
        let lines = end_of(path, length, job.lines as usize)?;
        shown.push((path.clone(), length, lines));
    }
    if context.ui.is_json() {
        let files: Vec<_> =
            shown.iter().map(|(path, _, lines)| json!({ "path": path, "lines": lines })).collect();
        context.ui.result_object("logs", json!({ "files": files }));
        return Ok(());
    }
    let mut out = Output { last: None };
    for (path, _, lines) in &shown {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        if !out.write(path, &text) {
            return Ok(());
        }
    }
    let followed = shown.into_iter().map(|(path, length, _)| (path, length)).collect();
    if job.follow { follow(job, followed, &mut out) } else { Ok(()) }
}

/// Prints what is appended to the logs, and to those of later starts, until nobody reads it.
fn follow(job: &Job, mut read: Vec<(PathBuf, u64)>, out: &mut Output) -> Result<()> {
    loop {
        std::thread::sleep(INTERVAL);
        for path in select(&job.run, job.job, job.rank) {
            if !read.iter().any(|(known, _)| *known == path) {
                read.push((path, 0));
            }
        }
        for (path, from) in &mut read {
            let Ok(mut file) = open_regular(path) else { continue };
            let length = file.metadata()?.len();
            // A file that is shorter than before was written again.
            *from = if length < *from { 0 } else { *from };
            if length == *from {
                continue;
            }
            file.seek(SeekFrom::Start(*from))?;
            let mut bytes = vec![];
            file.take(length - *from).read_to_end(&mut bytes)?;
            // Up to the end of a line; the rest when it is whole.
            let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            *from += whole as u64;
            if !out.write(path, &String::from_utf8_lossy(&bytes[..whole])) {
                return Ok(());
            }
        }
    }
}

/// Standard output, with a header wherever another file begins.
struct Output {
    last: Option<PathBuf>,
}

impl Output {
    /// Prints lines of a file; whether somebody still reads.
    fn write(&mut self, path: &Path, text: &str) -> bool {
        if text.is_empty() {
            return true;
        }
        let mut all = String::new();
        if self.last.as_deref() != Some(path) {
            let gap = if self.last.is_some() { "\n" } else { "" };
            all = format!("{gap}==> {} <==\n", path.display());
            self.last = Some(path.to_owned());
        }
        all += text;
        let mut out = std::io::stdout().lock();
        out.write_all(printable(&all).as_bytes()).and_then(|()| out.flush()).is_ok()
    }
}

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
    let length = std::fs::metadata(&path).ok()?.len();
    let lines = end_of(&path, length, LINES).ok()?;
    Some(LogEnd { path, lines })
}

/// The last lines before `end` that are not empty.
fn end_of(path: &Path, end: u64, most: usize) -> Result<Vec<String>> {
    let mut file = open_regular(path)?;
    let bytes = LINE_BYTES * most as u64;
    let from = end.saturating_sub(bytes);
    file.seek(SeekFrom::Start(from))?;
    let mut read = vec![];
    file.take(end - from).read_to_end(&mut read)?;
    let text = String::from_utf8_lossy(&read);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    Ok(lines[lines.len().saturating_sub(most)..].iter().map(|line| line.to_string()).collect())
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

    #[test]
    fn logs_are_of_the_newest_job_and_last_start() {
        let run = tempfile::tempdir().unwrap();
        let logs = run.path().join(LOGS_DIR);
        std::fs::create_dir(&logs).unwrap();
        let write = |name: &str, age: u64| {
            std::fs::write(logs.join(name), "x\n").unwrap();
            let file = File::options().append(true).open(logs.join(name)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        };
        let names = |kind, rank| -> Vec<String> {
            let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
            select(run.path(), kind, rank).iter().map(name).collect()
        };
        assert!(names(None, 0).is_empty());
        for (name, age) in [
            ("gradtx-curate-7.log", 900),
            ("gradtx-curate-7.0.log", 800),
            ("gradtx-train-8.log", 100),
            ("gradtx-train-8.0.log", 90),
            ("gradtx-train-8-r1.0.log", 80),
            ("gradtx-train-8-r1.1.log", 70),
            ("gradtx-evaluate-9_3.0.log", 600),
            ("gradtx-evaluate-9_3.log", 500),
            ("notes.txt", 1),
            ("gradtx-other-1.log", 1),
        ] {
            write(name, age);
        }
        assert_eq!(names(None, 0), ["gradtx-train-8.log", "gradtx-train-8-r1.0.log"]);
        assert_eq!(names(None, 1), ["gradtx-train-8.log", "gradtx-train-8-r1.1.log"]);
        assert_eq!(names(Some(JobKind::Curate), 0), ["gradtx-curate-7.log", "gradtx-curate-7.0.log"]);
        assert_eq!(
            names(Some(JobKind::Evaluate), 0),
            ["gradtx-evaluate-9_3.log", "gradtx-evaluate-9_3.0.log"]
        );
        assert_eq!(names(Some(JobKind::Report), 0), [""; 0]);
    }
}
