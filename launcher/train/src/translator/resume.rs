//! Going on where a training stopped, with the same bytes as if it had not been.
//!
//! In `checkpoints/` of the translator's directory:
//!
//! ```text
//! step-000000040.0-of-2.safetensors   what rank 0 owns: masters and moments (see runtime::checkpoint)
//! step-000000040.1-of-2.safetensors
//! best-000000030/                     the translator that was the best one at step 40
//! ```
//!
//! Batches, augmentation and dropout are functions of the step, so nothing else is needed.
//! Every rank copies what it owns, and a thread writes it while training continues. A
//! checkpoint counts once all its parts are there; it then stands after everything that it
//! refers to: the best translator and the metrics of its step, which rank 0 writes before it
//! begins with its part. Nothing is removed that the newest two of them refer to. Another
//! number of ranks can continue.

use super::data_parallel::DataParallel;
use anyhow::{Context as _, Result, anyhow, ensure};
use gradtx_kernels::{Backend, Buffer, Collective, Real};
use gradtx_models::grad_transformer::{GradTransformer, Trainer};
use gradtx_run::failure::failed;
use gradtx_runtime::artifact::{checksum_file, copy_checked, sweep_all_temporary};
use gradtx_runtime::checkpoint::{self, Parts, Saved, part_path};
use gradtx_runtime::comm::Collectives;
use gradtx_runtime::text::shown;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

/// Directory of the checkpoints in a translator directory.
const CHECKPOINTS: &str = "checkpoints";
/// Whole checkpoints kept: one to continue from, and one in case it is damaged.
const KEPT: usize = 2;
/// Names of the flat buffers in a checkpoint.
const BUFFERS: [&str; 3] = ["masters", "first_moments", "second_moments"];
/// Files of a translator, the statistics only where it has some. config.json last: a directory
/// that has it is whole.
const FILES: [&str; 3] = ["normalization.safetensors", "model.safetensors", "config.json"];

/// What training knows beside its buffers; the same on all ranks.
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
    /// Its validation as JSON text, since decimal numbers that are read and written again may
    /// lose their last digit.
    pub validation: String,
    /// Checksums of the translator's files by their names.
    pub files: BTreeMap<String, String>,
}

/// The checkpoints of one translator, as one rank sees them.
pub struct Checkpoints {
    /// The translator's directory.
    translator: PathBuf,
    dir: PathBuf,
    /// The part that is being written, of this step.
    writing: Option<(u64, JoinHandle<gradtx_runtime::Result<()>>)>,
    /// The newest step whose part is written; 0 for none.
    written: u64,
    /// On rank 0: checkpoints that are there or being written, oldest first, with the best step
    /// that each refers to.
    kept: Vec<(Saved, Option<u32>)>,
}

impl Checkpoints {
    /// Of the translator in a directory.
    pub fn of(translator: &Path) -> Self {
        let dir = translator.join(CHECKPOINTS);
        Self { translator: translator.to_owned(), dir, writing: None, written: 0, kept: vec![] }
    }

    /// Copies what this rank has to keep, and begins to write it. A part that is still being
    /// written is waited for: there is memory for one.
    pub fn start<X: Real<Acc = f32>, D: Backend<X>>(
        &mut self,
        ranks: &DataParallel<'_, D>,
        model: &GradTransformer<D, X>,
        trainer: &Trainer<D, X>,
        progress: &Progress,
    ) -> Result<()> {
        self.wait()?;
        self.make_dir()?;
        let device = model.device();
        let (first, second) = trainer.optimizer().moments();
        let values =
            [trainer.master_values(model)?, device.to_host(first.all())?, device.to_host(second.all())?];
        let (ranges, state) = (ranks.owned(), serde_json::to_value(progress)?);
        let saved = Saved { step: progress.steps.into(), parts: ranks.comm().size() };
        let path = part_path(&self.dir, saved, ranks.comm().rank());
        let write = move || {
            let buffers: Vec<_> =
                BUFFERS.iter().zip(&values).map(|(name, values)| (*name, &values[..])).collect();
            checkpoint::save_part(&path, &ranges, &buffers, &state)
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(write);
        let thread = thread.context("cannot start a thread that writes a checkpoint")?;
        self.writing = Some((saved.step, thread));
        if ranks.is_first() {
            self.kept.push((saved, progress.best.as_ref().map(|best| best.step)));
        }
        Ok(())
    }

    fn make_dir(&self) -> Result<()> {
        std::fs::create_dir_all(&self.dir).with_context(|| format!("{}: cannot make", shown(&self.dir)))
    }

    /// The newest step whose part this rank has written; fails if it could not be.
    pub fn written(&mut self) -> Result<u64> {
        if self.writing.as_ref().is_some_and(|(_, thread)| thread.is_finished()) {
            self.wait()?;
        }
        Ok(self.written)
    }

    /// Waits until this rank's part is written, if one is being written.
    pub fn wait(&mut self) -> Result<()> {
        if let Some((step, thread)) = self.writing.take() {
            thread.join().map_err(|_| anyhow!("the thread that writes a checkpoint panicked"))??;
            self.written = step;
        }
        Ok(())
    }

    /// On rank 0: all ranks have written their parts up to this step, so older checkpoints that
    /// are not needed any more are removed.
    pub fn complete(&mut self, step: u64, progress: &Progress) -> Result<()> {
        let whole = self.kept.iter().filter(|(saved, _)| saved.step <= step).count();
        let old = whole.saturating_sub(KEPT);
        if old == 0 {
            return Ok(());
        }
        self.kept.drain(..old);
        self.remove_unneeded(progress)
    }

    fn remove_unneeded(&self, progress: &Progress) -> Result<()> {
        let keep: Vec<Saved> = self.kept.iter().map(|(saved, _)| *saved).collect();
        checkpoint::remove_others(&self.dir, &keep)?;
        self.remove_other_bests(progress)
    }

    /// On rank 0: removes the translators that neither a checkpoint nor the present refers to.
    pub(crate) fn remove_other_bests(&self, progress: &Progress) -> Result<()> {
        let now = progress.best.as_ref().map(|best| best.step);
        let needed: Vec<PathBuf> = self
            .kept
            .iter()
            .filter_map(|(_, best)| *best)
            .chain(now)
            .map(|step| self.best_dir(step))
            .collect();
        let list = || format!("{}: cannot list", shown(&self.dir));
        for entry in std::fs::read_dir(&self.dir).with_context(list)? {
            let path = entry.with_context(list)?.path();
            let is_best = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("best-"));
            if is_best && !needed.contains(&path) {
                std::fs::remove_dir_all(&path).with_context(|| format!("{}: cannot remove", shown(&path)))?;
            }
        }
        Ok(())
    }

    fn best_dir(&self, step: u32) -> PathBuf {
        self.dir.join(format!("best-{step:09}"))
    }

    /// On rank 0: keeps the translator of this step; returns the checksums of its files.
    pub(crate) fn save_best<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        model: &GradTransformer<D, X>,
        masters: &[f32],
        step: u32,
    ) -> Result<BTreeMap<String, String>> {
        let dir = self.best_dir(step);
        std::fs::create_dir_all(&dir).with_context(|| format!("{}: cannot make", shown(&dir)))?;
        model.save_values(&dir, masters)?;
        let files = FILES.iter().filter(|name| dir.join(name).is_file());
        files.map(|name| Ok(((*name).to_owned(), checksum_file(&dir.join(name))?))).collect()
    }

    /// On rank 0: the best translator comes to where it belongs. It is copied: until the stage
    /// is finished, a checkpoint may still be needed, and what it refers to.
    pub(crate) fn place_best(&self, best: &Best) -> Result<()> {
        let from = self.best_dir(best.step);
        for name in FILES {
            if let Some(sum) = best.files.get(name) {
                copy_checked(&from.join(name), &self.translator.join(name), sum).map_err(|e| {
                    failed(e.to_string(), "run the same command again: it trains on from before")
                })?;
            }
        }
        Ok(())
    }

    /// Fills model and trainer from the newest checkpoint that is whole and whose best
    /// translator is there; returns where to continue. All ranks find the same. What is not
    /// needed any more, of this and of earlier attempts, is removed.
    pub fn restore<X: Real<Acc = f32>, D: Backend<X>>(
        &mut self,
        ranks: &mut DataParallel<'_, D>,
        model: &mut GradTransformer<D, X>,
        trainer: &mut Trainer<D, X>,
    ) -> Result<Option<Progress>> {
        if ranks.is_first() {
            self.make_dir()?;
        }
        let mut found = None;
        let list = self.list(ranks)?;
        for (i, saved) in list.iter().enumerate().rev() {
            let opened = self.open(*saved, model.layout().total(), ranks.is_first());
            let mut good = vec![0; ranks.comm().size()];
            ranks.comm().all_gather(&[opened.is_ok() as u8], &mut good)?;
            let first_bad = good.iter().position(|&good| good == 0);
            if let Err(error) = &opened
                && first_bad == Some(ranks.comm().rank())
            {
                tracing::warn!("{error:#}; trying the checkpoint before it");
            }
            if let Ok((parts, progress)) = opened
                && first_bad.is_none()
            {
                fill(&parts, &ranks.owned(), model, trainer)?;
                ranks.gather_values(model)?;
                self.written = saved.step;
                self.kept = vec![(*saved, progress.best.as_ref().map(|best| best.step))];
                found = Some((i, progress));
                break;
            }
        }
        // With all of them damaged, training begins again: that takes time, but no result.
        if found.is_none() && !list.is_empty() {
            tracing::warn!("{}: no checkpoint is whole; training starts over", shown(&self.dir));
        }
        let (older, progress) = found.map_or((0, None), |(i, progress)| (i, Some(progress)));
        if ranks.is_first() {
            self.keep_one_before(&list[..older], model.layout().total());
            self.remove_unneeded(&progress.clone().unwrap_or_default())?;
            // Nobody else writes here before the barrier.
            sweep_all_temporary(&self.dir)?;
            sweep_all_temporary(&self.translator)?;
        }
        // Nobody writes a checkpoint before others are removed.
        ranks.comm().barrier()?;
        Ok(progress)
    }

    /// What rank 0 sees: a shared directory need not look the same from everywhere.
    fn list<D: Collective>(&self, ranks: &DataParallel<'_, D>) -> Result<Vec<Saved>> {
        let mut list = vec![];
        if ranks.is_first() {
            list = serde_json::to_vec(&checkpoint::saved(&self.dir)?)?;
        }
        ranks.comm().broadcast_bytes(0, &mut list)?;
        Ok(serde_json::from_slice(&list)?)
    }

    fn open(&self, saved: Saved, total: usize, check_best: bool) -> Result<(Parts, Progress)> {
        let parts = Parts::load(&self.dir, saved)?;
        let name = || format!("{}: step {}", shown(&self.dir), saved.step);
        let progress: Progress = serde_json::from_value(parts.state().clone())
            .with_context(|| format!("{}: not a checkpoint of a translator", name()))?;
        ensure!(parts.total() == total, "{}: {} values for {total} parameters", name(), parts.total());
        if let Some(best) = progress.best.as_ref().filter(|_| check_best) {
            for (name, sum) in &best.files {
                let file = self.best_dir(best.step).join(name);
                let intact = checksum_file(&file).is_ok_and(|found| found == *sum);
                ensure!(intact, "{}: not what the checkpoint of step {} refers to", shown(&file), saved.step);
            }
        }
        Ok((parts, progress))
    }

    /// Of older checkpoints, the newest that is whole stays too.
    fn keep_one_before(&mut self, older: &[Saved], total: usize) {
        let whole = |saved: &Saved| {
            let (_, progress) = self.open(*saved, total, true).ok()?;
            Some((*saved, progress.best.map(|best| best.step)))
        };
        if let Some(one) = older.iter().rev().find_map(whole) {
            self.kept.insert(0, one);
        }
    }

    /// Removes the checkpoints of a training that has ended.
    pub fn remove(&self) -> Result<()> {
        match std::fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("{}: cannot remove", shown(&self.dir)))
            }
            _ => Ok(()),
        }
    }
}

/// What a rank owns comes from the parts that have it.
fn fill<X: Real<Acc = f32>, D: Backend<X>>(
    parts: &Parts,
    own: &[Range<usize>],
    model: &mut GradTransformer<D, X>,
    trainer: &mut Trainer<D, X>,
) -> Result<()> {
    let [masters, first_moments, second_moments] = BUFFERS;
    trainer.set_master_values(model, &parts.read(masters, own)?)?;
    let device = model.device();
    let (first, second) = trainer.optimizer_mut().moments_mut();
    device.upload(first.all_mut(), &parts.read(first_moments, own)?)?;
    Ok(device.upload(second.all_mut(), &parts.read(second_moments, own)?)?)
}
