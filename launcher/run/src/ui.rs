//! What a person or a script sees while a stage works.
//!
//! In: messages, steps and results of the stages. Out, on standard output: lines; with
//! `--json` one object per line instead, distinguished by `event`:
//!
//! * `{"event": "message", "stage", "message"}`
//! * `{"event": "progress", "stage", "part", "done", "total", "rate", "seconds_left", "message"}`,
//!   every two seconds; `rate` is in steps per second.
//! * `{"event": "result", "stage", "dir", "files", "seconds", …}`, one for every stage that
//!   ends, with numbers of its own. `seconds` is null where everything was there before.
//!
//! Bars only on a terminal, on standard error. `--quiet` leaves results (and errors).
//! Progress also goes into the stage's directory: see [`crate::progress`].

use crate::progress::{self, ProgressWriter, StageProgress, ago};
use crate::record;
use anyhow::Result;
use gradtx_runtime::text::{printable, printable_line};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value, json};
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Whether this process says nothing.
static SILENT: AtomicBool = AtomicBool::new(false);

/// From now on this process says nothing on standard output: it is one of several, and not
/// the one that speaks for them.
pub(crate) fn silence() {
    SILENT.store(true, Ordering::Relaxed);
}

/// Whether another process speaks for this one.
pub fn is_silent() -> bool {
    SILENT.load(Ordering::Relaxed)
}

/// Why standard output cannot be written to, once that has happened.
static LOST: Mutex<Option<std::io::Error>> = Mutex::new(None);

/// Prints a line, with control characters of names and messages written out. A reader that has
/// gone away (`gradtx inspect … | head`) is no error; a full disk
/// ends no work either, and is an error in the end, by [`written`].
pub fn say(text: &str) {
    write(&format!("{}\n", printable(text)));
}

/// The same without the end of the line: a text that grows.
pub fn print(text: &str) {
    write(&printable(text));
}

/// Begins or ends a colour on a terminal: an escape sequence, which no text of a file may hold.
pub fn style(code: &'static str) {
    write(code);
}

fn write(text: &str) {
    if is_silent() {
        return;
    }
    let mut out = std::io::stdout().lock();
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush())
        && error.kind() != std::io::ErrorKind::BrokenPipe
    {
        LOST.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }
}

/// Fails if a part of what was printed got lost.
pub fn written() -> Result<()> {
    match LOST.lock().unwrap_or_else(PoisonError::into_inner).take() {
        None => Ok(()),
        Some(error) => {
            Err(anyhow::Error::from(error).context("standard output: cannot write all that was printed"))
        }
    }
}

/// Where messages go.
#[derive(Clone, Debug)]
pub struct Ui {
    command: Arc<str>,
    quiet: bool,
    json: bool,
    details: bool,
    terminal: bool,
    bars: MultiProgress,
    /// Result objects printed so far.
    results: Arc<AtomicUsize>,
}

impl Ui {
    /// The messages of a command.
    pub fn new(command: &str, quiet: bool, json: bool) -> Self {
        Self {
            command: command.into(),
            quiet,
            json,
            details: false,
            terminal: std::io::stderr().is_terminal(),
            bars: MultiProgress::with_draw_target(ProgressDrawTarget::stderr()),
            results: Arc::default(),
        }
    }

    /// The same for stages of which only warnings and errors are wanted: a command that runs hundreds.
    pub fn for_many(&self) -> Self {
        Self { quiet: true, json: false, command: "".into(), ..self.clone() }
    }

    /// The same with [`Self::detail`] printed, if `details` (`--verbose`).
    pub fn with_details(self, details: bool) -> Self {
        Self { details, ..self }
    }

    /// Whether the output is JSON.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Whether only results and errors are printed.
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// A line about what is being done; nothing with `--quiet`.
    pub fn line(&self, text: impl AsRef<str>) {
        if !self.quiet {
            self.result(text);
        }
    }

    /// A line about what is being done, on standard error: for commands whose results are texts on
    /// standard output. Nothing with `--quiet` or `--json`.
    pub fn status(&self, text: impl AsRef<str>) {
        if !self.quiet && !self.json {
            self.notice(text.as_ref());
        }
    }

    /// Lines for those who want to know how something is done, such as a memory table; only with
    /// `--verbose`.
    pub fn detail(&self, text: impl AsRef<str>) {
        if self.details {
            self.line(text);
        }
    }

    /// A word to whoever sits at the terminal, on standard error.
    pub fn notice(&self, text: &str) {
        if is_silent() {
            return;
        }
        let event = || json!({ "event": "notice", "message": text }).to_string();
        let line = if self.json { event() } else { printable(text).into_owned() };
        // To a standard error that is closed nothing can be said.
        self.bars.suspend(|| _ = std::io::stderr().write_all((line + "\n").as_bytes()));
    }

    /// Lines of a result, such as a table: printed with `--quiet` too.
    pub fn result(&self, text: impl AsRef<str>) {
        let text = text.as_ref();
        if self.json {
            let stage = progress::current().map_or(self.command.to_string(), |d| d.state().stage);
            say(&json!({ "event": "message", "stage": stage, "message": text }).to_string());
        } else {
            self.bars.suspend(|| say(text));
        }
    }

    /// A stage has ended, its result is in `dir`. `numbers` are an object's worth of what it
    /// found. With `--quiet`, the line is printed only for the command itself, not for the
    /// stages that another one runs.
    pub fn done(&self, stage: &str, dir: &Path, numbers: Value, text: impl AsRef<str>) {
        if self.json {
            let files = record::read(&dir.join(record::RECORD_FILE)).map(|record| {
                let paths = record.outputs.keys().map(|name| dir.join(name).display().to_string());
                paths.collect::<Vec<_>>()
            });
            let mut event = json!({
                "dir": dir.display().to_string(),
                "files": files.unwrap_or_default(),
                "seconds": progress::seconds_in(dir),
            });
            if let (Some(event), Value::Object(numbers)) = (event.as_object_mut(), numbers) {
                event.extend(numbers);
            }
            self.result_object(stage, event);
        } else if !self.quiet || stage == &*self.command {
            self.bars.suspend(|| say(text.as_ref()));
        }
    }

    /// A result as an object of its own; only with `--json`.
    pub fn result_object(&self, stage: &str, fields: Value) {
        if self.json {
            let mut event =
                Map::from_iter([("event".into(), "result".into()), ("stage".into(), stage.into())]);
            match fields {
                Value::Object(fields) => event.extend(fields),
                other => _ = event.insert("value".into(), other),
            }
            self.results.fetch_add(1, Ordering::Relaxed);
            say(&Value::Object(event).to_string());
        }
    }

    /// The command has ended well. Every command ends with a result, also one that has
    /// nothing to report but that.
    pub fn end(&self, began: Instant) {
        if self.results.load(Ordering::Relaxed) == 0 {
            self.result_object(&self.command, json!({ "seconds": began.elapsed().as_secs_f64() }));
        }
    }

    /// Takes bars from the terminal, for the program is about to end.
    pub fn clear(&self) {
        let _ = self.bars.clear();
    }

    /// Progress of `len` steps.
    pub fn progress(&self, what: &str, len: u64) -> Progress {
        self.progress_from(what, 0, len)
    }

    /// Progress of `len` steps of which `done` were done by a process before this one.
    pub fn progress_from(&self, what: &str, done: u64, len: u64) -> Progress {
        let output = progress::current();
        if let Some(output) = &output {
            output.begin(what, done, len);
        }
        let bar = (self.terminal && !self.quiet && !self.json).then(|| self.bar(what, done, len));
        let now = Instant::now();
        let state = StageProgress { part: what.into(), done, total: len, ..StageProgress::default() };
        Progress { ui: self.clone(), bar, output, state, base: done, started: now, said: now }
    }

    fn bar(&self, what: &str, done: u64, len: u64) -> ProgressBar {
        let form = "{prefix:24} {bar:30} {pos}/{len} {elapsed}, {eta} left {msg}";
        let style = ProgressStyle::with_template(form).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = self.bars.add(ProgressBar::new(len).with_position(done));
        bar.set_style(style);
        bar.set_prefix(what.to_string());
        bar.reset_eta();
        bar
    }
}

/// How far a piece of work is. Ends when dropped.
pub struct Progress {
    ui: Ui,
    bar: Option<ProgressBar>,
    /// Where people look from elsewhere; none outside of a stage's directory.
    output: Option<Arc<ProgressWriter>>,
    state: StageProgress,
    /// Steps done before this process.
    base: u64,
    started: Instant,
    said: Instant,
}

/// Without a terminal, a line at most this often; an object with `--json`.
const LINE_EVERY: Duration = Duration::from_secs(10);
const OBJECT_EVERY: Duration = Duration::from_secs(2);

impl Progress {
    /// `done` of the steps are done.
    pub fn set(&mut self, done: u64, message: impl Into<String>) {
        self.set_with(done, None, message);
    }

    /// The same, with the seconds that are left where steps alone do not tell.
    pub fn set_with(&mut self, done: u64, left: Option<f64>, message: impl Into<String>) {
        let message = message.into();
        self.state.left = left;
        if let Some(output) = &self.output {
            output.set(done, left, &message);
        }
        let every = if self.ui.json { OBJECT_EVERY } else { LINE_EVERY };
        match &self.bar {
            Some(bar) => {
                bar.set_message(printable_line(&message).into_owned());
                bar.set_position(done);
            }
            None if !self.ui.quiet && self.said.elapsed() >= every => {
                self.said = Instant::now();
                self.say(done, message);
            }
            None => {}
        }
    }

    fn say(&mut self, done: u64, message: String) {
        let seconds = self.started.elapsed().as_secs_f64();
        let state = &mut self.state;
        (state.done, state.message) = (done, message);
        state.rate = Some(done.saturating_sub(self.base) as f64 / seconds);
        let (left, StageProgress { part, total, message, rate, .. }) = (state.seconds_left(), state);
        if self.ui.json {
            let stage = self.output.as_ref().map_or(self.ui.command.to_string(), |d| d.state().stage);
            let event = json!({
                "event": "progress", "stage": stage, "part": part, "done": done, "total": total,
                "rate": rate, "seconds_left": left, "message": message,
            });
            say(&event.to_string());
            return;
        }
        let left = left.map_or(String::new(), |left| format!(", {} left", ago(left)));
        let message = if message.is_empty() { String::new() } else { format!(", {message}") };
        say(&format!("{part}: {done}/{total} after {}{left}{message}", ago(seconds)));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
            self.ui.bars.remove(bar);
        }
    }
}
