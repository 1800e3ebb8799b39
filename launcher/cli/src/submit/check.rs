//! What is examined before anything is submitted: a job may wait for hours to find no data.
//!
//! In: the options as typed, and the settings. Out: an error for whatever the jobs would fail of:
//! a model, data or a client that is not there, a stage whose input is missing, GPUs that would
//! stay idle. Writes nothing.

use super::args::{Job, Stage};
use crate::slurm::options::{JobKind, Resolved};
use crate::slurm::words;
use anyhow::{Context as _, Result};
use gradtx_models::decoder::DecoderConfig;
use gradtx_pipeline::staleness::Run;
use gradtx_run::config::{Config, DeviceKind, RunSettings, is_reused};
use gradtx_run::failure::{failed, unusable, unusable_with};
use gradtx_run::paths::UPDATE_FILE;
use gradtx_run::role::Role;
use gradtx_train::model_spec::model_dir;
use std::path::Path;

/// Whether the program that the jobs run can use GPUs: this one, unless the environment or a
/// container has another.
pub(crate) fn computes_on_gpus(in_container: bool) -> bool {
    let other = std::env::var_os("GRADTX").is_some_and(|program| !program.is_empty());
    cfg!(feature = "cuda") || other || in_container
}

/// Checks the command line, the settings, models, data and clients; returns the settings, and the
/// clients' directories as absolute paths.
///
/// # Errors
/// At the first thing that the jobs would fail of.
pub fn check(job: &Job) -> Result<(Vec<String>, Config)> {
    job.cluster.check()?;
    let settings = RunSettings::open(&job.run)?;
    let config = settings.config().clone();
    if job.cluster.array.is_some() && !matches!(job.stage, Stage::Curate | Stage::Pipeline) {
        return Err(unusable("--array: only curation runs as an array"));
    }
    if !job.client.is_empty() && !matches!(job.stage, Stage::Evaluate | Stage::Pipeline) {
        return Err(unusable("--client: only for the stages evaluate and pipeline"));
    }
    let reuse = &config.reuse;
    for (stage, other, what, name) in [
        (Stage::Curate, &reuse.tuples, "tuples", "curate"),
        (Stage::Train, &reuse.translator, "translator", "train"),
    ] {
        if job.stage == stage && !other.as_os_str().is_empty() {
            return Err(is_reused(&job.run.run, other, what, name));
        }
    }
    // An emulator is made without the TinyLM.
    if job.stage != Stage::Emulate {
        check_model(&config, Role::Tiny)?;
    }
    check_model(&config, Role::Llm)?;
    if matches!(job.stage, Stage::Curate | Stage::Pipeline | Stage::Emulate) {
        check_data(&config)?;
    }
    check_inputs(job, &settings)?;
    check_results(job, &settings)?;
    let clients = job.client.iter().map(|dir| check_client(dir)).collect::<Result<_>>()?;
    Ok((clients, config))
}

/// Checks that no job would refuse its directory for a result of other settings, hours from now.
fn check_results(job: &Job, settings: &RunSettings) -> Result<()> {
    let run = Run { dir: settings.run(), config: settings.config() };
    let reuse = &settings.config().reuse;
    for (stage, dir, other) in [
        (Stage::Curate, settings.tuples_dir(), &reuse.tuples),
        (Stage::Train, settings.translator_dir(), &reuse.translator),
    ] {
        let is_made = [stage, Stage::Pipeline].contains(&job.stage) && other.as_os_str().is_empty();
        if is_made {
            run.expect_same(&dir)?;
        }
    }
    Ok(())
}

/// Checks that what the first job reads is there.
fn check_inputs(job: &Job, settings: &RunSettings) -> Result<()> {
    let missing = match job.stage {
        Stage::Train => Some((settings.tuples_dir().join("manifest.json"), "tuple store", "curate")),
        Stage::Evaluate if !job.client.is_empty() => {
            Some((settings.translator_dir().join("validation.json"), "trained translator", "train"))
        }
        _ => None,
    };
    // A job that waits for another one finds there what is not there yet.
    let waits = job.cluster.sbatch.iter().any(|option| option.value.starts_with("--dependency"));
    match missing.filter(|(file, ..)| !waits && !file.is_file()) {
        Some((file, what, stage)) => {
            let hint = format!(
                "submit the stage {stage} first, or the stage pipeline, or add --sbatch=--dependency=afterok:JOB"
            );
            Err(failed(format!("{}: there is no {what}", file.display()), hint))
        }
        None => Ok(()),
    }
}

/// Refuses GPUs that a job would leave idle, and a job that would find none.
///
/// # Errors
/// If GPUs are asked for that the settings or the program do not use, or the other way round.
pub(crate) fn check_gpus(kind: JobKind, asked: &Resolved, device: DeviceKind, can_use: bool) -> Result<()> {
    let gpus = asked.gpus();
    let further = asked.options.sbatch.iter().find(|word| words::asks_for_gpus(word));
    let found = match (further, &asked.options.gres) {
        (Some(word), _) => format!("--sbatch={word}"),
        (None, Some(gres)) => format!("gres {gres} ({})", asked.origin("gres")),
        (None, None) => format!("--gpus-per-node {} ({})", gpus.per_node, asked.origin("gpus_per_node")),
    };
    let (what, hint) = match (device, gpus.per_node > 0 || further.is_some()) {
        (DeviceKind::Auto | DeviceKind::Cuda, true) if !can_use => (
            format!("{found}: this program was built without CUDA and would leave the GPUs idle"),
            "build it with `--features cuda`, or submit with --gpus-per-node 0",
        ),
        (DeviceKind::Cpu, true) => (
            format!("{found}: device.kind is cpu, which would leave the GPUs idle"),
            "add --device auto, or submit with --gpus-per-node 0",
        ),
        (DeviceKind::Cuda, false) => (
            format!("device.kind is cuda, but the job {} asks for no GPUs ({found})", kind.name()),
            "submit with --gpus-per-node 1 or more, or add --device auto",
        ),
        _ => return Ok(()),
    };
    Err(unusable_with(what, Some(hint.into())))
}

fn check_model(config: &Config, role: Role) -> Result<()> {
    let (name, dir) = (role.name(), model_dir(config, role)?);
    DecoderConfig::read(dir).with_context(|| format!("models.{name}"))?;
    let entries = std::fs::read_dir(dir).with_context(|| format!("models.{name}: {}", dir.display()))?;
    let names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    let has = |found: &dyn Fn(&str) -> bool| names.iter().any(|name| name.to_str().is_some_and(found));
    for (found, what) in [
        (has(&|name| name == "tokenizer.json"), "tokenizer.json"),
        (has(&|name| name.ends_with(".safetensors")), "weights in safetensors files"),
    ] {
        if !found {
            return Err(unusable(format!("models.{name}: {}: expected {what}, found none", dir.display())));
        }
    }
    Ok(())
}

fn check_data(config: &Config) -> Result<()> {
    for path in config.data.public.as_slice() {
        let wrong = match path {
            path if path.as_os_str().is_empty() => "not set; expected a JSONL, JSON or Parquet file",
            path if !path.exists() => "there is no such file or directory",
            _ => continue,
        };
        return Err(unusable(format!("data.public: {}: {wrong}", path.display())));
    }
    Ok(())
}

fn check_client(dir: &Path) -> Result<String> {
    if ![UPDATE_FILE, "train.jsonl"].iter().any(|name| dir.join(name).is_file()) {
        let what = format!("--client {}: expected {UPDATE_FILE} or train.jsonl there", dir.display());
        return Err(unusable(what));
    }
    let dir = std::path::absolute(dir)?;
    Ok(words::check_argument("--client", &dir)?.to_string())
}
