//! `status`: how far is a run?
//!
//! In: a directory, usually a run's. Out: a [`Row`] for every stage's directory found below
//! it, and for `curate` and `train` of a run also before they begin. What is said comes from
//! the disk alone: `record.json` and its files, the shards that are there, and what
//! [`gradtx_run::progress`] keeps. Nothing is written or locked, so a running stage never notices.

mod text;

use crate::inspect;
use crate::logs::{self, LogEnd};
use crate::slurm::job_status::{self, JobStatus};
use anyhow::Result;
use gradtx_pipeline::records::CurateInputs;
use gradtx_pipeline::staleness::Run;
use gradtx_run::config::{Config, RUN_FILE, run_dir};
use gradtx_run::context::Context;
use gradtx_run::failure::failed;
use gradtx_run::paths::{CURATIONS_DIR, INDEX_FILE};
use gradtx_run::progress::{self, Failed, StageProgress};
use gradtx_run::record::{self, RECORD_FILE, Record};
use gradtx_run::stage::Facts;
use gradtx_runtime::artifact::{Role as Side, shard_path};
use serde::Serialize;
use serde_json::json;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What a stage's directory is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The result is there.
    Finished,
    /// The result is there, and the run has other settings now than it was made with.
    Stale,
    /// The result was there; files of it are missing or changed.
    Damaged,
    /// A process is at work.
    Running,
    /// A process was at work, and is gone.
    Stopped,
    /// The last attempt ended with an error.
    Failed,
    /// Nothing is there.
    NotBegun,
    /// A batch job that will do it waits in SLURM's queue.
    Pending,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Stale => "stale",
            Self::Damaged => "DAMAGED",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Failed => "FAILED",
            Self::NotBegun => "not started",
            Self::Pending => "PENDING",
        }
    }
}

/// How much of a part of a stage is on disk.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Part {
    /// Which part, such as one of the two models.
    pub name: &'static str,
    /// Pieces that are there,
    pub done: usize,
    /// of so many.
    pub total: usize,
}

/// One of several processes that share a directory.
#[derive(Debug, Serialize)]
pub struct Process {
    /// Its name, in a job array its number.
    pub name: String,
    /// Whether it is still at work.
    pub alive: bool,
    /// How far it is, or was when it went.
    pub progress: StageProgress,
}

/// A stage's directory.
#[derive(Debug, Serialize)]
pub struct Row {
    /// The stage.
    pub stage: String,
    /// Its directory.
    pub dir: PathBuf,
    /// What state it is in.
    pub state: State,
    /// What is on disk; only of stages that work piece by piece.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<Part>,
    /// How far the process is, or was when it went.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<StageProgress>,
    /// Processes that share the directory and the work, by name; those that are gone included.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<Process>,
    /// Seconds that the part it works at will still take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<f64>,
    /// Why the last attempt ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failed: Option<Failed>,
    /// The end of the newest log of the attempt that failed or stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<LogEnd>,
    /// Its batch jobs that are in SLURM's queue.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub jobs: Vec<JobStatus>,
    /// How the run's settings differ from those that the result was made with.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<String>,
    /// Files that are missing or changed, or why the record cannot be read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<String>,
}

/// Directories this deep are looked into.
const DEEPEST: usize = 8;

/// Prints the status of everything below a directory.
pub fn run(context: &Context, path: &Path, verify: bool) -> Result<()> {
    if !path.is_dir() {
        let (what, hint) = run_dir::describe(path);
        let found = if path.exists() { ", found a file" } else { "" };
        return Err(failed(format!("{}: {what}; expected a run directory{found}", path.display()), hint));
    }
    let mut rows = look(path, verify)?;
    match job_status::submitted_below(path).and_then(job_status::in_queue) {
        Ok(jobs) => jobs.into_iter().for_each(|job| add_job(&mut rows, job)),
        Err(error) => context.ui.notice(&format!("jobs in SLURM's queue are not known: {error:#}")),
    }
    if rows.is_empty() {
        let (is, hint) = run_dir::describe(path);
        let what =
            format!("{}: {is}; expected a run directory, and no stage has worked here", path.display());
        return Err(failed(what, hint));
    }
    if context.ui.is_json() {
        context.ui.result_object("status", json!({ "path": path.display().to_string(), "stages": rows }));
    } else {
        gradtx_run::ui::say(text::of(path, &rows).trim_end());
    }
    Ok(())
}

/// Adds a batch job to the stage that it will do; jobs of several stages have a row of their own.
fn add_job(rows: &mut Vec<Row>, job: JobStatus) {
    let name = job.kind.name();
    let row = rows.iter_mut().find(|row| {
        row.stage == name && row.dir.starts_with(&job.run) && ["curate", "train"].contains(&name)
    });
    match row {
        Some(row) => row.add_job(job),
        None => {
            let state = if job.waits() { State::Pending } else { State::Running };
            let mut row = Row::new(name, &job.run.clone(), state);
            row.add_job(job);
            rows.push(row);
        }
    }
}

/// The stages of the pipeline, in their order.
fn stages() -> impl Iterator<Item = Facts> {
    gradtx_world::STAGES.into_iter().chain(gradtx_pipeline::stages::STAGES)
}

/// The state of every stage's directory below a directory, in the order of the pipeline.
pub fn look(path: &Path, verify: bool) -> Result<Vec<Row>> {
    let mut rows = vec![];
    let root = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    walk(&Walk { root: &root, verify }, path, 0, &mut rows)?;
    let place = |stage: &str| stages().position(|known| known.name == stage).unwrap_or(usize::MAX);
    rows.sort_by(|a, b| (place(&a.stage), &a.stage, &a.dir).cmp(&(place(&b.stage), &b.stage, &b.dir)));
    // Several runs may use the same tuples of another one.
    rows.dedup_by(|a, b| (&a.stage, &a.dir) == (&b.stage, &b.dir));
    Ok(rows)
}

/// What is the same for all directories that are walked through.
struct Walk<'a> {
    /// Where the walk began, as an absolute path without links.
    root: &'a Path,
    verify: bool,
}

fn walk(all: &Walk<'_>, dir: &Path, depth: usize, rows: &mut Vec<Row>) -> Result<()> {
    let verify = all.verify;
    let here = [RECORD_FILE, progress::PROGRESS_FILE, progress::FAILED_FILE];
    if here.iter().any(|name| dir.join(name).is_file()) {
        rows.push(Row::look(dir, verify));
    }
    if dir.join(RUN_FILE).is_file() {
        let reuse = Config::read(&dir.join(RUN_FILE)).map(|config| config.reuse).unwrap_or_default();
        for (stage, place) in [("curate", reuse.tuples_dir(dir)), ("train", reuse.translator_dir(dir))] {
            let is_started = here.iter().any(|name| place.join(name).is_file());
            let is_own = place.starts_with(dir);
            let is_below = || place.canonicalize().is_ok_and(|place| place.starts_with(all.root));
            match is_started {
                // Found on the way down, there or here.
                true if is_own || is_below() => {}
                true => rows.push(Row::look(&place, verify)),
                false if stage == "train" && is_shared_curation(dir) => {}
                false => rows.push(Row::new(stage, &place, State::NotBegun)),
            }
        }
    }
    if depth == DEEPEST {
        return Ok(());
    }
    // A directory that vanishes or may not be read is not the business of its neighbours.
    let Ok(entries) = std::fs::read_dir(dir) else { return Ok(()) };
    for entry in entries.flatten() {
        let name = entry.file_name();
        // Thousands of files, and no stage among them.
        let pieces = ["shards", "metrics", "init", "events"].iter().any(|n| name == **n);
        let hidden = name.to_string_lossy().starts_with('.');
        if entry.file_type().is_ok_and(|t| t.is_dir()) && !pieces && !hidden {
            walk(all, &entry.path(), depth + 1, rows)?;
        }
    }
    Ok(())
}

/// Whether a run directory is that of a curation that runs of a sweep share: there is nothing to train.
fn is_shared_curation(dir: &Path) -> bool {
    let is_there = |above: &Path| above.file_name().is_some_and(|name| name == CURATIONS_DIR);
    let above = dir.parent().filter(|above| is_there(above));
    above.and_then(Path::parent).is_some_and(|sweep| sweep.join(INDEX_FILE).is_file())
}

impl Row {
    fn new(stage: &str, dir: &Path, state: State) -> Self {
        Self {
            stage: stage.into(),
            dir: dir.to_owned(),
            state,
            parts: vec![],
            progress: None,
            processes: vec![],
            seconds_left: None,
            failed: None,
            log: None,
            jobs: vec![],
            changes: vec![],
            damaged: vec![],
        }
    }

    /// Adds a batch job that is in the queue.
    fn add_job(&mut self, job: JobStatus) {
        let works = matches!(self.state, State::Running | State::Finished | State::Stale);
        if job.waits() && !works {
            self.state = State::Pending;
        }
        self.jobs.push(job);
    }

    /// Looks at a stage's directory.
    fn look(dir: &Path, verify: bool) -> Self {
        let mut row = Self::new("unknown", dir, State::Stopped);
        row.progress = progress::read(dir);
        let path = dir.join(RECORD_FILE);
        let record = match path.is_file().then(|| record::read(&path)) {
            Some(Err(error)) => {
                row.damaged.push(format!("{error:#}"));
                None
            }
            read => read.and_then(Result::ok),
        };
        let unfinished = record.as_ref().is_none_or(|record| record.outputs.is_empty());
        if unfinished && row.progress.is_none() {
            // It may have started between the two looks.
            row.progress = progress::read(dir);
        }
        row.processes = progress::read_shared(dir)
            .into_iter()
            .map(|(name, progress)| Process { name, alive: progress.is_alive(), progress })
            .collect();
        row.failed = progress::read_failed(dir).filter(|_| unfinished);
        if let Some(state) = &row.progress {
            row.stage.clone_from(&state.stage);
        } else if let Some(failed) = &row.failed {
            row.stage.clone_from(&failed.state.stage);
        }
        let alive = row.progress.as_ref().is_some_and(StageProgress::is_alive)
            || row.processes.iter().any(|process| process.alive);
        if let Some(record) = &record {
            row.stage.clone_from(&record.stage);
            row.look_at_pieces(record, verify && unfinished && !alive);
            if !unfinished && !alive {
                row.damaged.extend(if verify { record.damaged(dir) } else { record.missing(dir) });
            }
        }
        row.state = match (alive, unfinished) {
            (true, _) => State::Running,
            (false, _) if !row.damaged.is_empty() => State::Damaged,
            (false, false) => State::Finished,
            (false, true) if row.failed.is_some() => State::Failed,
            (false, true) => State::Stopped,
        };
        if let (State::Finished, Some(record)) = (row.state, &record) {
            row.changes = changes(dir, record);
            if !row.changes.is_empty() {
                row.state = State::Stale;
            }
        }
        if matches!(row.state, State::Failed | State::Stopped) {
            let failed = row.failed.as_ref().map(|failed| &failed.state);
            let began = failed.or(row.progress.as_ref()).map(|state| state.started);
            row.log = began.and_then(|began| logs::newest(dir.parent()?, began));
        }
        match row.state {
            State::Running => row.seconds_left = row.progress.as_ref().and_then(StageProgress::seconds_left),
            // Of a process that was killed after its last write.
            State::Finished | State::Stale => row.progress = None,
            _ => {}
        }
        row
    }

    /// Counts the shards of a tuple store, both models'.
    fn look_at_pieces(&mut self, record: &Record, verify: bool) {
        let Ok(Some(inputs)) = record.inputs::<CurateInputs>(&self.dir) else { return };
        let total = inputs.curate.num_subsets;
        let entries = std::fs::read_dir(self.dir.join("shards")).into_iter().flatten().flatten();
        let files: BTreeSet<PathBuf> = entries.map(|entry| entry.path()).collect();
        for (name, side) in [("tiny", Side::Student), ("llm", Side::Teacher)] {
            // Known names among what is there, however many the record claims.
            let is_shard = |path: &&PathBuf| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let shadow = name.split('.').next().and_then(|number| number.parse::<usize>().ok());
                shadow.is_some_and(|k| k < total && shard_path(&self.dir, side, k) == **path)
            };
            let mut found: Vec<&PathBuf> = files.iter().filter(is_shard).collect();
            if verify {
                found.retain(|path| {
                    let report = inspect::look(path);
                    let problem = report.problems.first().map(|why| format!("{}: {why}", path.display()));
                    self.damaged.extend(problem.clone());
                    problem.is_none()
                });
            }
            self.parts.push(Part { name, done: found.len(), total });
        }
    }
}

/// How the settings of the run around a finished directory differ from those that it was made with.
fn changes(dir: &Path, record: &Record) -> Vec<String> {
    let Some(run) = dir.ancestors().find(|above| above.join(RUN_FILE).is_file()) else { return vec![] };
    // What cannot be read is told by the stages themselves.
    let Ok(config) = Config::read(&run.join(RUN_FILE)) else { return vec![] };
    let changes = Run { dir: run, config: &config }.changes(dir, record);
    changes.unwrap_or_default().lines().map(|line| line.trim_start().to_string()).collect()
}
