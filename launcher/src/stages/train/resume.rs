//! Going on where a killed training stopped, with the same bytes as if it had not been.
//!
//! A checkpoint holds the translator's values, the optimizer's moments and what is known
//! of the best step so far. It is written after everything that it refers to: the best
//! translator's file, whose checksum it holds, and the metrics of its step. Batches,
//! augmentation and dropout are functions of the step, so nothing else is needed.

use anyhow::{Context as _, Result};
use gradtx_kernels::{Backend, Real};
use gradtx_models::grad_transformer::{GradTransformer, Trainer};
use gradtx_runtime::artifact::checksum_file;
use gradtx_runtime::checkpoint::{self, Checkpoint, Values};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Directory of the checkpoints in a translator directory.
const CHECKPOINTS: &str = "checkpoints";
/// Checkpoints kept: one to go on from, and one in case it is damaged.
const KEPT: usize = 2;

/// What training knows beside its buffers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Steps that are done.
    pub steps: u32,
    /// The best step so far.
    pub best: Option<Best>,
    /// Validations since then.
    pub since_best: u32,
}

/// The step with the smallest validation error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Steps that were done.
    pub step: u32,
    /// Its relative error.
    pub relative_error: f64,
    /// Checksum of the translator's file.
    pub file: String,
}

/// The checkpoints of one translator.
pub struct Checkpoints {
    dir: PathBuf,
    /// The file of the best translator.
    model: PathBuf,
}

impl Checkpoints {
    /// Of the translator in a directory.
    pub fn of(translator: &Path) -> Self {
        Self { dir: translator.join(CHECKPOINTS), model: translator.join("model.safetensors") }
    }

    /// Writes what is needed to go on.
    pub fn save<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        device: &D,
        model: &GradTransformer<D, X>,
        trainer: &Trainer<D, X>,
        progress: &Progress,
    ) -> Result<()> {
        let masters = trainer.master_values(model)?;
        let (first, second) = trainer.optimizer().moments();
        let (first, second) = (device.to_host(D::all(first))?, device.to_host(D::all(second))?);
        let buffers = [
            ("masters", Values::F32(&masters)),
            ("first_moments", Values::F32(&first)),
            ("second_moments", Values::F32(&second)),
        ];
        let state = serde_json::to_value(progress)?;
        Ok(checkpoint::save_step(&self.dir, progress.steps as u64, &buffers, &state, KEPT)?)
    }

    /// Fills model and trainer from the newest checkpoint that is whole and whose best
    /// translator is still there; tells where to go on.
    pub fn restore<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        device: &D,
        model: &mut GradTransformer<D, X>,
        trainer: &mut Trainer<D, X>,
    ) -> Result<Option<Progress>> {
        // With all of them damaged, training begins anew: that takes time, but no result.
        let Some((_, saved)) = checkpoint::latest(&self.dir).unwrap_or_else(|e| {
            tracing::warn!("{e}; training starts over");
            None
        }) else {
            return Ok(None);
        };
        let progress: Progress = serde_json::from_value(saved.state().clone())
            .with_context(|| format!("{}: not a checkpoint of a translator", saved.path().display()))?;
        let intact = |best: &Best| checksum_file(&self.model).is_ok_and(|sum| sum == best.file);
        if !progress.best.as_ref().is_none_or(intact) {
            tracing::warn!(
                "{}: not what the checkpoint refers to; training starts over",
                self.model.display()
            );
            return Ok(None);
        }
        fill(device, &saved, model, trainer)?;
        Ok(Some(progress))
    }

    /// Removes the checkpoints of a training that has ended.
    pub fn remove(&self) -> Result<()> {
        match std::fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("{}: cannot remove", self.dir.display()))
            }
            _ => Ok(()),
        }
    }
}

fn fill<X: Real<Acc = f32>, D: Backend<X>>(
    device: &D,
    saved: &Checkpoint,
    model: &mut GradTransformer<D, X>,
    trainer: &mut Trainer<D, X>,
) -> Result<()> {
    let mut masters = vec![0.0f32; model.layout().total()];
    saved.read_f32("masters", &mut masters)?;
    trainer.set_master_values(model, &masters)?;
    let (first, second) = trainer.optimizer_mut().moments_mut();
    for (name, buffer) in [("first_moments", first), ("second_moments", second)] {
        let mut moments = vec![0.0f32; D::len(buffer)];
        saved.read_f32(name, &mut moments)?;
        device.upload(D::all_mut(buffer), &moments)?;
    }
    Ok(())
}
