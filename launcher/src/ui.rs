//! What a person sees while a stage works: progress bars on a terminal, lines elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Whether this process says nothing.
static SILENT: AtomicBool = AtomicBool::new(false);

/// From now on this process says nothing on standard output: it is one of several, and not
/// the one that speaks for them.
pub fn silence() {
    SILENT.store(true, Ordering::Relaxed);
}

/// Prints a line. A reader that has gone away (`gradtx inspect … | head`) is no error.
pub fn say(text: &str) {
    if SILENT.load(Ordering::Relaxed) {
        return;
    }
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// Where messages go.
#[derive(Clone, Debug)]
pub struct Ui {
    quiet: bool,
    terminal: bool,
}

impl Ui {
    /// Messages on standard output; bars only when standard error is a terminal.
    pub fn new(quiet: bool) -> Self {
        Self { quiet, terminal: std::io::stderr().is_terminal() }
    }

    /// A line about what is being done; nothing with `--quiet`.
    pub fn line(&self, text: impl AsRef<str>) {
        if !self.quiet {
            say(text.as_ref());
        }
    }

    /// A result: printed with `--quiet` too.
    pub fn result(&self, text: impl AsRef<str>) {
        say(text.as_ref());
    }

    /// Progress of `len` steps.
    pub fn progress(&self, what: &str, len: u64) -> Progress {
        let bar = (self.terminal && !self.quiet).then(|| {
            let style = ProgressStyle::with_template("{prefix:24} {bar:30} {pos}/{len} {elapsed} {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::with_draw_target(Some(len), ProgressDrawTarget::stderr());
            bar.set_style(style);
            bar.set_prefix(what.to_string());
            bar
        });
        Progress {
            bar,
            quiet: self.quiet,
            what: what.to_string(),
            len,
            started: Instant::now(),
            said: Instant::now(),
        }
    }
}

/// How far a piece of work is. Ends when dropped.
pub struct Progress {
    bar: Option<ProgressBar>,
    quiet: bool,
    what: String,
    len: u64,
    started: Instant,
    said: Instant,
}

/// Without a terminal, a line at most this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

impl Progress {
    /// `done` of the steps are done.
    pub fn set(&mut self, done: u64, message: impl Into<String>) {
        match &self.bar {
            Some(bar) => {
                bar.set_message(message.into());
                bar.set_position(done);
            }
            None if !self.quiet && self.said.elapsed() >= LINE_EVERY => {
                self.said = Instant::now();
                let seconds = self.started.elapsed().as_secs();
                say(&format!("{}: {done}/{} after {seconds} s, {}", self.what, self.len, message.into()));
            }
            None => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
