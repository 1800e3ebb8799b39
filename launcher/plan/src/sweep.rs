//! `sweep`: run directories for every combination of settings.
//!
//! In: a sweep file (see [`gradtx_run::config::read_sweep`]). Out: `OUT/NAME/run.toml` for each
//! run, resolved and checked, and `OUT/sweep.json`, which lists them. The stages then work
//! in these directories as in any other: `gradtx curate --run OUT/NAME`. A directory that is
//! there with the same settings stays as it is; one with other settings is refused.

use anyhow::Result;
use gradtx_run::config::{Config, RUN_FILE, SweptRun, read_sweep};
use gradtx_run::context::Context;
use gradtx_run::paths::{INDEX_FILE, SHADOW_DIR, TRANSLATOR_DIR};
use gradtx_run::record::{self, RECORD_FILE};
use gradtx_run::text::{counted, quoted};
use gradtx_runtime::artifact::{read_json, write_json};
use gradtx_runtime::metrics::JsonLines;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Which sweep, to where.
#[derive(Debug, clap::Args)]
pub struct Job {
    /// Sweep file (TOML) of `[[sweep]]` tables.
    pub file: PathBuf,
    /// Directory for the runs' directories.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Only report which runs there would be.
    #[arg(long, conflicts_with = "status")]
    pub list: bool,
    /// Only report how far each run is.
    #[arg(long)]
    pub status: bool,
}

/// Writes the runs' directories, or reports them.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    let runs = read_sweep(&job.file)?;
    if job.list {
        runs.iter().for_each(|run| context.ui.result(line_of(run)));
        return Ok(());
    }
    if job.status {
        let widest = runs.iter().map(|run| run.name.len()).max().unwrap_or(0);
        for run in &runs {
            let standing = standing(&job.out.join(&run.name), &run.config);
            context.ui.result(format!("{:widest$}  {standing}", run.name));
        }
        return Ok(());
    }
    // All are compared before the first is written.
    let new =
        runs.iter().map(|run| run.config.is_new_in(&job.out.join(&run.name))).collect::<Result<Vec<_>>>()?;
    for (run, new) in runs.iter().zip(&new) {
        if *new {
            run.config.store(&job.out.join(&run.name).join(RUN_FILE))?;
        }
    }
    write_json(&job.out.join(INDEX_FILE), &index(&job.file, &runs))?;
    let written = new.iter().filter(|new| **new).count();
    let (out, next) = (job.out.display(), quoted(&job.out.join("NAME").to_string_lossy()));
    context.ui.line(format!(
        "sweep: {} in {out}, {written} new; continue with gradtx curate --run {next}",
        counted(runs.len(), "run")
    ));
    Ok(())
}

/// A run's name and what it varies.
fn line_of(run: &SweptRun) -> String {
    let settings: Vec<String> = run.settings.iter().map(|(key, value)| format!("{key} = {value}")).collect();
    if settings.is_empty() { run.name.clone() } else { format!("{}  {}", run.name, settings.join(", ")) }
}

fn index(file: &Path, runs: &[SweptRun]) -> Value {
    let run = |run: &SweptRun| {
        let settings: serde_json::Map<String, Value> =
            run.settings.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        json!({ "name": run.name, "sweep": run.entry, "settings": settings })
    };
    json!({ "file": file.display().to_string(), "runs": runs.iter().map(run).collect::<Vec<_>>() })
}

/// How far a run is, in a line, from what is on disk.
fn standing(dir: &Path, config: &Config) -> String {
    if !dir.join(RUN_FILE).is_file() {
        return "not written".into();
    }
    match config.is_new_in(dir) {
        Ok(_) => {}
        Err(_) => return "has other settings than the sweep file now".into(),
    }
    let curated = match finished(&dir.join(SHADOW_DIR)) {
        None => return "not started".into(),
        Some(true) => "curate finished".to_string(),
        Some(false) => {
            let [tiny, llm] = shards(&dir.join(SHADOW_DIR).join("shards"));
            let all = config.curate.num_subsets;
            return format!("curate: {tiny} of {all} shards of tiny, {llm} of {all} of llm");
        }
    };
    let translator = dir.join(TRANSLATOR_DIR);
    match finished(&translator) {
        None => curated,
        Some(false) => {
            let lines = JsonLines::read(&translator.join("metrics.jsonl")).unwrap_or_default();
            let step = lines.last().and_then(|line| line["step"].as_u64()).unwrap_or(0);
            format!("{curated}, train: step {step} of {}", config.expected().train.max_steps)
        }
        Some(true) => {
            let validation = read_json(&translator.join("validation.json")).unwrap_or_default();
            let error = validation["best"]["relative_error"].as_f64().unwrap_or(f64::NAN);
            format!("{curated}, train finished: relative error {error:.4}")
        }
    }
}

/// Whether the stage of a directory is finished; `None` before it has started.
fn finished(dir: &Path) -> Option<bool> {
    let record = record::read(&dir.join(RECORD_FILE)).ok()?;
    Some(!record.outputs.is_empty())
}

/// Shards of the TinyLM and of the LLM.
fn shards(dir: &Path) -> [usize; 2] {
    let files: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    // Temporary files begin with a dot.
    let whole = |end: &str| files.iter().filter(|name| name.ends_with(end) && !name.starts_with('.')).count();
    [whole(".student.safetensors"), whole(".teacher.safetensors")]
}
