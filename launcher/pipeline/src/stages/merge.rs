//! `merge`: an adapter, or full weights of layers, put into the weights of its model.
//!
//! In: one of the run's base models, and a PEFT adapter directory or `layers.safetensors`. Out: a directory in the
//! Hugging Face layout with the same files, which needs no adapter any more: weights,
//! configuration, tokenizer, chat template, licences, and a model card. Shapes decide whether an adapter fits; the
//! name of a base model that it carries is only a hint.

use crate::artifacts::expect_run_model;
use crate::card;
use crate::lineage::Lineage;
use crate::records::MergeInputs;
use crate::trained::{self, Trained};
use anyhow::Result;
use gradtx_models::decoder::DecoderConfig;
use gradtx_run::config::{Config, RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::failure::unusable;
use gradtx_run::role::Role;
use gradtx_run::stage::{self, Stage};
use gradtx_runtime::artifact::{fingerprint, public_name, read_json, write_json};
use gradtx_train::model_spec::model_dir;
use gradtx_train::prompts::Prompts;
use serde_json::json;
use std::path::{Path, PathBuf};

/// What to merge, to where.
pub struct Job {
    /// PEFT adapter directory, or file of full weights of layers.
    pub adapter: PathBuf,
    /// Directory of the merged model.
    pub out: PathBuf,
    /// Which model.
    pub role: Role,
}

/// Merges, unless that is done.
pub fn run(context: &Context, args: &RunArgs, job: &Job) -> Result<()> {
    let settings = RunSettings::open(args)?;
    stage::run(context, &Merge::open(context, &settings, job)?).map(drop)
}

/// A merge that is ready to begin.
pub struct Merge<'a> {
    job: &'a Job,
    settings: &'a RunSettings,
    base: &'a Path,
    /// Fingerprint of the base model.
    model: String,
    trained: Trained,
    /// Checksums of its files.
    sums: Vec<String>,
    lineage: Lineage,
    stops: Option<Vec<u32>>,
}

impl<'a> Merge<'a> {
    /// Opens what a job needs.
    pub fn open(context: &Context, settings: &'a RunSettings, job: &'a Job) -> Result<Self> {
        let config = settings.config();
        let base = model_dir(config, job.role)?;
        if is_same_directory(base, &job.out) {
            let why = "--out: this is the base model's own directory; write to another one";
            return Err(unusable(format!("{}: {why}", job.out.display())));
        }
        let trained = Trained::open(&job.adapter, &DecoderConfig::read(base)?, base)?;
        let sums = trained::sums(&job.adapter)?;
        let stops = added_stops(context, config, base)?;
        let model = fingerprint(base, context.threads)?;
        expect_run_model(settings, job.role, &model)?;
        let lineage = Lineage::of_adapter(&job.adapter, &sums, &model)?.on(Lineage::of_model(base)?.1);
        trained.expect_base(&job.adapter, &model)?;
        Ok(Self { job, settings, base, model, trained, sums, lineage, stops })
    }
}

impl Stage for Merge<'_> {
    type Inputs = MergeInputs;
    type Output = ();

    fn dir(&self) -> &Path {
        &self.job.out
    }

    fn settings(&self) -> Option<&RunSettings> {
        Some(self.settings)
    }

    fn inputs(&self) -> Result<MergeInputs> {
        Ok(MergeInputs {
            role: self.job.role,
            model: self.model.clone(),
            lineage: self.lineage,
            adapter: self.sums.clone(),
            stops: self.stops.clone(),
        })
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, ())> {
        let Self { job, base, trained, lineage, stops, .. } = self;
        let last = |name: &str| Path::new(name).file_name().map(|name| name.to_owned());
        if let Trained::Adapter(adapter) = trained
            && let Some(made_for) = adapter.base_model.as_deref()
            && ![last(&public_name(base)).as_deref(), base.file_name()].contains(&last(made_for).as_deref())
        {
            context.ui.line(format!(
                "merge: the adapter names {made_for} as its base model; its shapes fit {}",
                base.display()
            ));
        }
        let mut files = trained.put_into(base, &job.out, context.threads)?;
        if let Some(stops) = stops
            && write_stops(&job.out, stops)?
        {
            files.push(GENERATION_CONFIG.into());
        }
        files.push(card::write(base, trained.change(), lineage, &job.out)?);
        Ok((files, ()))
    }

    fn report(&self, context: &Context, (): &()) -> Result<()> {
        let out = self.job.out.display();
        context.ui.line(match &self.trained {
            Trained::Adapter(adapter) => {
                let blocks = adapter.layout.blocks();
                let matrices = blocks * adapter.layout.lora().targets.len();
                format!("merge: {matrices} matrices of {blocks} blocks, {out}")
            }
            Trained::Layers(file) => format!("merge: full weights of layers {:?}, {out}", file.layers()),
        });
        Ok(())
    }

    fn was_finished(&self, context: &Context) -> Result<()> {
        context.ui.line(format!("merge: {} is finished", self.job.out.display()));
        Ok(())
    }
}

/// The file that says where generation stops.
const GENERATION_CONFIG: &str = "generation_config.json";

/// Where the prompt form ends answers with a token that the model's own files do not name:
/// all ids at which generation has to stop.
fn added_stops(context: &Context, config: &Config, base: &Path) -> Result<Option<Vec<u32>>> {
    if !base.join("tokenizer.json").exists() {
        return Ok(None);
    }
    let prompts = match Prompts::new(&config.data, base, &DecoderConfig::read(base)?, None) {
        Ok(prompts) => prompts,
        // The weights can be merged all the same.
        Err(error) => {
            context.ui.notice(&format!("merge: warning: {error:#}"));
            return Ok(None);
        }
    };
    if !prompts.check.adds_stop() {
        return Ok(None);
    }
    context.ui.line(format!("merge: {}; {GENERATION_CONFIG} names it", prompts.check.line()));
    Ok(Some(prompts.check.stops().to_vec()))
}

/// Puts the ids into generation_config.json; true if there was no such file.
fn write_stops(out: &Path, stops: &[u32]) -> Result<bool> {
    let path = out.join(GENERATION_CONFIG);
    let is_new = !path.exists();
    let mut entries = if is_new { json!({}) } else { read_json(&path)? };
    entries["eos_token_id"] = json!(stops);
    write_json(&path, &entries)?;
    Ok(is_new)
}

fn is_same_directory(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}
