//! Results that were made with other settings than the run has now.
//!
//! In: the record of a stage's directory, and the settings of its run. Out: what is different, a
//! line each. Only settings are compared, and results of the run's own stages: no model and no data
//! is read. Such a result stays as it is; its stage refuses to write over it, and the stages
//! after it may use it, which they say.

use crate::products::{self, Translation};
use crate::records::{
    CoordinateInputs, CurateInputs, EvaluateInputs, FinetuneInputs, RefineInputs, TrainInputs,
    TranslateInputs,
};
use anyhow::Result;
use gradtx_run::config::{Config, DeviceConfig, ReuseConfig, TranslatorConfig};
use gradtx_run::failure::refused;
use gradtx_run::record::{self, OTHER_SETTINGS, RECORD_FILE, Record};
use gradtx_run::stage::Inputs;
use gradtx_runtime::artifact::MANIFEST;
use gradtx_runtime::text::shown;
use gradtx_train::model_spec::{AdapterInputs, ModelSpec};
use std::path::{Path, PathBuf};

/// A run and its settings.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// Its directory.
    pub dir: &'a Path,
    /// The settings.
    pub config: &'a Config,
}

impl Run<'_> {
    /// How the settings differ from those that a result was made with, as lines `- key = then` and
    /// `+ key = now`; empty where they do not.
    ///
    /// # Errors
    /// When the record does not say what this version of gradtx writes.
    pub fn changes(&self, dir: &Path, made: &Record) -> Result<String> {
        let now = if let Some(made) = made.inputs(dir)? {
            self.curate(made).value()?
        } else if let Some(made) = made.inputs(dir)? {
            self.train(made).value()?
        } else if let Some(made) = made.inputs(dir)? {
            self.finetune(made).value()?
        } else if let Some(made) = made.inputs(dir)? {
            self.translate(made).value()?
        } else if let Some(made) = made.inputs(dir)? {
            self.refine(made).value()?
        } else if let Some(made) = made.inputs(dir)? {
            self.evaluate(made).value()?
        } else {
            return Ok(String::new());
        };
        // As it reads back from its file: numbers may lose their last digit on the way.
        Ok(record::diff(&made.settings, &serde_json::from_str(&now.to_string())?))
    }

    /// Fails where a stage would refuse its directory, which has a result of other settings.
    ///
    /// # Errors
    /// The one of the stage, as far as settings alone tell.
    pub fn expect_same(&self, dir: &Path) -> Result<()> {
        let path = dir.join(RECORD_FILE);
        if !path.is_file() {
            return Ok(());
        }
        let changes = self.changes(dir, &record::read(&path)?)?;
        if changes.is_empty() {
            return Ok(());
        }
        let what = format!("{}: holds a result of other settings or inputs", shown(dir));
        Err(refused(what, changes, OTHER_SETTINGS))
    }

    /// How the settings differ from those of the tuples that the run uses; empty where there are none.
    pub(crate) fn changes_of_tuples(&self) -> Result<String> {
        let dir = self.config.reuse.tuples_dir(self.dir);
        match record::read(&dir.join(RECORD_FILE)) {
            Ok(made) => self.changes(&dir, &made),
            Err(_) => Ok(String::new()),
        }
    }

    fn curate(&self, made: CurateInputs) -> CurateInputs {
        let config = self.config;
        let mut curate = config.curate.resolved();
        if curate.jobs_per_batch == 0 {
            curate.jobs_per_batch = made.curate.jobs_per_batch;
        }
        CurateInputs {
            seed: config.seed,
            data: made.data.with(&config.data),
            max_length: config.data.max_length,
            adapter: adapter(made.adapter, config),
            curate,
            device: device(made.device, config),
            reading: config.data.reading_inputs(),
            ..made
        }
    }

    fn train(&self, made: TrainInputs) -> TrainInputs {
        let config = self.config;
        TrainInputs {
            seed: config.seed,
            tuples: self.sum_of(&ReuseConfig::tuples_dir, MANIFEST).unwrap_or(made.tuples),
            translator: TranslatorConfig { pretrained_path: PathBuf::new(), ..config.translator.clone() },
            train: config.train.with_steps_of(&made.train),
            coordinates: made.coordinates.map(|made| CoordinateInputs {
                penalty: made.penalty.map(|_| products::choice(config)),
                ..made
            }),
            device: device(made.device, config),
            ..made
        }
    }

    fn finetune(&self, made: FinetuneInputs) -> FinetuneInputs {
        let config = self.config;
        let recipes = [&config.finetune.tiny, &config.finetune.llm];
        let recipes = recipes.map(|recipe| recipe.with_steps_of(&made.recipe));
        let curated = record::read(&config.reuse.tuples_dir(self.dir).join(RECORD_FILE)).ok();
        let curated = curated.and_then(|record| record.inputs::<CurateInputs>(self.dir).ok().flatten());
        let recipe = match curated {
            Some(curated) => &recipes[usize::from(curated.llm == made.model)],
            // Which model it was cannot be known: that of either is fine.
            None => recipes.iter().find(|recipe| **recipe == made.recipe).unwrap_or(&recipes[0]),
        };
        FinetuneInputs {
            seed: config.seed,
            data: made.data.with(&config.data),
            max_length: config.data.max_length,
            adapter: adapter(made.adapter, config),
            recipe: recipe.clone(),
            device: device(made.device, config),
            reading: config.data.reading_inputs(),
            ..made
        }
    }

    fn translate(&self, mut made: TranslateInputs) -> TranslateInputs {
        let translator = made.method.baseline().is_none() && made.products.is_none();
        let dir = if translator { ReuseConfig::translator_dir } else { ReuseConfig::tuples_dir };
        for (name, sum) in &mut made.with {
            if let Some(now) = self.sum_of(&dir, name) {
                *sum = now.into();
            }
        }
        TranslateInputs {
            products: made.products.map(|_| Translation::inputs(self.config)),
            lora_r: made.lora_r.map(|_| self.config.translate.lora_r),
            device: device(made.device, self.config),
            ..made
        }
    }

    fn refine(&self, made: RefineInputs) -> RefineInputs {
        let config = self.config;
        RefineInputs {
            seed: config.seed,
            data: made.data.with(&config.data),
            max_length: config.data.max_length,
            refine: config.refine.clone(),
            recipe: config.curate.llm.clone(),
            evaluate: config.evaluate.clone(),
            adapter: adapter(made.adapter, config),
            device: device(made.device, config),
            reading: config.data.reading_inputs(),
            ..made
        }
    }

    fn evaluate(&self, made: EvaluateInputs) -> EvaluateInputs {
        let config = self.config;
        EvaluateInputs {
            data: made.data.with(&config.data),
            evaluate: (&config.evaluate).into(),
            device: device(made.device, config),
            reading: config.data.reading_inputs(),
            ..made
        }
    }

    /// The checksum of a finished file of an earlier stage, if it is known.
    fn sum_of(&self, dir: &dyn Fn(&ReuseConfig, &Path) -> PathBuf, name: &str) -> Option<String> {
        let record = record::read(&dir(&self.config.reuse, self.dir).join(RECORD_FILE)).ok()?;
        record.outputs.get(name).cloned()
    }
}

/// The form of an adapter as the settings have it, with the same start.
fn adapter(made: AdapterInputs, config: &Config) -> AdapterInputs {
    AdapterInputs { init: made.init, ..ModelSpec::adapter_inputs(&config.lora, &[]) }
}

/// The device of a result with what of the settings changes it on the same device: every stage may
/// have a device of its own.
fn device(made: DeviceConfig, config: &Config) -> DeviceConfig {
    DeviceConfig { max_tokens_per_microbatch: config.device.max_tokens_per_microbatch, ..made }
}
