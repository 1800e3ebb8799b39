//! What stages took, as they recorded it while they worked.
//!
//! In: the directory of a tuple store or a translator. Out: [`Cost`]. Time of attempts that were
//! stopped counts, as far as they wrote it down.

use gradtx_run::record::{self, RECORD_FILE};
use gradtx_runtime::metrics::JsonLines;
use serde::Serialize;
use serde_json::Value;
use std::path::Path;

/// What a stage took.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cost {
    /// Seconds from begin to end of all attempts; unknown for a job array.
    pub seconds: Option<f64>,
    /// Hours of all ranks together.
    pub rank_hours: f64,
    /// Whether the ranks computed on GPUs.
    pub on_gpus: bool,
}

/// What curation took; nothing where it has not written it down.
pub fn of_curation(dir: &Path) -> Option<Cost> {
    let ranks = lines(&dir.join("throughput-ranks.jsonl"));
    let sum = |lines: &[Value], key: &str| lines.iter().filter_map(|line| line[key].as_f64()).sum::<f64>();
    let first: Vec<Value> = ranks.iter().filter(|line| line["rank"] == 0).cloned().collect();
    let (seconds, total) = match ranks[..] {
        // Processes of an array know nothing of each other.
        [] => (None, sum(&groups(dir), "seconds")),
        _ => (Some(sum(&first, "wall_s")), sum(&ranks, "wall_s")),
    };
    (total > 0.0).then(|| Cost { seconds, rank_hours: total / 3600.0, on_gpus: is_on_gpus(dir) })
}

/// What training took; nothing where it has not written it down.
pub(crate) fn of_training(dir: &Path) -> Option<Cost> {
    let (mut seconds, mut total, mut before) = (0.0, 0.0, 0.0);
    for line in lines(&dir.join("throughput.jsonl")) {
        let parts = line["seconds"].as_object().into_iter().flat_map(|parts| parts.values());
        let a_step: f64 = parts.filter_map(Value::as_f64).sum();
        let step = line["step"].as_f64().unwrap_or_default();
        // An attempt that resumes from a checkpoint repeats steps.
        let all = a_step * if step > before { step - before } else { 0.0 };
        before = step;
        seconds += all;
        total += all * line["ranks"].as_f64().unwrap_or(1.0).max(1.0);
    }
    let cost = Cost { seconds: Some(seconds), rank_hours: total / 3600.0, on_gpus: is_on_gpus(dir) };
    (seconds > 0.0).then_some(cost)
}

/// The lines of every group of shadow jobs.
fn groups(dir: &Path) -> Vec<Value> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let is_of_groups =
        |name: &str| ["tiny", "llm"].iter().any(|role| name.starts_with(&format!("throughput-{role}.")));
    entries
        .filter(|entry| is_of_groups(&entry.file_name().to_string_lossy()))
        .flat_map(|entry| lines(&entry.path()))
        .collect()
}

/// The lines of a file; none where it is not there or cannot be read.
fn lines(path: &Path) -> Vec<Value> {
    if path.is_file() { JsonLines::read(path).unwrap_or_default() } else { vec![] }
}

fn is_on_gpus(dir: &Path) -> bool {
    let record = record::read(&dir.join(RECORD_FILE)).ok();
    record.is_some_and(|record| record.settings["device"]["kind"] == "cuda")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str, lines: &[&str]) {
        std::fs::write(dir.join(name), lines.join("\n") + "\n").unwrap();
    }

    #[test]
    fn hours_of_ranks_and_arrays_by_hand() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(of_curation(dir.path()), None);
        write(dir.path(), "throughput-tiny.1.jsonl", &[r#"{"step": 4, "seconds": 1800}"#]);
        write(dir.path(), "throughput-llm.2.jsonl", &[r#"{"step": 4, "seconds": 5400}"#]);
        let array = of_curation(dir.path()).unwrap();
        assert_eq!((array.seconds, array.rank_hours, array.on_gpus), (None, 2.0, false));
        let rank = |n: u32| format!(r#"{{"step": 0, "rank": {n}, "wall_s": 7200}}"#);
        write(dir.path(), "throughput-ranks.jsonl", &[&rank(0), &rank(1)]);
        let ranks = of_curation(dir.path()).unwrap();
        assert_eq!((ranks.seconds, ranks.rank_hours), (Some(7200.0), 4.0));
    }

    #[test]
    fn training_counts_every_step_once() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(of_training(dir.path()), None);
        let line = |step: u32, a_step: u32| {
            format!(r#"{{"step": {step}, "ranks": 4, "seconds": {{"compute": {a_step}, "data": 1}}}}"#)
        };
        // Stopped after step 20, resumed from step 10.
        write(dir.path(), "throughput.jsonl", &[&line(20, 1), &line(15, 9), &line(30, 1)]);
        let cost = of_training(dir.path()).unwrap();
        assert_eq!((cost.seconds, cost.rank_hours), (Some(70.0), 70.0 * 4.0 / 3600.0));
    }
}
