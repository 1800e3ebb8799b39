//! What a sweep will take: its runs, with a curation that several of them share billed once.
//!
//! In: the prediction of every run, and the hash of what its curation depends on. Out: what
//! each run adds, and the sums.

use crate::cost::Prediction;
use comfy_table::{CellAlignment, Table, presets};
use gradtx_run::text::{counted, human_seconds};
use gradtx_runtime::plan::human_bytes;
use serde::Serialize;

/// Stages of a prediction that are curation begin with this.
const CURATION: &str = "curate";

/// A run of a sweep, predicted.
#[derive(Debug, Serialize)]
pub struct PlannedRun {
    /// Its name.
    pub name: String,
    /// Hash of the settings that its curation depends on.
    pub curation: String,
    /// A run before this one has paid for the curation.
    pub shares_curation: bool,
    /// What it would take alone.
    pub prediction: Prediction,
}

/// A sweep, predicted.
#[derive(Debug, Serialize)]
pub struct SweepCost {
    /// The runs.
    pub runs: Vec<PlannedRun>,
    /// Distinct curations.
    pub curations: usize,
    /// GPU hours of all.
    pub gpu_hours: f64,
    /// Seconds of all, one after the other.
    pub seconds: f64,
}

impl PlannedRun {
    /// GPU hours that it adds to the sweep.
    fn gpu_hours(&self) -> f64 {
        let stages = self.prediction.stages.iter();
        let curation = stages.filter(|stage| stage.name.starts_with(CURATION)).map(|stage| stage.gpu_hours);
        self.prediction.gpu_hours - if self.shares_curation { curation.sum() } else { 0.0 }
    }

    /// Seconds that it adds to the sweep.
    fn seconds(&self) -> f64 {
        let curation = if self.shares_curation { self.prediction.curation.seconds } else { 0.0 };
        self.prediction.seconds - curation
    }
}

impl SweepCost {
    /// Of runs with their names, the hashes of their curations, and their predictions.
    pub fn of(runs: impl IntoIterator<Item = (String, String, Prediction)>) -> Self {
        let mut all: Vec<PlannedRun> = vec![];
        for (name, curation, prediction) in runs {
            let shares_curation = all.iter().any(|run| run.curation == curation);
            all.push(PlannedRun { name, curation, shares_curation, prediction });
        }
        Self {
            curations: all.iter().filter(|run| !run.shares_curation).count(),
            gpu_hours: all.iter().map(PlannedRun::gpu_hours).sum(),
            seconds: all.iter().map(PlannedRun::seconds).sum(),
            runs: all,
        }
    }

    /// A line for every run, and the sum; `unit` is that of GPU hours.
    pub fn page(&self, unit: &str) -> String {
        let Some(first) = self.runs.first() else { return "the sweep has no runs".into() };
        let mut table = Table::new();
        table.load_preset(presets::ASCII_MARKDOWN);
        table.set_header(["run", "time", unit, "curate", "train", "ranks wait", "memory of a rank"]);
        for run in &self.runs {
            table.add_row(run.row());
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        format!(
            "{table}\n{}: {:.2} {unit}; {} one after the other on {}; {} in all",
            counted(self.runs.len(), "run"),
            self.gpu_hours,
            human_seconds(self.seconds),
            counted(first.prediction.ranks, "rank"),
            counted(self.curations, "curation")
        )
    }
}

impl PlannedRun {
    fn row(&self) -> [String; 7] {
        let p = &self.prediction;
        let most = p.stages.iter().map(|stage| stage.memory.need).max().unwrap_or(0);
        let fits = p.stages.iter().all(|stage| stage.memory.fits());
        let trained = p.stages.iter().find(|stage| stage.name == "train").map_or(0.0, |stage| stage.seconds);
        let [curated, waiting] = match self.shares_curation {
            true => ["shared".to_string(), String::new()],
            false => [human_seconds(p.curation.seconds), format!("{:.1} %", 100.0 * p.curation.idle_share)],
        };
        [
            self.name.clone(),
            human_seconds(self.seconds()),
            format!("{:.2}", self.gpu_hours()),
            curated,
            human_seconds(trained),
            waiting,
            if fits { human_bytes(most) } else { format!("{}: TOO MUCH", human_bytes(most)) },
        ]
    }
}
