//! `convert`: from an adapter in PEFT form to an update vector, and back.
//!
//! An update vector is the difference of a trained adapter to the one that training started from.
//! So both directions need the starting adapter: the one of a run, which its seed decides, or a PEFT
//! directory.

use crate::model_args::{Model, ModelArgs, spec_of_update};
use anyhow::Result;
use gradtx_models::lora::{BlockLayout, write_peft};
use gradtx_pipeline::card::{Made, write_for_adapter};
use gradtx_run::context::Context;
use gradtx_run::failure::unusable_with;
use gradtx_run::record::make_dir;
use gradtx_run::role::Role;
use gradtx_run::text::counted;
use gradtx_runtime::artifact::{Privacy, UpdateFile, public_name};
use gradtx_runtime::text::shown;
use gradtx_train::model_spec::ModelSpec;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Turn a PEFT adapter into an update vector, or an update vector into a PEFT adapter.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true))]
pub struct Job {
    /// The model that they are of.
    #[command(flatten)]
    pub model: ModelArgs,
    /// PEFT directory of the adapter that training started from (default: the run's).
    #[arg(long, value_name = "DIR")]
    pub init: Option<PathBuf>,
    /// PEFT adapter directory to turn into an update vector.
    #[arg(long, value_name = "DIR", group = "what", requires = "examples")]
    pub adapter: Option<PathBuf>,
    /// Update vector file to turn into a PEFT adapter directory.
    #[arg(long, value_name = "FILE", group = "what")]
    pub update: Option<PathBuf>,
    /// Write the adapter that the run's training starts from, for a client that trains with another program.
    #[arg(long, group = "what")]
    pub initial: bool,
    /// Examples that the adapter was trained on, as the update vector states them.
    #[arg(long, value_name = "N", requires = "adapter")]
    pub examples: Option<u64>,
    /// File of the update vector, or directory of the adapter.
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
}

/// Converts.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    if job.out.exists() {
        let what = format!("--out {}: is there already, and is not overwritten", shown(&job.out));
        return Err(unusable_with(what, Some("name another path, or remove it first".into())));
    }
    let model = job.model.resolve(Role::Tiny)?;
    let spec = model.spec(job.init.as_deref(), context.threads)?;
    let (text, numbers) = match (&job.adapter, &job.update) {
        (Some(adapter), _) => to_update(context, job, &model, &spec, adapter)?,
        (None, Some(update)) => to_adapter(&model, spec, update, &job.out)?,
        (None, None) => {
            let made = Made {
                how: "is where training starts from: it does nothing yet".into(),
                settings: vec![],
                privacy: Privacy::None,
            };
            write_adapter(&model, &spec, &spec.init, made, &job.out)?
        }
    };
    if !context.ui.is_json() {
        context.ui.line(format!("convert: {text}, {}", shown(&job.out)));
    }
    context.ui.result_object("convert", numbers);
    Ok(())
}

fn to_update(
    context: &Context,
    job: &Job,
    model: &Model,
    spec: &ModelSpec,
    dir: &Path,
) -> Result<(String, serde_json::Value)> {
    let adapter = model.adapter(dir, context.threads)?;
    let values = spec.update_of_peft(dir, &adapter)?;
    let update = spec.update(values, job.examples.unwrap_or_default());
    if let Some(above) = job.out.parent().filter(|above| !above.as_os_str().is_empty()) {
        make_dir(above)?;
    }
    update.write(&job.out)?;
    let norm = update.values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let text = format!("an update vector of {}, norm {norm:.4e}", counted(spec.space.blocks, "block"));
    Ok((text, json!({ "kind": "update", "blocks": spec.space.blocks, "norm": norm, "out": shown(&job.out) })))
}

fn to_adapter(
    model: &Model,
    spec: ModelSpec,
    path: &Path,
    out: &Path,
) -> Result<(String, serde_json::Value)> {
    let file = UpdateFile::open(path)?;
    let spec = spec_of_update(spec, &file, path)?;
    let update = file.read()?;
    let values = spec.adapter_of(&update.values);
    let examples = ("examples", update.meta.examples.to_string());
    let how = "was made of an update vector".into();
    let made = Made { how, settings: vec![examples], privacy: update.meta.privacy };
    write_adapter(model, &spec, &values, made, out)
}

fn write_adapter(
    model: &Model,
    spec: &ModelSpec,
    values: &[f32],
    made: Made,
    out: &Path,
) -> Result<(String, serde_json::Value)> {
    make_dir(out)?;
    write_peft(out, &spec.layout, values, &public_name(&model.dir))?;
    write_for_adapter(&model.dir, &spec.layout, &made, out)?;
    let text = format!("a PEFT adapter of {}", described(&spec.layout));
    Ok((
        text,
        json!({ "kind": "adapter", "rank": spec.space.rank, "blocks": spec.space.blocks, "out": shown(out) }),
    ))
}

fn described(layout: &BlockLayout) -> String {
    let (lora, targets) = (layout.lora(), layout.target_names().join(", "));
    format!("rank {}, alpha {}, {targets}", lora.rank, lora.alpha)
}
