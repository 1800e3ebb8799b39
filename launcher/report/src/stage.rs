//! `report`: one page about a run.
//!
//! In: a run directory, finished or not, and directories of evaluations. Out:
//! `report.html`, which needs nothing else to be read, and `report.json` beside it, with
//! the same content; see [`crate`].

use crate::{Report, html};
use anyhow::Result;
use gradtx_run::config::RUN_FILE;
use gradtx_run::config::run_dir::no_run;
use gradtx_run::context::Context;
use gradtx_run::failure::unusable;
use gradtx_runtime::artifact::{sweep_temporary, write_atomic, write_json};
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};

/// File name of the page in the run directory.
const PAGE: &str = "report.html";

/// Of what, to where.
pub struct Job {
    /// Run directory.
    pub run: PathBuf,
    /// More directories with results of `evaluate` and `finetune`.
    pub evaluations: Vec<PathBuf>,
    /// The page; by default in the run directory.
    pub out: Option<PathBuf>,
}

/// Writes the page and the JSON file.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    let page = job.out.clone().unwrap_or_else(|| job.run.join(PAGE));
    let data = page.with_extension("json");
    if data == page {
        return Err(unusable(format!("--out {}: expected a name that ends in .html", page.display())));
    }
    if !job.run.join(RUN_FILE).is_file() {
        return Err(no_run(&job.run));
    }
    let evaluations: Vec<&Path> = job.evaluations.iter().map(PathBuf::as_path).collect();
    let report = Report::of(&job.run, &evaluations)?;
    // What a killed report left half written; who may not remove it may still write beside it.
    let _ =
        sweep_temporary(data.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new(".")));
    let text = html::page(&report)?;
    write_json(&data, &report)?;
    write_atomic(&page, |out| out.write_all(text.as_bytes()))?;
    for scores in &report.scores {
        context.ui.result(scores.table.text());
        context.ui.result(&scores.headline.text);
    }
    for missing in &report.missing {
        context.ui.line(format!("report: {missing}"));
    }
    for note in &report.notes {
        context.ui.line(format!("report: not used: {note}"));
    }
    let told = json!({ "page": page, "data": data, "missing": report.missing });
    context.ui.done("report", &job.run, told, format!("report: {}", page.display()));
    Ok(())
}
