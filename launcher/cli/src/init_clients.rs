//! `init-clients`: the package that clients start from.
//!
//! In: a run. Out: a [`Package`], compared with the run's tuples where it has some.

use anyhow::Result;
use gradtx_pipeline::artifacts::{expect_run_model, expect_tiny, open_side, open_tuples};
use gradtx_pipeline::package::Package;
use gradtx_run::config::{RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::role::Role;
use gradtx_runtime::artifact::MANIFEST;
use gradtx_runtime::text::shown;
use serde_json::json;
use std::path::PathBuf;

/// Write what clients start from: the TinyLM's initial adapter, fingerprints and settings.
#[derive(Debug, clap::Args)]
pub struct Job {
    /// Run directory of the provider; nothing is written there.
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Directory of the package; it must not be there yet.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Writes it.
pub(crate) fn run(context: &Context, job: &Job) -> Result<()> {
    let mut settings = RunSettings::open(&RunArgs::stored(&job.run))?;
    let config = settings.config().clone();
    let side = open_side(&config, Role::Tiny, context.threads)?;
    expect_tiny(&side)?;
    expect_run_model(&settings, Role::Tiny, &side.space.base_model)?;
    if settings.tuples_dir().join(MANIFEST).is_file() {
        open_tuples(&mut settings, [Some(&side.space), None])?;
    } else {
        let what = "init-clients: warning: this run has no tuples yet: whether they will be of this model is not compared";
        context.ui.notice(what);
    }
    let package = Package::write(&config, &side, &job.out)?;
    context.ui.line(format!(
        "init-clients: a package for clients that fine-tune {}, {}",
        package.model,
        shown(&job.out)
    ));
    context.ui.result_object(
        "init-clients",
        json!({ "model": package.model, "fingerprint": package.space.base_model, "out": shown(&job.out) }),
    );
    Ok(())
}
