//! [`StepLog`]: what a training says of every optimizer step, in files beside its result.
//!
//! In: a line of numbers per step, and how long the step took. Out, in the directory of the stage:
//!
//! | file | content |
//! |---|---|
//! | `metrics.jsonl` | what the work depends on and gives: the same bytes after a crash, on any number of ranks |
//! | `throughput-steps.jsonl` | what differs from run to run: seconds, rate, memory |
//! | `events.out.tfevents.*` | both, for TensorBoard |
//!
//! Lines are written as the steps are done. A training that resumes drops what is there of the
//! steps that it repeats, so every step is there once.

use anyhow::Result;
use gradtx_run::progress::host_name;
use gradtx_runtime::metrics::{JsonLines, peak_memory};
use gradtx_runtime::tensorboard::EventFile;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// File of the losses and of what else is the same in every run.
pub const METRICS_FILE: &str = "metrics.jsonl";
/// File of the times of every step.
pub(crate) const STEP_TIMES_FILE: &str = "throughput-steps.jsonl";

/// The files of one training.
#[derive(Debug)]
pub struct StepLog {
    metrics: JsonLines,
    times: JsonLines,
    events: EventFile,
    /// What is counted: `tokens` or `tuples`.
    unit: &'static str,
    /// Bytes that are allocated on the device.
    device_bytes: u64,
    last: Instant,
}

impl StepLog {
    /// Opens the files of `dir` after the lines of the steps before `step`, counted from 1; with
    /// `step` 0, begins again. `device_bytes` is what the memory plan allocates.
    pub fn resume(dir: &Path, step: u64, unit: &'static str, device_bytes: u64) -> Result<Self> {
        Ok(Self {
            metrics: JsonLines::resume(&dir.join(METRICS_FILE), step)?,
            times: JsonLines::resume(&dir.join(STEP_TIMES_FILE), step)?,
            events: EventFile::resume(dir, &host_name(), step)?,
            unit,
            device_bytes,
            last: Instant::now(),
        })
    }

    /// Writes the line of a step, an object with `step` (from 1) and numbers; `count` units were
    /// computed in it.
    pub fn write(&mut self, line: &Map<String, Value>, count: u64) -> Result<()> {
        let step = line.get("step").and_then(Value::as_u64).unwrap_or_default();
        let now = Instant::now();
        let seconds = std::mem::replace(&mut self.last, now).elapsed();
        let times = self.times_of(step, seconds, count);
        self.metrics.write(line)?;
        self.times.write(&times)?;
        let mut scalars = vec![];
        flatten("", line, &mut scalars);
        flatten("throughput/", &times, &mut scalars);
        let scalars: Vec<(&str, f64)> = scalars.iter().map(|(tag, value)| (tag.as_str(), *value)).collect();
        Ok(self.events.write(step, &scalars)?)
    }

    fn times_of(&self, step: u64, seconds: Duration, count: u64) -> Map<String, Value> {
        let seconds = seconds.as_secs_f64();
        let mut times = Map::new();
        times.insert("step".into(), json!(step));
        times.insert("seconds".into(), json!(seconds));
        times.insert(format!("{}_per_s", self.unit), json!(count as f64 / seconds.max(1e-9)));
        times.insert("host_memory_bytes".into(), json!(peak_memory()));
        times.insert("device_memory_bytes".into(), json!(self.device_bytes));
        times
    }

    /// Waits until the metrics are on the disk.
    pub fn sync(&self) -> Result<()> {
        Ok(self.metrics.sync()?)
    }
}

/// The numbers of an object but for its step, those of objects within it under `NAME/`.
fn flatten(prefix: &str, line: &Map<String, Value>, scalars: &mut Vec<(String, f64)>) {
    for (name, value) in line.iter().filter(|(name, _)| *name != "step") {
        match value {
            Value::Number(number) => {
                scalars.extend(number.as_f64().map(|number| (format!("{prefix}{name}"), number)));
            }
            Value::Object(inner) => flatten(&format!("{prefix}{name}/"), inner, scalars),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64) -> Map<String, Value> {
        let line = json!({ "step": step, "loss": 0.5, "validation": { "error": 0.25, "by_block": [1, 2] } });
        line.as_object().cloned().unwrap()
    }

    #[test]
    fn times_stand_apart_and_every_step_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = StepLog::resume(dir.path(), 0, "tokens", 77).unwrap();
        (1..=5).for_each(|step| log.write(&line(step), 100).unwrap());
        let mut log = StepLog::resume(dir.path(), 4, "tokens", 77).unwrap();
        (4..=6).for_each(|step| log.write(&line(step), 100).unwrap());
        log.sync().unwrap();
        let read = |name: &str| JsonLines::read(&dir.path().join(name)).unwrap();
        let steps =
            |name: &str| read(name).iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>();
        assert_eq!(steps(METRICS_FILE), [1, 2, 3, 4, 5, 6]);
        assert_eq!(steps(STEP_TIMES_FILE), [1, 2, 3, 4, 5, 6]);
        assert_eq!(read(METRICS_FILE)[5], Value::Object(line(6)));
        let times = &read(STEP_TIMES_FILE)[5];
        assert!(times["seconds"].as_f64().unwrap() > 0.0 && times["tokens_per_s"].as_f64().unwrap() > 0.0);
        assert_eq!(times["device_memory_bytes"], 77);
    }

    #[test]
    fn scalars_are_named_by_their_place() {
        let mut scalars = vec![];
        flatten("", &line(3), &mut scalars);
        assert_eq!(scalars, [("loss".to_string(), 0.5), ("validation/error".to_string(), 0.25)]);
    }
}
