//! `config`: what settings there are, what they mean, and what they are by default.

use anyhow::Result;
use gradtx_run::config::{defaults, explain, page, schema};
use gradtx_run::context::Context;

/// What to print about settings.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Job {
    /// Print all settings with their defaults, as a run file with comments.
    #[arg(long)]
    defaults: bool,
    /// Print a JSON schema of run files, for editors.
    #[arg(long)]
    schema: bool,
    /// Print what a setting or a section means, e.g. `train.learning_rate` or `curate`.
    #[arg(long, value_name = "KEY")]
    explain: Option<String>,
    /// Print docs/configuration.md.
    #[arg(long, hide = true)]
    markdown: bool,
}

/// Prints it.
pub(crate) fn run(context: &Context, job: &Job) -> Result<()> {
    let text = match &job.explain {
        Some(key) => explain(key)?,
        None if job.schema && context.ui.is_json() => {
            context.ui.result_object("config", schema());
            return Ok(());
        }
        None if job.schema => serde_json::to_string_pretty(&schema())?,
        None if job.defaults => defaults(),
        None => page(),
    };
    context.ui.result(text.trim_end());
    Ok(())
}
