//! [`Package`]: what a client starts from, and nothing else.
//!
//! ```text
//! package.json   the TinyLM's fingerprint, what updates must have in common, checksums
//! run.toml       the settings that fine-tuning depends on: prompts, limits, adapter, recommended recipe
//! initial/       the adapter that training starts from, in PEFT form
//! README.md      the commands
//! ```
//!
//! In: a run of the provider. Out: a run directory that `gradtx finetune --run` takes, without tuples, LLM
//! or public data. What is fine-tuned there is the same to the bit as in the provider's run.

use anyhow::Result;
use gradtx_models::lora::write_peft;
use gradtx_run::config::{Config, RUN_FILE};
use gradtx_run::failure::{failed, unusable_with};
use gradtx_run::record::make_dir;
use gradtx_runtime::artifact::{
    UpdateSpace, checksum_file, public_name, read_versioned, write_atomic, write_versioned,
};
use gradtx_runtime::text::shown;
use gradtx_train::model_spec::ModelSpec;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The file that makes a directory a package.
pub const PACKAGE_FILE: &str = "package.json";
/// The adapter that training starts from.
pub const INITIAL_DIR: &str = "initial";
const README: &str = "README.md";
const FORMAT: &str = "gradtx.package";
const VERSION: u64 = 1;

/// What a client needs to make an update that the provider can translate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Package {
    /// Version of gradtx that wrote it.
    pub gradtx: String,
    /// Public name of the TinyLM.
    pub model: String,
    /// What updates must have in common.
    pub space: UpdateSpace,
    /// Checksums of the other files, but for run.toml, which keeps what the client sets.
    pub files: BTreeMap<String, String>,
}

impl Package {
    /// Writes the package of a run's TinyLM to a new directory.
    ///
    /// # Errors
    /// When something is there already.
    pub fn write(config: &Config, side: &ModelSpec, out: &Path) -> Result<Self> {
        if out.symlink_metadata().is_ok() {
            let what = format!("--out {}: is there already, and is not overwritten", shown(out));
            return Err(unusable_with(what, Some("name another directory, or remove it first".into())));
        }
        let initial = out.join(INITIAL_DIR);
        make_dir(&initial)?;
        let model = public_name(&side.dir);
        write_peft(&initial, &side.layout, &side.init, &model)?;
        let write =
            |name: &str, text: String| write_atomic(&out.join(name), |file| file.write_all(text.as_bytes()));
        write(README, readme(&model, &side.space))?;
        write(RUN_FILE, config.client_run_file(INITIAL_DIR))?;
        let mut files = BTreeMap::new();
        for name in
            ["adapter_config.json", "adapter_model.safetensors"].map(|name| format!("{INITIAL_DIR}/{name}"))
        {
            files.insert(name.clone(), checksum_file(&out.join(name))?);
        }
        files.insert(README.into(), checksum_file(&out.join(README))?);
        let space = side.space.clone();
        let package = Self { gradtx: env!("CARGO_PKG_VERSION").into(), model, space, files };
        // The last, so that what has it is whole.
        write_versioned(&out.join(PACKAGE_FILE), FORMAT, VERSION, &package)?;
        Ok(package)
    }

    /// The package that a run directory is; none where it is none.
    pub fn of_run(run: &Path) -> Result<Option<Self>> {
        let path = run.join(PACKAGE_FILE);
        match path.symlink_metadata().is_ok() {
            true => Ok(Some(read_versioned(&path, FORMAT, VERSION)?)),
            false => Ok(None),
        }
    }

    /// What is wrong with its files, a line each.
    pub fn problems(&self, run: &Path) -> Vec<String> {
        let changed = |(name, sum): (&String, &String)| {
            let path = run.join(name);
            match checksum_file(&path) {
                Err(error) => Some(error.to_string()),
                Ok(found) if found != *sum => {
                    Some(format!("{}: checksum is {found}, the package's is {sum}", shown(&path)))
                }
                Ok(_) => None,
            }
        };
        self.files.iter().filter_map(changed).collect()
    }

    /// Fails unless a model with its initial adapter is the one that updates must be of.
    pub fn expect(&self, run: &Path, side: &ModelSpec) -> Result<()> {
        let hint = match self.space.base_model == side.space.base_model {
            true => "take the provider's package as it is; its files are not to be edited".into(),
            false => format!("give the TinyLM, {}: --set models.tiny=DIR", self.model),
        };
        let what = format!("{}: for the package {}", shown(&side.dir), shown(run));
        self.space.expect_same(&side.space, &what).map_err(|error| failed(error.to_string(), hint))
    }
}

/// The settings of a run directory. In a package, wherever it lies, training starts from its own
/// adapter.
///
/// # Errors
/// In a package that is damaged, or without the TinyLM's directory.
pub fn settings(run: &Path, mut config: Config) -> Result<(Config, Option<Package>)> {
    let package = Package::of_run(run)?;
    if let Some(package) = &package {
        if let Some(problem) = package.problems(run).into_iter().next() {
            return Err(failed(problem, "copy the package again from where the provider wrote it"));
        }
        if config.models.tiny.as_os_str().is_empty() {
            let what = format!(
                "{}: a package for clients, and models.tiny is not set: expected the directory of {} (fingerprint {})",
                shown(run),
                package.model,
                package.space.base_model
            );
            return Err(unusable_with(what, Some("give --set models.tiny=DIR; it is kept".into())));
        }
        config.lora.init_adapter_tiny = initial_dir(run)?;
    }
    Ok((config, package))
}

fn initial_dir(run: &Path) -> Result<PathBuf> {
    Ok(std::path::absolute(run)?.join(INITIAL_DIR))
}

fn readme(model: &str, space: &UpdateSpace) -> String {
    let UpdateSpace { base_model, rank, alpha, targets, .. } = space;
    let targets = targets.join(", ");
    format!(
        "# A package for clients\n\n\
         Fine-tune `{model}` on your own data and send the provider one file, the change of a LoRA adapter. No\n\
         example leaves your machine. Run this in the directory that holds this package:\n\n    \
         gradtx finetune --run PACKAGE --set models.tiny=DIR --data FILE\n    \
         gradtx inspect PACKAGE/clients/NAME/finetuned/tiny/update.safetensors\n\n\
         `DIR` is the directory of `{model}`; its fingerprint must be\n`{base_model}`.\n\
         `run.toml` has the settings: those of `[data]`, `[lora]` and the seed must stay as they are; those of\n\
         `[finetune.tiny]` are recommended.\n\n\
         With PEFT: continue from the adapter in `initial/` (rank {rank}, alpha {alpha}, {targets}), save it, and\n\n    \
         gradtx convert --run PACKAGE --set models.tiny=DIR --adapter TRAINED --examples N --out update.safetensors\n"
    )
}
