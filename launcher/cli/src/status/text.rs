//! What `status` prints for people.
//!
//! In: [`Row`]s. Out: a line or a few for each stage's directory, in columns; whatever names,
//! messages and logs hold, each line of them stays one.

use super::{Process, Row, State, stages};
use crate::logs::LogEnd;
use crate::slurm::job_status::JobStatus;
use gradtx_run::progress::{self, Failed, RankProgress, StageProgress, ago, unix_now};
use gradtx_run::text::quoted;
use gradtx_runtime::text::printable_line;
use std::path::Path;

/// Ranks that are listed one by one.
const MAX_RANKS: usize = 16;
/// More finished directories of one stage than this are one line of text.
const LISTED: usize = 4;

impl Row {
    /// What is to be said about it, in one line or a few.
    fn details(&self) -> Vec<String> {
        let now = unix_now();
        let parts: Vec<String> =
            self.parts.iter().map(|p| format!("{} of {} shards of {}", p.done, p.total, p.name)).collect();
        let mut lines = if parts.is_empty() { vec![] } else { vec![parts.join(", ")] };
        let at = |state: &StageProgress| state.steps().map_or(String::new(), |steps| format!("{steps}, "));
        match self.state {
            State::Finished | State::Pending => {}
            State::NotBegun if !self.jobs.is_empty() => {}
            State::Stale => {
                lines.push("finished, with other settings than run.toml has now:".into());
                lines.extend(self.changes.iter().cloned());
            }
            State::NotBegun => {
                let run = quoted(&self.dir.parent().unwrap_or(&self.dir).to_string_lossy());
                lines.push(format!("gradtx {} --run {run}", self.stage));
            }
            State::Running => {
                lines.extend(self.processes.iter().map(Process::line));
                if let Some(state) = &self.progress {
                    lines.extend(speed(state));
                    let (began, step) = (ago(now - state.started), ago(now - state.advanced));
                    let step = state.steps().map_or(String::new(), |_| format!(", last step {step} ago"));
                    let (pid, host) = (state.pid, &state.host);
                    lines.push(format!("process {pid} on {host}, started {began} ago{step}"));
                    lines.extend(ranks(state, now));
                }
            }
            State::Stopped => {
                let when = self.progress.as_ref().map(|state| {
                    let silent = now - state.updated;
                    format!("{}{} ago; ", at(state), ago(silent))
                });
                let when = when.unwrap_or_default();
                let again = match stages().find(|stage| stage.name == self.stage) {
                    Some(stage) if !stage.resumes => "run the same command again: it starts over",
                    _ => "run the same command again to resume",
                };
                lines.push(format!("{when}{again}"));
                lines.extend(self.processes.iter().map(Process::line));
            }
            State::Failed => {
                if let Some(Failed { state, error, at: when }) = &self.failed {
                    lines.push(format!("{}{} ago:", at(state), ago(now - when)));
                    lines.extend(error.message.lines().map(String::from));
                    lines.extend(error.hint.iter().map(|hint| format!("hint: {hint}")));
                }
            }
            State::Damaged => {
                lines.extend(self.damaged.iter().take(LISTED).cloned());
                if self.damaged.len() > LISTED {
                    lines.push(format!("and {} more", self.damaged.len() - LISTED));
                }
                lines.push("run the same command again to rebuild what is damaged".into());
            }
        }
        lines.extend(self.jobs.iter().map(JobStatus::line));
        if let Some(LogEnd { path, lines: last }) = &self.log {
            lines.push(format!("{} ends with:", path.display()));
            lines.extend(last.iter().map(|line| format!("  {line}")));
        }
        lines
    }
}

impl Process {
    /// `process 3 (pid 812 on n2): step 3 of 9, ...`
    fn line(&self) -> String {
        let Self { name, alive, progress } = self;
        let what = match alive {
            true => speed(progress).unwrap_or_else(|| "has just started".into()),
            false => format!("gone {} ago", ago(unix_now() - progress.updated)),
        };
        format!("process {name} (pid {} on {}): {what}", progress.pid, progress.host)
    }
}

/// A line for every rank, or for the first and the silent ones of many.
fn ranks(state: &StageProgress, now: f64) -> Vec<String> {
    let silent = |rank: &RankProgress| now - rank.updated > progress::SILENCE;
    let line = |rank: &RankProgress| {
        let RankProgress { rank: number, node, part, done, total, groups, rate, unit, updated, .. } = rank;
        let at = match (part.as_str(), total) {
            ("", _) => "has not started".to_string(),
            (progress::NO_MORE, _) => "has nothing left to do".into(),
            (_, 0) => "between two groups".into(),
            _ => format!("{part}, step {done} of {total}, {rate:.0} {unit}/s"),
        };
        let told = if silent(rank) { format!("; SILENT for {}", ago(now - updated)) } else { String::new() };
        let groups = if *groups > 0 { format!("; {groups} groups done") } else { String::new() };
        format!("rank {number} on {node}: {at}{groups}{told}")
    };
    let all = &state.ranks;
    let quiet = all.iter().filter(|rank| silent(rank)).count();
    let mut lines: Vec<String> = all
        .iter()
        .enumerate()
        .filter(|(i, rank)| *i < MAX_RANKS || silent(rank))
        .map(|(_, r)| line(r))
        .collect();
    if !all.is_empty() {
        lines.insert(0, format!("{} of {} ranks reporting", all.len() - quiet, all.len()));
    }
    lines
}

/// `step 130 of 400 (32 %), 2.1 steps/s, 2 min left; loss 0.1`
fn speed(state: &StageProgress) -> Option<String> {
    let mut text = state.steps()?;
    if let Some(percent) = (100 * state.done).checked_div(state.total) {
        text += &format!(" ({percent} %)");
    }
    if let Some(rate) = state.rate.filter(|rate| *rate > 0.0) {
        text += &match rate >= 1.0 {
            true => format!(", {rate:.1} steps/s"),
            false => format!(", {:.1} s a step", 1.0 / rate),
        };
    }
    if let Some(left) = state.seconds_left() {
        text += &format!(", {} left", ago(left));
    }
    if !state.message.is_empty() {
        text += &format!("; {}", state.message);
    }
    Some(text)
}

/// The rows, a line or a few for each.
pub(super) fn of(path: &Path, rows: &[Row]) -> String {
    let mut lines: Vec<[String; 3]> = vec![];
    let mut line = |stage: &str, state: State, place: String, details: Vec<String>| {
        // Each in its own line, whatever names, messages and logs hold.
        let shown = |text: String| printable_line(&text).into_owned();
        let (place, mut details) = (shown(place), details.into_iter().map(shown));
        let first = details.next().map_or(String::new(), |first| format!("  {first}"));
        lines.push([shown(stage.into()), state.name().into(), place + &first]);
        lines.extend(details.map(|more| [String::new(), String::new(), format!("  {more}")]));
    };
    let finished_of =
        |stage: &str| rows.iter().filter(|r| r.stage == stage && r.state == State::Finished).count();
    let mut summed: Vec<&str> = vec![];
    for row in rows {
        let count = finished_of(&row.stage);
        if row.state == State::Finished && count > LISTED {
            if !summed.contains(&row.stage.as_str()) {
                summed.push(&row.stage);
                line(&row.stage, row.state, format!("{count} directories"), vec![]);
            }
            continue;
        }
        let place = row.dir.strip_prefix(path).unwrap_or(&row.dir).display().to_string();
        line(&row.stage, row.state, if place.is_empty() { ".".into() } else { place }, row.details());
    }
    let widest = |column: usize| lines.iter().map(|l| l[column].chars().count()).max().unwrap_or(0);
    let (a, b) = (widest(0), widest(1));
    let lines = lines
        .iter()
        .map(|[stage, state, rest]| format!("{stage:a$}  {state:b$}  {rest}").trim_end().to_string());
    format!("{}\n{}", printable_line(&path.to_string_lossy()), lines.collect::<Vec<_>>().join("\n"))
}
