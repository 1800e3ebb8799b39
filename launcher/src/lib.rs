//! The program `gradtx`: the pipeline's stages as subcommands.
//!
//! The way of a command: [`args`] (as typed) → [`config`] (checked) → [`stages`] (one
//! file each) → [`dispatch`] (the one place that chooses device and element type).
//! [`record`] makes every stage repeatable: finished and intact work is not done again,
//! and work of another configuration is refused.

pub mod args;
pub mod config;
pub mod dispatch;
pub mod failure;
pub mod record;
pub mod score;
pub mod slurm;
pub mod stages;
pub mod translators;
pub mod ui;
pub mod world;

use args::{Args, Command};
use clap::Parser;
use std::ffi::OsString;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Environment variable that sets what is logged to standard error, e.g. `debug`.
const LOG_VARIABLE: &str = "GRADTX_LOG";

/// Runs the program with these arguments (the first is its name); prints, and tells the exit code.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args = match Args::try_parse_from(args) {
        Ok(args) => args,
        Err(error) => {
            // Help and version are "errors" of the parser that belong on stdout.
            let code = if error.use_stderr() { failure::UNUSABLE } else { failure::DONE };
            let printed = error.print();
            return ExitCode::from(if printed.is_ok() { code } else { failure::FAILED });
        }
    };
    let level = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new("warn"));
    // A second call in one process keeps the first one's log.
    let _ = tracing_subscriber::fmt().with_env_filter(level).with_writer(std::io::stderr).try_init();
    let context = stages::Context::new(args.threads, args.quiet);
    let done = match args.command {
        Command::World { dir, world, seed } => stages::world::run(&context, &dir, world, seed),
        Command::Curate(run) => stages::curate::run(&context, &run),
        Command::Train(run) => stages::train::run(&context, &run),
        Command::Finetune { run, data, out, model, peft } => {
            stages::finetune::run(&context, &run, &stages::finetune::Job { data, out, role: model, peft })
        }
        Command::Translate { run, updates, out, method, combine, random_student } => {
            let job = stages::translate::Job { updates, out, method, combine, random_student };
            stages::translate::run(&context, &run, &job)
        }
        Command::Evaluate { run, data, out, model, adapter } => {
            let job = stages::evaluate::Job { data, out, role: model, adapter };
            stages::evaluate::run(&context, &run, &job).map(drop)
        }
        Command::Submit(job) => stages::submit::run(&context, &job),
        Command::Inspect { path, json } => stages::inspect::run(&path, json),
        Command::Demo { dir, world, seed, preset } => stages::demo::run(&context, &dir, world, seed, preset),
    };
    match done {
        Ok(()) => ExitCode::from(failure::DONE),
        Err(error) => ExitCode::from(failure::report(&error)),
    }
}
