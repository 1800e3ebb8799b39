//! A [`Comparison`] as rows and columns: for a terminal, and as CSV.
//!
//! There is a row for every run, metric and model. Numbers are in percent; hours are of all ranks
//! together.

use super::{ComparedRun, ComparedScore, Comparison};
use crate::cost::Cost;
use anyhow::{Context as _, Result};
use comfy_table::{CellAlignment, Table, presets};
use std::collections::BTreeSet;

impl Comparison {
    /// For a terminal: the table, what all of it took, and the notes. Columns in which no run has
    /// anything are left out.
    pub fn text(&self) -> String {
        let (header, rows) = (self.header(), self.rows());
        let has_text = |column: &usize| rows.iter().any(|row| !row[*column].is_empty());
        let shown: Vec<usize> = (0..header.len()).filter(|column| *column == 0 || has_text(column)).collect();
        let pick = |row: &[String]| shown.iter().map(|&column| row[column].clone()).collect::<Vec<_>>();
        let mut table = Table::new();
        table.load_preset(presets::ASCII_MARKDOWN);
        table.set_header(pick(&header));
        rows.iter().for_each(|row| _ = table.add_row(pick(row)));
        let first_number = self.settings.len() + 3;
        for (at, _) in shown.iter().enumerate().filter(|(_, column)| **column >= first_number) {
            if let Some(column) = table.column_mut(at) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let mut lines = vec![table.to_string()];
        lines.push(format!(
            "{:.2} {} in all, every curation once; scores in percent; ± is the 95 % confidence interval over clients",
            self.rank_hours(),
            self.unit()
        ));
        lines.extend(self.notes.iter().map(|note| format!("note: {note}")));
        lines.join("\n")
    }

    /// `GPU hours`, or `rank hours` where not all was computed on GPUs.
    pub fn unit(&self) -> &'static str {
        if self.is_on_gpus() { "GPU hours" } else { "rank hours" }
    }

    /// Names of the columns of [`Self::rows`].
    pub fn header(&self) -> Vec<String> {
        let keys: Vec<&str> = self.settings.iter().map(|setting| setting.key.as_str()).collect();
        let unit = self.unit();
        ["run".to_string()]
            .into_iter()
            .chain(short(&keys))
            .chain(
                ["metric", "model", "score", "±", "PGR", "PGR ±", "P_S", "P_T", "rel. error"]
                    .map(String::from),
            )
            .chain([format!("curate {unit}"), format!("train {unit}")])
            .collect()
    }

    /// A row for every run and score, as a person reads it.
    pub fn rows(&self) -> Vec<Vec<String>> {
        let digits =
            |value: Option<f64>, digits: usize| value.map_or(String::new(), |x| format!("{x:.digits$}"));
        let row = |index: usize, run: &ComparedRun, score: Option<&ComparedScore>| {
            let settings =
                self.settings.iter().map(|setting| setting.values[index].clone().unwrap_or_default());
            let of = |value: fn(&ComparedScore) -> Option<f64>| digits(score.and_then(value), 1);
            let hours = |cost: &Option<Cost>| digits(cost.as_ref().map(|cost| cost.rank_hours), 2);
            let mut curated = hours(&run.curation);
            if run.curation_shared_by > 1 && !curated.is_empty() {
                curated += &format!(" for {}", run.curation_shared_by);
            }
            let metric = score.map_or(String::new(), |score| score.metric.label().to_string());
            let model = score.and_then(|score| score.model.clone()).unwrap_or_default();
            [run.name.clone()]
                .into_iter()
                .chain(settings)
                .chain([
                    metric,
                    model,
                    of(|s| s.score),
                    of(|s| s.interval),
                    of(|s| s.pgr),
                    of(|s| s.pgr_interval),
                ])
                .chain([
                    of(|s| s.p_s),
                    of(|s| s.p_t),
                    digits(run.relative_error, 4),
                    curated,
                    hours(&run.training),
                ])
                .collect()
        };
        let mut rows = vec![];
        for (index, run) in self.runs.iter().enumerate() {
            match &run.scores[..] {
                [] => rows.push(row(index, run, None)),
                scores => rows.extend(scores.iter().map(|score| row(index, run, Some(score)))),
            }
        }
        rows
    }

    /// As CSV: the same rows, with whole keys of settings and all digits of numbers.
    ///
    /// # Errors
    /// Never for rows of this form.
    pub fn csv(&self) -> Result<String> {
        let mut out = csv::Writer::from_writer(vec![]);
        let keys = self.settings.iter().map(|setting| setting.key.as_str());
        let numbers = [
            "metric",
            "model",
            "clients",
            "score",
            "score_interval",
            "pgr",
            "pgr_interval",
            "p_s",
            "p_t",
            "relative_error",
            "curate_rank_hours",
            "curate_shared_by",
            "train_rank_hours",
            "on_gpus",
        ];
        out.write_record(["run"].into_iter().chain(keys).chain(numbers))?;
        for (index, run) in self.runs.iter().enumerate() {
            let settings =
                self.settings.iter().map(|setting| setting.values[index].clone().unwrap_or_default());
            let head: Vec<String> = [run.name.clone()].into_iter().chain(settings).collect();
            let scores: Vec<Option<&ComparedScore>> = match &run.scores[..] {
                [] => vec![None],
                scores => scores.iter().map(Some).collect(),
            };
            for score in scores {
                out.write_record(head.iter().cloned().chain(run.numbers(score)))?;
            }
        }
        let bytes = out.into_inner().context("a table in memory can be written")?;
        Ok(String::from_utf8(bytes)?)
    }
}

impl ComparedRun {
    /// The columns of CSV after the settings.
    fn numbers(&self, score: Option<&ComparedScore>) -> [String; 14] {
        let text = |value: Option<f64>| value.map_or(String::new(), |x| x.to_string());
        let of = |value: fn(&ComparedScore) -> Option<f64>| text(score.and_then(value));
        let hours = |cost: &Option<Cost>| text(cost.as_ref().map(|cost| cost.rank_hours));
        let costs: Vec<&Cost> = [&self.curation, &self.training].into_iter().flatten().collect();
        let on_gpus = (!costs.is_empty()).then(|| costs.iter().all(|cost| cost.on_gpus).to_string());
        [
            score.map_or(String::new(), |score| score.metric.label().into()),
            score.and_then(|score| score.model.clone()).unwrap_or_default(),
            score.map_or(String::new(), |score| score.clients.to_string()),
            of(|s| s.score),
            of(|s| s.interval),
            of(|s| s.pgr),
            of(|s| s.pgr_interval),
            of(|s| s.p_s),
            of(|s| s.p_t),
            text(self.relative_error),
            hours(&self.curation),
            self.curation_shared_by.to_string(),
            hours(&self.training),
            on_gpus.unwrap_or_default(),
        ]
    }
}

/// The last parts of keys, or whole keys where these are not distinct.
fn short(keys: &[&str]) -> Vec<String> {
    let last: Vec<&str> = keys.iter().map(|key| key.rsplit('.').next().unwrap_or(key)).collect();
    let distinct = last.iter().collect::<BTreeSet<_>>().len() == last.len();
    if distinct { last } else { keys.to_vec() }.into_iter().map(String::from).collect()
}
