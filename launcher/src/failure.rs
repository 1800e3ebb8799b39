//! What a person sees when something fails, and the exit code that a script sees.
//!
//! Stages return `anyhow` errors. A [`Failure`] in the chain carries what a plain error
//! lacks: the exit code and a hint about what to do.

use std::fmt;

/// Done.
pub const DONE: u8 = 0;
/// Failed; for `inspect`: damaged.
pub const FAILED: u8 = 1;
/// The command line or the configuration cannot be used.
pub const UNUSABLE: u8 = 2;
/// The directory holds results of another configuration.
pub const REFUSED: u8 = 3;

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

/// A refusal to mix results, with the settings that differ.
pub fn refused(what: impl fmt::Display, diff: String, hint: &str) -> anyhow::Error {
    let what = format!("{what}\n{}", diff.trim_end());
    Failure { code: REFUSED, what, hint: Some(hint.into()) }.into()
}

/// A failure with a hint.
pub fn failed(what: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Failure { code: FAILED, what: what.into(), hint: Some(hint.into()) }.into()
}

/// Prints an error with its causes and hint, and tells the exit code.
pub fn report(error: &anyhow::Error) -> u8 {
    // A cause is left out where the message before it ends with it already.
    let mut message = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !message.ends_with(&cause) {
            message += if message.is_empty() { "" } else { ": " };
            message += &cause;
        }
    }
    let failure = error.chain().find_map(|cause| cause.downcast_ref::<Failure>());
    eprintln!("error: {message}");
    if let Some(hint) = failure.and_then(|f| f.hint.as_ref()) {
        eprintln!("hint: {hint}");
    }
    failure.map_or(FAILED, |f| f.code)
}
