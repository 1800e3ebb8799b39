//! `doctor`: what is here, and does the work fit?
//!
//! In: this machine; runs and models on request. Out: one `Check` per thing:
//! fine, worth a note, or a problem with what to do about it. A problem is what this build,
//! or a run that was named, asks for and cannot have: only then the command fails.
//!
//! * machine: program, processor, memory, disks.
//! * cluster: GPUs, MPI, their libraries, SLURM.
//! * fit: the memory plans of a run's stages.

mod check;
mod cluster;
mod fit;
mod machine;

use anyhow::Result;
use check::{Check, Level};
use gradtx_run::context::Context;
use gradtx_run::failure::failed;
use serde_json::json;
use std::path::PathBuf;

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
        1 => Err(failed("1 check failed", "see `PROBLEM` above")),
        n => Err(failed(format!("{n} checks failed"), "see `PROBLEM` above")),
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
