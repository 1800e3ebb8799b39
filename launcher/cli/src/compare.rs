//! `compare`: runs side by side.
//!
//! In: run directories, or directories of sweeps for all of their runs. Out: one table, on the
//! terminal and on request as CSV and as a page; see [`gradtx_report::comparison`].

use anyhow::Result;
use gradtx_plan::sweep::Index;
use gradtx_report::comparison::Comparison;
use gradtx_report::html::comparison_page;
use gradtx_run::config::RUN_FILE;
use gradtx_run::context::Context;
use gradtx_run::failure::{failed, unusable};
use gradtx_run::paths::INDEX_FILE;
use gradtx_runtime::artifact::write_atomic;
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};

/// What to compare, and where to write it.
#[derive(Clone, Debug, clap::Args)]
pub struct Job {
    /// Run directories, or directories of sweeps for all of their runs.
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<PathBuf>,
    /// Also write the table as CSV: a row for every run, metric and model.
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Also write a page.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// The files that are written.
#[derive(Clone, Debug, Default)]
pub struct Files {
    csv: Option<PathBuf>,
    html: Option<PathBuf>,
}

impl Files {
    /// Those in the directory of a sweep.
    pub(crate) fn of_sweep(dir: &Path) -> Self {
        Self { csv: Some(dir.join("comparison.csv")), html: Some(dir.join("comparison.html")) }
    }
}

/// Compares.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    if let (Some(csv), Some(html)) = (&job.csv, &job.html)
        && csv == html
    {
        return Err(unusable(format!("--csv and --html: both are {}", csv.display())));
    }
    let mut dirs = vec![];
    for dir in &job.runs {
        match is_sweep(dir) {
            true => dirs.extend(runs_of(dir)?),
            false => dirs.push(dir.clone()),
        }
    }
    write(context, &dirs, &Files { csv: job.csv.clone(), html: job.html.clone() })
}

fn is_sweep(dir: &Path) -> bool {
    dir.join(INDEX_FILE).is_file() && !dir.join(RUN_FILE).is_file()
}

/// The run directories of a sweep.
fn runs_of(sweep: &Path) -> Result<Vec<PathBuf>> {
    let index = Index::read(sweep)?;
    if index.runs.is_empty() {
        return Err(failed(
            format!("{}: a sweep without runs", sweep.display()),
            "see `gradtx sweep --list`",
        ));
    }
    Ok(index.runs.iter().map(|run| sweep.join(&run.name)).collect())
}

/// Compares these runs, prints the table and writes the files.
pub fn write(context: &Context, dirs: &[PathBuf], files: &Files) -> Result<()> {
    let found = Comparison::of(dirs)?;
    if let Some(path) = &files.csv {
        let text = found.csv()?;
        write_atomic(path, |out| out.write_all(text.as_bytes()))?;
    }
    if let Some(path) = &files.html {
        let page = comparison_page(&found)?;
        write_atomic(path, |out| out.write_all(page.as_bytes()))?;
    }
    if context.ui.is_json() {
        context
            .ui
            .result_object("compare", json!({ "comparison": found, "csv": files.csv, "html": files.html }));
    } else {
        context.ui.result(found.text());
    }
    for path in [&files.csv, &files.html].into_iter().flatten() {
        context.ui.line(format!("compare: {}", path.display()));
    }
    Ok(())
}
