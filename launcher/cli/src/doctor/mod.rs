//! `doctor`: what is here, and does the work fit?
//!
//! In: this machine; runs and models on request. Out: one [`Check`] per thing looked at:
//! fine, worth a note, or a problem with what to do about it. A problem is what this build,
//! or a run that was named, asks for and cannot have: only then the command fails.
//!
//! * machine: program, processor, memory, disks.
//! * cluster: GPUs, MPI, their libraries, SLURM.
//! * fit: the memory plans of a run's stages.

mod cluster;
mod fit;
mod machine;

use anyhow::Result;
use gradtx_run::context::Context;
use gradtx_run::failure::failed;
use serde::Serialize;
use serde_json::{Value, json};
use std::path::PathBuf;

/// How something stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Note,
    /// Something that is asked for cannot work.
    Problem,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub topic: String,
    /// How it stands.
    pub level: Level,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// The same as numbers, for scripts.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub facts: Value,
}

impl Check {
    fn new(topic: &str, level: Level, found: impl Into<String>) -> Self {
        Self { topic: topic.into(), level, found: found.into(), advice: None, facts: Value::Null }
    }

    fn ok(topic: &str, found: impl Into<String>) -> Self {
        Self::new(topic, Level::Ok, found)
    }

    fn note(topic: &str, found: impl Into<String>) -> Self {
        Self::new(topic, Level::Note, found)
    }

    fn problem(topic: &str, found: impl Into<String>) -> Self {
        Self::new(topic, Level::Problem, found)
    }

    fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    fn facts(mut self, facts: Value) -> Self {
        self.facts = facts;
        self
    }
}

/// Looks at everything, and prints what was found.
pub fn run(context: &Context, runs: &[PathBuf], models: &[PathBuf]) -> Result<()> {
    let mut checks = machine::checks(context.threads, runs);
    checks.extend(cluster::checks(&context.place));
    for run in runs {
        checks.extend(fit::of_run(context, run));
    }
    for model in models {
        checks.extend(fit::of_model(context, model));
    }
    let problems = checks.iter().filter(|check| check.level == Level::Problem).count();
    if context.ui.is_json() {
        context.ui.result_object("doctor", json!({ "problems": problems, "checks": checks }));
    } else {
        gradtx_run::ui::say(text(&checks).trim_end());
    }
    match problems {
        0 => Ok(()),
        1 => Err(failed("one thing that is asked for cannot work here", "see `PROBLEM` above")),
        n => Err(failed(format!("{n} things that are asked for cannot work here"), "see `PROBLEM` above")),
    }
}

fn text(checks: &[Check]) -> String {
    let widest = checks.iter().map(|check| check.topic.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for check in checks {
        let level = match check.level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Problem => "PROBLEM",
        };
        text += &format!("{level:7}  {:widest$}  {}\n", check.topic, check.found);
        if let Some(advice) = &check.advice {
            text += &format!("{:7}  {:widest$}  -> {advice}\n", "", "");
        }
    }
    text
}
