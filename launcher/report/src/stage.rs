//! `report`: one page about a run.
//!
//! In: a run directory, finished or not, and directories of evaluations. Out:
//! `report.html`, which needs nothing else to be read, and `report.json` beside it, with
//! the same content; see [`crate`].

use crate::predictions::Predictions;
use crate::source::Source;
use crate::{Report, csv, html};
use anyhow::Result;
use gradtx_run::config::RUN_FILE;
use gradtx_run::config::run_dir::no_run;
use gradtx_run::context::Context;
use gradtx_run::failure::unusable;
use gradtx_runtime::artifact::{sweep_temporary, write_atomic, write_json};
use serde_json::json;
use std::io::Write;
use std::num::NonZeroUsize;
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
    /// Directory for CSV files.
    pub csv: Option<PathBuf>,
    /// Examples of each file of test data on the page of predictions, if there is to be one.
    pub predictions: Option<NonZeroUsize>,
}

impl Job {
    /// The report of a run, in its directory.
    pub fn of(run: PathBuf) -> Self {
        Self { run, evaluations: vec![], out: None, csv: None, predictions: None }
    }
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
    if let Some(dir) = &job.csv {
        csv::write(dir, &report)?;
    }
    let predictions = job.predictions.map(|most| write_predictions(job, &page, most)).transpose()?;
    for scores in &report.scores {
        context.ui.result(scores.table.text());
        context.ui.result(scores.text());
        for warning in scores.offsite.iter().flat_map(|offsite| &offsite.warnings) {
            context.ui.notice(&format!("report: warning: {warning}"));
        }
    }
    for missing in &report.missing {
        context.ui.line(format!("report: {missing}"));
    }
    for note in &report.notes {
        context.ui.line(format!("report: not used: {note}"));
    }
    let mut told = json!({ "page": page, "data": data, "missing": report.missing });
    if let Some(predictions) = predictions {
        told["predictions"] = json!(predictions);
        context.ui.notice(&format!(
            "report: {} holds private texts: prompts, references and predictions. Keep it where the data may be.",
            predictions.display()
        ));
    }
    context.ui.done("report", &job.run, told, format!("report: {}", page.display()));
    Ok(())
}

/// Writes the page of predictions beside the report; returns where.
fn write_predictions(job: &Job, page: &Path, most: NonZeroUsize) -> Result<PathBuf> {
    let evaluations: Vec<&Path> = job.evaluations.iter().map(PathBuf::as_path).collect();
    let mut source = Source::open(&job.run, &evaluations)?;
    let text = html::predictions_page(&Predictions::of(&mut source, most.get()))?;
    let stem = page.file_stem().unwrap_or_default().to_string_lossy();
    let path = page.with_file_name(format!("{stem}-predictions.html"));
    write_atomic(&path, |out| out.write_all(text.as_bytes()))?;
    Ok(path)
}
