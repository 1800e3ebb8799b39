//! What fine-tuning shows and writes down of its steps.

use anyhow::Result;
use gradtx_run::config::Recipe;
use gradtx_run::ui::Progress;
use gradtx_runtime::metrics::{JsonLines, Rate};
use gradtx_train::lora::trainer::{Callback, Step};
use gradtx_train::step_log::StepLog;
use serde_json::json;
use std::path::Path;

/// Writes how fast it went. Times differ from run to run, so they stand apart from the losses, which do not.
pub(super) fn write_rate(out: &Path, steps: usize, rate: Rate) -> Result<()> {
    Ok(JsonLines::resume(&out.join("throughput.jsonl"), u64::MAX)?.write(&json!({
        "step": steps,
        "jobs": 1,
        "tokens": rate.tokens,
        "seconds": rate.time.as_secs_f64(),
        "tokens_per_s": rate.per_second(),
    }))?)
}

/// Shows every step, and writes it down.
pub(super) struct ShowSteps<'a> {
    pub(super) progress: Progress,
    /// None before the first step, which says what is resumed.
    pub(super) log: Option<StepLog>,
    /// Directory of the log.
    pub(super) out: &'a Path,
    pub(super) device_bytes: u64,
    pub(super) recipe: &'a Recipe,
    /// Examples of the job.
    pub(super) examples: usize,
}

impl ShowSteps<'_> {
    /// Waits until what was written is on the disk.
    pub(super) fn sync(&self) -> Result<()> {
        self.log.as_ref().map_or(Ok(()), StepLog::sync)
    }
}

impl Callback for ShowSteps<'_> {
    fn step(&mut self, step: &Step<'_>) -> Result<bool> {
        let job = &step.jobs[0];
        let tokens = job.tokens.last().copied().unwrap_or_default();
        let line = job.line(step.done as usize - 1, self.recipe, self.examples);
        let log = match &mut self.log {
            Some(log) => log,
            none => none.insert(StepLog::resume(self.out, step.done as u64, "tokens", self.device_bytes)?),
        };
        log.write(&line, tokens)?;
        let message = format!("loss {:.4}, {:.0} tokens/s", step.loss(), step.rate.per_second());
        self.progress.set(step.done as u64, message);
        Ok(true)
    }
}
