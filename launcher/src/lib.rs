//! The program `gradtx`: the pipeline's stages as subcommands.
//!
//! The way of a command: [`args`] (as typed) → [`config`] (checked) → [`stages`] (one
//! file each) → [`dispatch`] (the one place that chooses device and element type).
//! [`record`] makes every stage repeatable: finished and intact work is not done again,
//! and work of another configuration is refused. [`progress`] tells other processes who works
//! where and how far, [`ui`] tells the person or script that started this one.

pub mod aggregate;
pub mod args;
pub mod artifacts;
pub mod cluster;
pub mod config;
pub mod cost;
pub mod device;
pub mod dispatch;
pub mod failure;
pub mod interrupt;
pub mod progress;
pub mod record;
pub mod report;
pub mod schedule;
pub mod score;
pub mod slurm;
pub mod stages;
pub mod table;
pub mod translators;
pub mod ui;
pub mod world;

use args::{Args, Command};
use clap::{CommandFactory, FromArgMatches};
use cluster::World;
use failure::Told;
use std::ffi::OsString;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use std::time::Instant;

/// Environment variable that sets what is logged to standard error, e.g. `debug`.
const LOG_VARIABLE: &str = "GRADTX_LOG";

/// Runs the program with these arguments (the first is its name); prints, and tells the exit code.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    if args.get(1).is_some_and(|arg| arg == gradtx_runtime::data::SERVER_ARGUMENT) {
        return gradtx_runtime::data::serve();
    }
    gradtx_runtime::data::isolate();
    let parsed = Args::command().try_get_matches_from(&args).and_then(|matches| {
        let command = matches.subcommand_name().unwrap_or_default().to_string();
        Ok((Args::from_arg_matches(&matches)?, command))
    });
    let (args, command) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return ExitCode::from(not_parsed(&error, &args)),
    };
    let ui = ui::Ui::new(&command, args.quiet, args.json);
    let report = |error: &anyhow::Error| {
        let told = Told::from(error);
        progress::note_failure(&told);
        told.print(ui.is_json());
        told.code
    };
    let (has_ranks, is_shared) = (args.command.has_ranks(), args.command.is_shared());
    let work = |world: &World| work(args, &ui, world);
    ExitCode::from(match has_ranks {
        true => cluster::run(report, work),
        false => cluster::run_alone(&command, is_shared, report, work),
    })
}

/// Does what the command line asks for.
fn work(args: Args, ui: &ui::Ui, world: &World) -> anyhow::Result<()> {
    let began = Instant::now();
    if args.command.works() {
        interrupt::watch(ui);
    }
    let context = stages::Context::new(args.threads, ui.clone(), world);
    match args.command {
        Command::World { dir, world, seed, device } => {
            stages::world::run(&context, &dir, world, seed, device)
        }
        Command::Split(job) => stages::split::run(&context, &job),
        Command::Curate(job) => stages::curate::run(&context, world, &job),
        Command::Train(run) => stages::train::run(&context, world, &run),
        Command::Finetune { run, data, out, model, peft, allow_refinement } => {
            let job = stages::finetune::Job { data, out, role: model, peft, allow_refinement };
            stages::finetune::run(&context, &run, &job)
        }
        Command::Refine { run, updates, translated, out } => {
            stages::refine::run(&context, &run, &stages::refine::Job { updates, translated, out })
        }
        Command::Translate {
            run,
            updates,
            out,
            method,
            combine,
            random_student,
            allow_outliers,
            allow_duplicates,
        } => {
            let allow = aggregate::Allow { outliers: allow_outliers, duplicates: allow_duplicates };
            let job = stages::translate::Job { updates, out, method, combine, random_student, allow };
            stages::translate::run(&context, &run, &job)
        }
        Command::Merge { run, adapter, out, model } => {
            stages::merge::run(&context, &run, &stages::merge::Job { adapter, out, role: model })
        }
        Command::Evaluate { run, data, out, model, base, adapter } => {
            let job = stages::evaluate::Job { data, out, role: model, base, adapter };
            stages::evaluate::run(&context, &run, &job).map(drop)
        }
        Command::Report { run, evaluations, out } => {
            stages::report::run(&context, &stages::report::Job { run, evaluations, out })
        }
        Command::Submit(job) => stages::submit::run(&context, &job),
        Command::Inspect { path } => stages::inspect::run(&context, &path),
        Command::Status { path, verify } => stages::status::run(&context, &path, verify),
        Command::Doctor { run, model } => stages::doctor::run(&context, &run, &model),
        Command::Plan(job) => stages::plan::run(&context, &job),
        Command::Sweep(job) => stages::sweep::run(&context, &job),
        Command::Completions { shell } => stages::manual::completions(shell),
        Command::Man { dir } => stages::manual::pages(&dir),
        Command::Bench(job) => stages::bench::run(&context, world, &job),
        Command::Demo { dir, world, seed, preset, device, dtype } => {
            stages::demo::run(&context, &stages::demo::Job { dir, world, seed, preset, device, dtype })
        }
    }?;
    context.ui.end(began);
    ui::written()
}

/// Prints what the parser says of a command line, and tells the exit code.
fn not_parsed(error: &clap::Error, args: &[OsString]) -> u8 {
    // Help and version are "errors" of the parser that belong on stdout.
    if !error.use_stderr() {
        let printed = error.print().and_then(|()| std::io::stdout().flush());
        return match printed {
            // A reader that has seen enough (`gradtx --help | head`) is no error.
            Err(e) if e.kind() != ErrorKind::BrokenPipe => {
                let told = Told::from(&anyhow::Error::from(e).context("standard output: cannot write"));
                told.print(args.iter().any(|arg| arg == "--json"));
                told.code
            }
            Ok(()) | Err(_) => failure::DONE,
        };
    }
    if args.iter().any(|arg| arg == "--json") {
        let text = error.render().to_string();
        let what = text.split("\n\nUsage:").next().unwrap_or_default();
        let message = what.trim().trim_start_matches("error: ").to_string();
        Told { message, hint: None, code: failure::UNUSABLE }.print(true);
    } else {
        // To a standard error that is closed nothing can be said; the code tells.
        let _ = error.print();
    }
    failure::UNUSABLE
}
