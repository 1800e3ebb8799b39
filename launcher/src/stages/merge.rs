//! `merge`: an adapter put into the weights of its model.
//!
//! In: one of the run's base models and a PEFT adapter directory. Out: a directory in the
//! Hugging Face layout with the same files, which needs no adapter any more: weights,
//! configuration, tokenizer, chat template. Shapes decide whether an adapter fits; the
//! name of a base model that it carries is only a hint.

use crate::args::{Role, RunArgs};
use crate::artifacts::expect_run_model;
use crate::config::Config;
use crate::failure::unusable;
use crate::record::{self, State};
use crate::stages::Context;
use crate::stages::lineage::{Lineage, adapter_sums};
use crate::stages::side::model_dir;
use anyhow::Result;
use gradtx_models::decoder::DecoderConfig;
use gradtx_models::lora::{merge, read_peft};
use gradtx_runtime::artifact::fingerprint;
use serde_json::json;
use std::path::{Path, PathBuf};

/// What to merge, to where.
pub struct Job {
    /// PEFT adapter directory.
    pub adapter: PathBuf,
    /// Directory of the merged model.
    pub out: PathBuf,
    /// Which model.
    pub role: Role,
}

/// Merges, unless that is done.
pub fn run(context: &Context, args: &RunArgs, job: &Job) -> Result<()> {
    let config = Config::of_run(args)?;
    let base = model_dir(&config, job.role)?;
    if is_same_directory(base, &job.out) {
        let why = "--out: this is the base model's own directory; write to another one";
        return Err(unusable(format!("{}: {why}", job.out.display())));
    }
    let adapter = read_peft(&job.adapter, &DecoderConfig::read(base)?)?;
    let sums = adapter_sums(&job.adapter)?;
    let model = fingerprint(base, context.threads)?;
    expect_run_model(&args.run, job.role, &model)?;
    let settings = json!({
        "role": job.role,
        "lineage": Lineage::of_adapter(&job.adapter, &sums, &model)?,
        "model": model,
        "adapter": sums,
    });
    let State::Open(output) = record::open(&job.out, "merge", settings)? else {
        context.ui.line(format!("merge: {} is finished", job.out.display()));
        return Ok(());
    };
    let made_for = adapter.base_model.as_deref().map(Path::new).and_then(Path::file_name);
    if made_for.is_some_and(|name| base.file_name() != Some(name)) {
        context.ui.line(format!(
            "merge: the adapter names {} as its base model; its shapes fit {}",
            adapter.base_model.as_deref().unwrap_or_default(),
            base.display()
        ));
    }
    let files = merge(base, &adapter, &job.out, context.threads)?;
    output.finish(&files)?;
    let blocks = adapter.layout.blocks();
    let matrices = blocks * adapter.layout.lora().targets.len();
    context.ui.line(format!("merge: {matrices} matrices of {blocks} blocks, {}", job.out.display()));
    Ok(())
}

fn is_same_directory(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}
