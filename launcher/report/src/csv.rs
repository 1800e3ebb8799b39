//! The content of a report as CSV files: tables and curves, for spreadsheets and plotting programs.
//!
//! In: a [`Report`]. Out: one file for each kind of row, described in docs/report.md. A number that
//! is not known is an empty field.

use crate::curves::{JobLosses, Series};
use crate::{Report, Scores};
use anyhow::{Context as _, Result};
use gradtx_run::record::make_dir;
use gradtx_runtime::artifact::write_atomic;
use serde::Serialize;
use std::io::Write;
use std::path::Path;

/// Rows under a heading.
struct Csv {
    name: &'static str,
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Csv {
    fn new(name: &'static str, head: &[&str]) -> Self {
        Self { name, head: head.iter().map(|title| (*title).into()).collect(), rows: vec![] }
    }

    fn bytes(&self) -> Result<Vec<u8>> {
        let mut out = csv::Writer::from_writer(vec![]);
        out.write_record(&self.head)?;
        for row in &self.rows {
            out.write_record(row)?;
        }
        out.into_inner().context(self.name)
    }
}

/// Writes the files to a directory, which is made when it is not there.
///
/// # Errors
/// If a file cannot be written.
pub fn write(dir: &Path, report: &Report) -> Result<()> {
    make_dir(dir)?;
    let files = [
        scores(report)?,
        clients(report)?,
        losses(report),
        translator(report),
        cross_validation(report),
        refinements(report)?,
        rates(report),
    ];
    for file in files {
        let bytes = file.bytes()?;
        write_atomic(&dir.join(file.name), |out| out.write_all(&bytes))?;
    }
    Ok(())
}

/// A number, with all its digits.
fn number(value: impl Into<Option<f64>>) -> String {
    value.into().filter(|value| value.is_finite()).map_or(String::new(), |value| value.to_string())
}

/// A name as it is in report.json.
fn name(value: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_value(value)?.as_str().unwrap_or_default().to_string())
}

/// A row for every model and metric, and one for each of its clients.
fn scores(report: &Report) -> Result<Csv> {
    let head = ["metric", "model", "test_data", "examples", "score", "interval", "pgr", "pgr_interval"];
    let mut csv = Csv::new("scores.csv", &head);
    for Scores { table, .. } in &report.scores {
        let metric = name(&table.metric)?;
        for row in &table.rows {
            let mean = [number(row.mean), number(row.interval), number(row.pgr), number(row.pgr_interval)];
            let all = [metric.clone(), row.name.clone(), "all".into(), table.examples.to_string()];
            csv.rows.push([all, mean].concat());
            for (data, score) in table.data.iter().zip(&row.scores) {
                let of = [metric.clone(), row.name.clone(), data.name.clone(), data.examples.to_string()];
                csv.rows.push([of, [number(*score), String::new(), String::new(), String::new()]].concat());
            }
        }
    }
    Ok(csv)
}

fn clients(report: &Report) -> Result<Csv> {
    let head = ["name", "model", "examples", "first_loss", "last_loss", "update_norm"];
    let mut csv = Csv::new("clients.csv", &head);
    for client in &report.clients.each {
        csv.rows.push(vec![
            client.name.clone(),
            name(&client.model)?,
            client.examples.map_or(String::new(), |n| n.to_string()),
            number(client.first),
            number(client.last),
            number(client.update_norm),
        ]);
    }
    Ok(csv)
}

/// Losses of shadow jobs and of clients.
fn losses(report: &Report) -> Csv {
    let head = ["of", "model", "step", "loss_low", "loss_median", "loss_high", "learning_rate"];
    let mut csv = Csv::new("losses.csv", &head);
    let jobs = [
        ("shadow", "tiny", &report.shadow.tiny),
        ("shadow", "llm", &report.shadow.llm),
        ("clients", "tiny", &report.clients.tiny),
        ("clients", "llm", &report.clients.llm),
    ];
    for (of, model, jobs) in jobs {
        let Some(JobLosses { at, loss, learning_rate, .. }) = jobs else { continue };
        for (step, spread) in at.iter().zip(loss) {
            csv.rows.push(vec![
                of.into(),
                model.into(),
                step.to_string(),
                number(spread.map(|s| s.low)),
                number(spread.map(|s| s.median)),
                number(spread.map(|s| s.high)),
                number(at_step(learning_rate, *step)),
            ]);
        }
    }
    csv
}

/// The value of a series at the end of a step.
fn at_step(series: &Series, step: u64) -> Option<f64> {
    let place = series.steps.iter().position(|s| *s == step)?;
    series.values[place]
}

fn translator(report: &Report) -> Csv {
    let head = ["step", "loss", "grad_norm", "learning_rate", "validation_relative_error", "validation_mse"];
    let mut csv = Csv::new("translator.csv", &head);
    let Some(training) = &report.translator else { return csv };
    let mut steps: Vec<u64> = training.loss.steps.clone();
    steps.extend(training.validations.iter().map(|validation| validation.step));
    steps.sort_unstable();
    steps.dedup();
    for step in steps {
        let validation = training.validations.iter().find(|validation| validation.step == step);
        csv.rows.push(vec![
            step.to_string(),
            number(at_step(&training.loss, step)),
            number(at_step(&training.grad_norm, step)),
            number(at_step(&training.learning_rate, step)),
            number(validation.and_then(|v| v.relative_error)),
            number(validation.and_then(|v| v.mse)),
        ]);
    }
    csv
}

/// A row for every translator.
fn cross_validation(report: &Report) -> Csv {
    let head = [
        "translator",
        "score",
        "pgr",
        "pgr_low",
        "pgr_high",
        "reached",
        "against",
        "difference",
        "difference_low",
        "difference_high",
        "better",
        "worse",
    ];
    let mut csv = Csv::new("cross-validation.csv", &head);
    let Some(summary) = &report.cross_validation else { return csv };
    for t in &summary.translators {
        let mut row = vec![t.name.clone(), number(t.score), number(t.pgr)];
        row.extend(t.interval.map(number));
        row.push(t.reached.to_string());
        if let Some(d) = summary.differences.iter().find(|d| d.name == t.name) {
            row.extend([summary.against.clone(), number(d.points)]);
            row.extend(d.interval.map(number));
            row.extend([d.better.to_string(), d.worse.to_string()]);
        }
        row.resize(head.len(), String::new());
        csv.rows.push(row);
    }
    csv
}

/// A row for every round of every refinement.
fn refinements(report: &Report) -> Result<Csv> {
    let head =
        ["name", "method", "round", "prompts", "answered", "agreed", "share", "rouge1", "trained_on", "loss"];
    let mut csv = Csv::new("refinements.csv", &head);
    for refinement in &report.refinements {
        for (i, round) in refinement.rounds.iter().enumerate() {
            csv.rows.push(vec![
                refinement.name.clone(),
                refinement.method.map_or("", |method| method.name()).into(),
                (i + 1).to_string(),
                refinement.prompts.to_string(),
                refinement.answered.to_string(),
                round.agreed.to_string(),
                number(round.share),
                number(round.rouge1),
                name(&round.trained_on)?,
                number(round.loss),
            ]);
        }
    }
    Ok(csv)
}

fn rates(report: &Report) -> Csv {
    let mut csv = Csv::new("throughput.csv", &["stage", "model", "of", "at", "unit", "per_second"]);
    for series in &report.times.rates {
        for (at, value) in series.per_s.steps.iter().zip(&series.per_s.values) {
            csv.rows.push(vec![
                series.stage.clone(),
                series.model.map_or(String::new(), |role| role.name().into()),
                series.of.clone(),
                at.to_string(),
                series.unit.clone(),
                number(*value),
            ]);
        }
    }
    csv
}
