//! The program `gradtx`: the pipeline's stages as subcommands.
//!
//! The way of a command: [`args`] (as typed) → [`gradtx_run::config`] (checked) → a stage
//! (one file each, in [`gradtx_pipeline::stages`], or a tool here) → [`gradtx_run::dispatch`]
//! (the one place that chooses device and element type).

pub mod args;
mod audit;
pub mod cancel;
pub mod compare;
pub mod config;
pub mod convert;
pub mod cross_validate;
pub mod diff;
pub mod doctor;
pub mod environment;
mod flags;
pub mod generate;
pub mod help;
pub mod init;
mod init_clients;
pub mod inspect;
pub mod logs;
pub mod manual;
pub mod model_args;
pub mod preview;
pub mod slurm;
pub mod status;
pub mod submit;
pub mod sweep;

use args::Args;
use clap::FromArgMatches;
use gradtx_run::cluster::World;
use gradtx_run::command_log::LoggedCommand;
use gradtx_run::config::RUN_FILE;
use gradtx_run::context::Context;
use gradtx_run::failure::ErrorReport;
use gradtx_run::{cluster, failure, interrupt, progress, ui};
use std::ffi::OsString;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use std::time::Instant;

/// Runs the program with these arguments (the first is its name); prints, and returns the exit code.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    #[cfg(feature = "cuda")]
    gradtx_kernels::cuda::nccl_environment();
    if args.get(1).is_some_and(|arg| arg == gradtx_runtime::data::SERVER_ARGUMENT) {
        return gradtx_runtime::data::serve();
    }
    gradtx_runtime::data::isolate();
    let parsed = help::command().try_get_matches_from(&args).and_then(|matches| {
        let command = matches.subcommand_name().unwrap_or_default().to_string();
        Ok((Args::from_arg_matches(&matches)?, command))
    });
    let (args, command) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            let typed: Vec<String> = args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect();
            let error = flags::with_new_name(error, &help::command(), &typed);
            return ExitCode::from(not_parsed(&error, &args));
        }
    };
    let ui = ui::Ui::new(&command, args.quiet, args.json).with_details(args.verbose > 0);
    cluster::set_verbosity(args.verbose);
    let report = |error: &anyhow::Error| {
        let error_report = ErrorReport::from(error);
        progress::note_failure(&error_report);
        error_report.print(ui.is_json());
        error_report.code
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
    let context = Context::new(args.threads, ui.clone(), world);
    let run = args.command.run_dir();
    let result = args.command.run(&context, world);
    // Only a directory that the command accepted as a run or made one.
    if let Some(run) = run.filter(|run| world.comm().rank() == 0 && run.join(RUN_FILE).is_file()) {
        let code = result.as_ref().err().map_or(failure::DONE, |error| ErrorReport::from(error).code);
        LoggedCommand::ended(&context, world.comm().size(), began.elapsed(), code).append(&run);
    }
    result?;
    context.ui.end(began);
    ui::written()
}

/// Prints what the parser says of a command line, and returns the exit code.
fn not_parsed(error: &clap::Error, args: &[OsString]) -> u8 {
    // Help and version are "errors" of the parser that belong on stdout.
    if !error.use_stderr() {
        let printed = error.print().and_then(|()| std::io::stdout().flush());
        return match printed {
            // A reader that has seen enough (`gradtx --help | head`) is no error.
            Err(e) if e.kind() != ErrorKind::BrokenPipe => {
                let error_report =
                    ErrorReport::from(&anyhow::Error::from(e).context("standard output: cannot write"));
                error_report.print(args.iter().any(|arg| arg == "--json"));
                error_report.code
            }
            Ok(()) | Err(_) => failure::DONE,
        };
    }
    if args.iter().any(|arg| arg == "--json") {
        let text = error.render().to_string();
        let what = text.split("\n\nUsage:").next().unwrap_or_default();
        let message = what.trim().trim_start_matches("error: ").to_string();
        ErrorReport { message, hint: None, code: failure::UNUSABLE }.print(true);
    } else {
        // To a standard error that is closed nothing can be written; the exit code remains.
        let _ = error.print();
    }
    failure::UNUSABLE
}
