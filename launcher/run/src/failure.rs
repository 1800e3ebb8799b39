//! What a person sees when something fails, and the exit code that a script sees.
//!
//! Stages return `anyhow` errors. A [`Failure`] in the chain carries what a plain error
//! lacks: the exit code and a hint about what to do. [`EXIT_CODES`] is the one list of
//! codes; `gradtx --help` prints it.

use gradtx_runtime::text::printable;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::fmt;
use std::io::Write;

/// Done.
pub const DONE: u8 = 0;
/// Failed; for `inspect`: damaged; for `doctor`: something cannot work here.
pub const FAILED: u8 = 1;
/// The command line or the configuration cannot be used.
pub const UNUSABLE: u8 = 2;
/// The directory holds results of another configuration.
pub(crate) const REFUSED: u8 = 3;
/// Another process is working in the directory.
pub const BUSY: u8 = 4;
/// Stopped because a signal asked for it; the same command resumes. (`EX_TEMPFAIL` of
/// sysexits.h: what batch scripts take for "again".)
pub const STOPPED: u8 = 75;
/// Interrupted by Ctrl-C.
pub const INTERRUPTED: u8 = 130;
/// Ended by SIGTERM where nothing could be checkpointed first.
pub const TERMINATED: u8 = 143;

/// Every exit code and what it means.
pub const EXIT_CODES: [(u8, &str); 9] = [
    (DONE, "done"),
    (FAILED, "failed; inspect: damaged; doctor: a check failed"),
    (UNUSABLE, "the command line or the configuration cannot be used"),
    (REFUSED, "refused: the directory holds results of other settings or inputs"),
    (BUSY, "another process is working in that directory"),
    (STOPPED, "stopped by SIGTERM or SIGUSR1 at a step's end; the same command resumes"),
    (101, "a bug in gradtx; what is finished is safe"),
    (INTERRUPTED, "interrupted (Ctrl-C); the same command resumes"),
    (TERMINATED, "terminated (SIGTERM) at once; the same command resumes"),
];

/// The list of exit codes for `--help`.
pub fn exit_codes() -> String {
    let lines = EXIT_CODES.map(|(code, meaning)| format!("  {code:>3}  {meaning}"));
    format!("Exit codes:\n{}", lines.join("\n"))
}

/// An error with an exit code and perhaps a hint.
#[derive(Debug)]
pub struct Failure {
    /// Exit code of the program.
    pub code: u8,
    /// What happened; may have several lines.
    pub what: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Failure {}

/// An unusable command line or configuration.
pub fn unusable(what: impl Into<String>) -> anyhow::Error {
    Failure { code: UNUSABLE, what: what.into(), hint: None }.into()
}

/// The same with a hint, if there is one.
pub fn unusable_with(what: impl Into<String>, hint: Option<String>) -> anyhow::Error {
    Failure { code: UNUSABLE, what: what.into(), hint }.into()
}

/// A refusal to mix results, with the settings that differ.
pub fn refused(what: impl fmt::Display, diff: String, hint: &str) -> anyhow::Error {
    let what = format!("{what}\n{}", diff.trim_end());
    Failure { code: REFUSED, what, hint: Some(hint.into()) }.into()
}

/// An error with another hint, if it is a failure with this one.
pub(crate) fn with_hint(mut error: anyhow::Error, from: &str, to: String) -> anyhow::Error {
    if let Some(failure) = error.downcast_mut::<Failure>().filter(|f| f.hint.as_deref() == Some(from)) {
        failure.hint = Some(to);
    }
    error
}

/// A refusal to work where another process does.
pub fn busy(what: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Failure { code: BUSY, what: what.into(), hint: Some(hint.into()) }.into()
}

/// The end of a stage that was asked to stop, and that has written its checkpoint.
pub fn stopped(code: u8) -> anyhow::Error {
    let hint = "everything up to here is kept: run the same command again to resume";
    Failure { code, what: "stopped as asked".into(), hint: Some(hint.into()) }.into()
}

/// Whether an error says that another process is at work.
pub fn is_busy(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.downcast_ref::<Failure>().is_some_and(|f| f.code == BUSY))
}

/// A failure with a hint.
pub fn failed(what: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Failure { code: FAILED, what: what.into(), hint: Some(hint.into()) }.into()
}

/// An error as it is reported: to a person, to a script, and in `failed.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReport {
    /// What happened, with its causes.
    pub message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Exit code of the program.
    pub code: u8,
}

impl From<&anyhow::Error> for ErrorReport {
    fn from(error: &anyhow::Error) -> Self {
        // A cause is left out where the message before it ends with it already.
        let mut message = String::new();
        for cause in error.chain().map(|cause| without_number(&cause.to_string())) {
            if !message.ends_with(&cause) {
                message += if message.is_empty() { "" } else { ": " };
                message += &cause;
            }
        }
        let failure = error.chain().find_map(|cause| cause.downcast_ref::<Failure>());
        let hint = failure.and_then(|f| f.hint.clone()).or_else(|| hint_of_system(error));
        Self { message, hint, code: failure.map_or(FAILED, |f| f.code) }
    }
}

/// A message without the number that the system has for it: `(os error 2)`.
fn without_number(message: &str) -> String {
    let Some((before, rest)) = message.split_once(" (os error ") else { return message.into() };
    match rest.split_once(')') {
        Some((number, after)) if number.parse::<i32>().is_ok() => format!("{before}{after}"),
        _ => message.into(),
    }
}

/// What helps against what the operating system refuses.
fn hint_of_system(error: &anyhow::Error) -> Option<String> {
    use std::io::ErrorKind;
    let kind = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>())?.kind();
    let hint = match kind {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            "make room, or raise the limit; what is finished is safe, and the same command resumes"
        }
        ErrorKind::PermissionDenied => "look at owner and mode of it and of the directories above it",
        ErrorKind::ReadOnlyFilesystem => "choose a directory on a file system that can be written to",
        _ => return None,
    };
    Some(hint.into())
}

impl ErrorReport {
    /// Whether nothing went wrong: somebody asked for the end.
    pub(crate) fn was_asked_for(&self) -> bool {
        matches!(self.code, STOPPED | INTERRUPTED | TERMINATED)
    }

    /// Prints to standard error: lines for people, or one JSON object. In one write, so that
    /// nothing that another process says ends up in the middle.
    pub fn print(&self, json: bool) {
        let Self { message, hint, code } = self;
        let error = if self.was_asked_for() { "" } else { "error: " };
        let text = match (json, hint) {
            (true, _) => {
                let event = json!({ "event": "error", "message": message, "hint": hint, "code": code });
                format!("{event}\n")
            }
            (false, Some(hint)) => format!("{error}{message}\nhint: {hint}\n"),
            (false, None) => format!("{error}{message}\n"),
        };
        // To a standard error that is closed nothing can be written; the exit code remains.
        let _ = std::io::stderr().write_all(printable(&text).as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn causes_are_told_once_and_the_system_gets_a_hint() {
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        let error = Err::<(), _>(full).context("metrics.jsonl: cannot write").context("train").unwrap_err();
        let error_report = ErrorReport::from(&error);
        assert!(
            error_report.message.starts_with("train: metrics.jsonl: cannot write: "),
            "{}",
            error_report.message
        );
        assert!(error_report.hint.unwrap().contains("make room"));
        assert_eq!(error_report.code, FAILED);
        let missing =
            anyhow::Error::from(std::io::Error::from_raw_os_error(2)).context("a.json: cannot read");
        assert_eq!(ErrorReport::from(&missing).message, "a.json: cannot read: No such file or directory");
        let error = failed("x: y", "do z").context("x: y");
        assert_eq!(
            ErrorReport::from(&error),
            ErrorReport { message: "x: y".into(), hint: Some("do z".into()), code: 1 }
        );
    }
}
