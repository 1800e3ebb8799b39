//! [`ModelArgs`]: the model that a command looks at or talks to, one of a run's or a directory.
//!
//! In: `--run`, `--config`, `--model`, `--init`, `--set`. Out: a [`Model`] with the settings that
//! decide how it is asked. Nothing is written, into the run neither.

use anyhow::Result;
use gradtx_models::decoder::DecoderConfig;
use gradtx_models::lora::{LoraConfig, PeftAdapter, read_peft};
use gradtx_pipeline::artifacts::open_side;
use gradtx_pipeline::lineage::{Lineage, adapter_sums};
use gradtx_pipeline::package::{self, Package};
use gradtx_run::config::Config;
use gradtx_run::failure::{failed, unusable_with};
use gradtx_run::role::Role;
use gradtx_runtime::artifact::{TensorSource, UpdateFile, fingerprint, not_a_model};
use gradtx_runtime::text::shown;
use gradtx_train::model_spec::{ModelSpec, model_dir};
use std::path::{Path, PathBuf};

/// The model that a command looks at or talks to.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ModelArgs {
    /// Run directory whose models and settings are used; nothing is written there.
    #[arg(long, value_name = "DIR")]
    pub run: Option<PathBuf>,
    /// Run file (TOML) in the place of the run directory's settings.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// One of the run's models, `tiny` or `llm`; or a model directory in Hugging Face form, which
    /// needs no run.
    #[arg(long, visible_alias = "base", value_name = "tiny|llm|DIR")]
    pub model: Option<String>,
    /// Override one setting, e.g. `--set data.prompt=chatml`; repeatable.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// A model and how it is asked.
pub struct Model {
    /// The settings: those of the run, or the defaults.
    pub config: Config,
    /// Its directory.
    pub dir: PathBuf,
    /// Its sizes.
    pub decoder: DecoderConfig,
    /// Which of the run's models it is; none for a directory.
    pub role: Option<Role>,
    /// The run directory, where that is a package for clients.
    package: Option<(PathBuf, Package)>,
}

impl ModelArgs {
    /// Finds the model; `default` is the one of a run where none is named.
    ///
    /// # Errors
    /// When nothing says which model, and when its directory is no model that gradtx can read.
    pub fn resolve(&self, default: Role) -> Result<Model> {
        let has_run = self.run.is_some() || self.config.is_some();
        let mut config = match has_run {
            true => Config::look(self.run.as_deref(), self.config.as_deref(), None, &self.set)?,
            false => {
                let config = Config::default().with_overrides(&self.set)?;
                config.check()?;
                config
            }
        };
        let mut package = None;
        if let Some(run) = &self.run {
            let found;
            (config, found) = package::settings(run, config)?;
            package = found.map(|package| (run.clone(), package));
        }
        let named = self.model.as_deref();
        let (role, dir) = match named {
            Some(name) if !is_role(name) => (None, PathBuf::from(name)),
            Some(name) if !has_run && Path::new(name).is_dir() => (None, PathBuf::from(name)),
            _ if !has_run => {
                let what = match named {
                    Some(name) => format!("--model {name}: one of a run's models, but no run is named"),
                    None => "which model? neither a run nor a model directory is named".into(),
                };
                let hint = "give --run DIR (and --model tiny or llm), or --model DIR with a model directory";
                return Err(unusable_with(what, Some(hint.into())));
            }
            named => {
                let role = match named {
                    Some("tiny") => Role::Tiny,
                    Some(_) => Role::Llm,
                    None => default,
                };
                (Some(role), model_dir(&config, role)?.to_owned())
            }
        };
        if !dir.join("config.json").is_file() {
            let hint = match has_run {
                true => "--model takes tiny, llm, or a directory with config.json and model.safetensors",
                false => "--model takes a directory with config.json, model.safetensors and tokenizer.json",
            };
            return Err(unusable_with(format!("--model: {}", not_a_model(&dir)), Some(hint.into())));
        }
        let decoder = DecoderConfig::read(&dir)?;
        decoder.check_weights(&TensorSource::open(&dir)?)?;
        if role.is_none() {
            config.models.llm = dir.clone();
        }
        Ok(Model { config, dir, decoder, role, package })
    }
}

fn is_role(name: &str) -> bool {
    matches!(name, "tiny" | "llm")
}

impl Model {
    /// The model with the adapter that its updates are counted from: the one of `init`, a PEFT
    /// directory, or the one of the run.
    ///
    /// # Errors
    /// For a model directory without `init`: nothing says where its updates begin.
    pub fn spec(&self, init: Option<&Path>, threads: usize) -> Result<ModelSpec> {
        let mut config = self.config.clone();
        let role = self.role.unwrap_or(Role::Llm);
        match init {
            Some(dir) => {
                let start = read_peft(dir, &self.decoder)?;
                let LoraConfig { rank, alpha, dropout, targets, layers } = start.layout.lora().clone();
                config.lora.r = rank;
                config.lora.lora_alpha = alpha;
                config.lora.lora_dropout = dropout;
                config.lora.target_modules = targets.into();
                config.lora.layers_to_transform = layers;
                match role {
                    Role::Tiny => config.lora.init_adapter_tiny = dir.to_owned(),
                    Role::Llm => config.lora.init_adapter_llm = dir.to_owned(),
                }
            }
            None if self.role.is_none() => {
                let what = "an update vector is the difference to the adapter that training started from, and \
                            nothing says which that is";
                let hint =
                    "give --run with --model tiny or llm, or --init with the PEFT directory of that adapter";
                return Err(unusable_with(what, Some(hint.into())));
            }
            None => {}
        }
        match (&self.package, self.role) {
            (Some((run, package)), Some(Role::Tiny)) => package.open_tiny(run, &config, threads),
            _ => open_side(&config, role, threads),
        }
    }

    /// An adapter of this model from a PEFT directory. Where a stage of gradtx wrote it, it must be
    /// what the stage wrote, and of this model.
    pub fn adapter(&self, dir: &Path, threads: usize) -> Result<PeftAdapter> {
        let adapter = read_peft(dir, &self.decoder)?;
        let sums = adapter_sums(dir)?;
        Lineage::of_adapter(dir, &sums, &fingerprint(&self.dir, threads)?)?;
        Ok(adapter)
    }
}

/// The model with adapters of the kind that an update is of: those of the run, or those of
/// translation by products, which have another rank and start from nothing.
///
/// # Errors
/// When the update is of another model, seed or adapter.
pub(crate) fn spec_of_update(spec: ModelSpec, file: &UpdateFile, path: &Path) -> Result<ModelSpec> {
    let space = &file.meta().space;
    if spec.space == *space {
        return Ok(spec);
    }
    if space.rank != spec.space.rank
        && let Ok(other) = spec.of_rank(space.rank)
        && other.space == *space
    {
        return Ok(other);
    }
    let hint = if spec.space.base_model != space.base_model {
        "it is an update of another base model: name that with --run and --model, or --model DIR"
    } else if spec.space.layout != space.layout {
        "it is of other adapter settings: use the run that it was made in"
    } else {
        "it was counted from another initial adapter: use the run that it was made in, or --init"
    };
    match spec.space.expect_same(space, &shown(path)) {
        Err(different) => Err(failed(different.to_string(), hint)),
        Ok(()) => Ok(spec),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_must_be_named() {
        let message = |args: ModelArgs| format!("{:#}", args.resolve(Role::Tiny).err().expect("an error"));
        assert!(message(ModelArgs::default()).contains("which model?"));
        let named = |name: &str| ModelArgs { model: Some(name.into()), ..ModelArgs::default() };
        assert!(message(named("llm")).contains("no run is named"));
        assert!(message(named("/nowhere/at-all")).contains("/nowhere/at-all"));
    }
}
