//! Does what is missing of a sweep, one command after the other.
//!
//! In: the directories of a sweep. Out: the results of its commands, a line for every run that says
//! how it ended, and the comparison of all. Every command is a process of its own: one that fails,
//! panics or is killed for its memory ends its run, and the others continue. What is finished is
//! not started again, and what the translator has no part in is copied from a run with the
//! same settings.

use super::Job;
use super::steps::{self, Step};
use crate::compare;
use anyhow::{Context as _, Result};
use gradtx_pipeline::staleness::Run;
use gradtx_plan::sweep::{Curation, Sweep};
use gradtx_run::config::{Config, RUN_FILE, SweptRun};
use gradtx_run::context::Context;
use gradtx_run::failure::{INTERRUPTED, STOPPED, TERMINATED, failed, stopped, unusable};
use gradtx_run::interrupt::{ShutdownGuard, stop_requested};
use gradtx_run::record::{self, RECORD_FILE, Record, make_dir};
use gradtx_run::text::counted;
use gradtx_runtime::artifact::{open_regular, write_atomic};
use serde::Serialize;
use serde_json::json;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

/// How often a process is asked whether it has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// How a run of a sweep ended.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
enum Outcome {
    /// Everything is there.
    Finished,
    /// A command failed.
    Failed {
        /// Which.
        step: String,
        /// Its exit code; 128 and the signal's number for a process that was killed.
        code: i32,
        /// The command, to repeat it alone.
        command: String,
    },
    /// The curation that it shares failed.
    Skipped {
        /// Name of the curation.
        curation: String,
    },
}

/// Does what is missing.
///
/// # Errors
/// If a run failed, or somebody asked the sweep to stop; what is finished stays.
pub fn run(context: &Context, job: &Job, sweep: &Sweep) -> Result<()> {
    let _guard = ShutdownGuard::begin();
    let executor = Executor::new(context, job, sweep)?;
    let mut failed_curations = vec![];
    for curation in &sweep.curations {
        if let Some(outcome) = executor.curate(curation)? {
            context.ui.notice(&format!("sweep: curation {}: {}", curation.name, outcome.in_words()));
            failed_curations.push(curation);
        }
    }
    let mut outcomes = vec![];
    for run in &sweep.runs {
        let tuples = &run.config.reuse.tuples;
        let outcome = match failed_curations.iter().find(|curation| curation.dir == *tuples) {
            Some(curation) => Outcome::Skipped { curation: curation.name.clone() },
            None => executor.run_all(run)?,
        };
        outcomes.push((run.name.as_str(), outcome));
    }
    report(context, &outcomes);
    let finished: Vec<PathBuf> = sweep.runs.iter().map(|run| sweep.dir(run)).collect();
    compare::write(context, &finished, &compare::Files::of_sweep(&sweep.out))?;
    let bad = outcomes.iter().filter(|(_, outcome)| !matches!(outcome, Outcome::Finished)).count();
    if bad > 0 {
        let what = format!("sweep: {} of {} not finished", bad, counted(outcomes.len(), "run"));
        return Err(failed(what, "see the errors above; the same command does what is missing"));
    }
    Ok(())
}

/// Says how every run ended.
fn report(context: &Context, outcomes: &[(&str, Outcome)]) {
    let widest = outcomes.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    if !context.ui.is_json() {
        for (name, outcome) in outcomes {
            context.ui.result(format!("{name:widest$}  {}", outcome.in_words()));
        }
    }
    let runs: Vec<_> =
        outcomes.iter().map(|(name, outcome)| json!({ "name": name, "outcome": outcome })).collect();
    context.ui.result_object("sweep", json!({ "runs": runs }));
}

impl Outcome {
    fn in_words(&self) -> String {
        match self {
            Self::Finished => "finished".into(),
            Self::Failed { step, code, command } => {
                format!("FAILED in {step} with exit code {code}; alone: {command}")
            }
            Self::Skipped { curation } => format!("skipped: its curation {curation} failed"),
        }
    }
}

/// What starts the commands.
struct Executor<'a> {
    context: &'a Context,
    job: &'a Job,
    sweep: &'a Sweep,
    program: PathBuf,
    /// What starts ranks, if there is something.
    launcher: Vec<String>,
}

impl<'a> Executor<'a> {
    fn new(context: &'a Context, job: &'a Job, sweep: &'a Sweep) -> Result<Self> {
        let program = std::env::current_exe().context("cannot find the program's own path")?;
        let words = job.launcher.iter().flat_map(|line| line.split_whitespace());
        let launcher: Vec<String> = words.map(String::from).collect();
        if job.launcher.is_some() && launcher.is_empty() {
            return Err(unusable("--launcher: expected a command such as `mpirun -n 4`"));
        }
        Ok(Self { context, job, sweep, program, launcher })
    }

    /// Does a shared curation; how it ended, if not well.
    fn curate(&self, curation: &Curation) -> Result<Option<Outcome>> {
        let name = format!("curation {}", curation.name);
        self.step(&name, &curation.dir, None, &Step::curation(&curation.dir))
    }

    /// Does all commands of a run, until one fails.
    fn run_all(&self, run: &SweptRun) -> Result<Outcome> {
        let dir = self.sweep.dir(run);
        for step in steps::of_run(&dir, &self.job.client, &self.job.method) {
            if let Some(outcome) = self.step(&run.name, &dir, Some(run), &step)? {
                return Ok(outcome);
            }
        }
        Ok(Outcome::Finished)
    }

    /// Does a command in a run directory; how it ended, if not well. `swept` is the run of the sweep, if it
    /// is one.
    fn step(&self, name: &str, run: &Path, swept: Option<&SweptRun>, step: &Step) -> Result<Option<Outcome>> {
        if let Some(code) = stop_requested() {
            return Err(stopped(code));
        }
        if let Some(dir) = &step.dir {
            if finished(&run.join(dir), run).is_some() {
                return Ok(None);
            }
            if let Some(swept) = swept.filter(|_| step.is_shared)
                && self.copy(dir, swept)?
            {
                return Ok(None);
            }
        }
        self.context.ui.line(format!("sweep: {name}: {}", step.title));
        let code = self.start(step)?;
        if let Some(code) = stop_requested() {
            return Err(stopped(code));
        }
        match code {
            0 => Ok(None),
            code if [STOPPED, INTERRUPTED, TERMINATED].map(i32::from).contains(&code) => {
                Err(stopped(code.try_into().unwrap_or(STOPPED)))
            }
            code => Ok(Some(Outcome::Failed { step: step.title.clone(), code, command: step.command() })),
        }
    }

    /// Copies a result from a run with the same settings, if there is one that has it.
    fn copy(&self, dir: &Path, run: &SweptRun) -> Result<bool> {
        let (home, hash) = (self.sweep.dir(run), run.config.client_hash());
        if home.join(dir).join(RECORD_FILE).exists() {
            return Ok(false);
        }
        let alike = |other: &&SweptRun| other.name != run.name && other.config.client_hash() == hash;
        for other in self.sweep.runs.iter().filter(alike).map(|other| self.sweep.dir(other)) {
            if let Some(record) = finished(&other.join(dir), &home) {
                copy_result(&record, &other.join(dir), &home.join(dir))?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Runs a command to its end; its exit code.
    fn start(&self, step: &Step) -> Result<i32> {
        let ui = &self.context.ui;
        let mut words: Vec<OsString> = vec![];
        if step.has_ranks {
            words.extend(self.launcher.iter().map(OsString::from));
        }
        let alone = words.is_empty();
        words.push(self.program.clone().into());
        words.extend(step.arguments.iter().cloned());
        if alone {
            words.extend(["--threads".into(), self.context.threads.to_string().into()]);
        }
        words.extend(ui.is_quiet().then(|| "--quiet".into()));
        words.extend(ui.is_json().then(|| "--json".into()));
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        let child =
            command.spawn().with_context(|| format!("{}: cannot start", words[0].to_string_lossy()))?;
        wait(child)
    }
}

/// Waits for the end of a process. SIGTERM and SIGUSR1 are passed on to it; Ctrl-C reaches it from the terminal.
fn wait(mut child: Child) -> Result<i32> {
    let mut is_told = false;
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for a command")? {
            let signal = std::os::unix::process::ExitStatusExt::signal(&status).unwrap_or(0);
            return Ok(status.code().unwrap_or(128 + signal));
        }
        if stop_requested() == Some(STOPPED) && !is_told {
            is_told = true;
            let kill = format!("kill -TERM {}", child.id());
            // A process that has just ended needs no signal.
            let _ = Command::new("sh").args(["-c", &kill]).status();
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// The record of a directory that is finished, with the settings that a run has.
pub fn finished(dir: &Path, run: &Path) -> Option<Record> {
    let record = record::read(&dir.join(RECORD_FILE)).ok()?;
    let is_there = !record.outputs.is_empty() && record.missing(dir).is_empty();
    let config = Config::read(&run.join(RUN_FILE)).ok()?;
    let run = Run { dir: run, config: &config };
    let is_current = is_there && run.changes(dir, &record).is_ok_and(|changes| changes.is_empty());
    is_current.then_some(record)
}

/// Copies the files of a result and, last, its record.
fn copy_result(record: &Record, from: &Path, to: &Path) -> Result<()> {
    for name in record.outputs.keys().map(String::as_str).chain([RECORD_FILE]) {
        let path = to.join(name);
        make_dir(path.parent().unwrap_or(to))?;
        let mut source = open_regular(&from.join(name))?;
        write_atomic(&path, |out| std::io::copy(&mut source, out).map(drop))?;
    }
    Ok(())
}
