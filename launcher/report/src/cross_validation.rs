//! What a cross-validation, or several of one kind, found: PGR of every translator with its interval,
//! how translators differ, and how well doubt in a translation can be seen before it is used.
//!
//! In: directories of [`gradtx_pipeline::cross_validation`]. Out: [`Summary`], as `summary.json` and as
//! text. Intervals are percentiles of a bootstrap over the held-out groups of all runs: a resampled
//! group keeps the scores of all models, so differences are paired.

mod bootstrap;
mod signals;

use self::bootstrap::{Draws, pgr};
pub(crate) use self::signals::Signals;
pub use self::signals::Warning;
use crate::source::Source;
use crate::table::{Entry, Row, Table, collect};
use crate::variants::{VARIANTS_FILE, Variants};
use anyhow::{Context as _, Result, ensure};
use comfy_table::{CellAlignment, presets};
use gradtx_pipeline::cross_validation::{self, CLIENTS_FILE, CROSS_VALIDATION_DIR, Client, Job};
use gradtx_pipeline::variant::Variant;
use gradtx_run::config::RunArgs;
use gradtx_run::context::Context;
use gradtx_run::role::Role;
use gradtx_runtime::artifact::{read_json, write_json};
use gradtx_runtime::text::shown;
use gradtx_train::baselines::Method;
use serde::Serialize;
use serde_json::json;
use std::path::{Path, PathBuf};

/// The summary in its directory.
pub const SUMMARY_FILE: &str = "summary.json";
/// A score within this part of P_T counts as reached.
const REACHED: f64 = 0.95;

/// All translators on all held-out groups.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Cross-validations.
    pub runs: usize,
    /// Held-out groups of all of them.
    pub clients: usize,
    /// Mean score of the TinyLM fine-tuned, in percent: P_S.
    pub student: f64,
    /// Mean score of the LLM fine-tuned: P_T.
    pub teacher: f64,
    /// Every translator.
    pub translators: Vec<Translator>,
    /// Every translator against [`Summary::against`].
    pub differences: Vec<Difference>,
    /// The translator that others are compared with.
    pub against: String,
    /// Signals that can be seen without test data.
    pub warnings: Vec<Warning>,
    /// What [`Self::warnings`] come of.
    #[serde(skip)]
    pub(crate) signals: Vec<Signals>,
}

/// A translator.
#[derive(Clone, Debug, Serialize)]
pub struct Translator {
    /// What a reader calls it.
    pub name: String,
    /// Mean score in percent.
    pub score: f64,
    /// 100 · (P − P_S) / (P_T − P_S), of means.
    pub pgr: f64,
    /// Its 95 % interval.
    pub interval: [f64; 2],
    /// Groups with a score of at least 95 % of P_T.
    pub reached: usize,
}

/// One translator less another, in PGR points.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    /// The one.
    pub name: String,
    /// Difference of their PGR.
    pub points: f64,
    /// Its 95 % interval.
    pub interval: [f64; 2],
    /// Groups with a better score.
    pub better: usize,
    /// Groups with a worse one.
    pub worse: usize,
}

/// Cross-validates a run, and prints what it found; returns the directory of the results.
pub fn run(context: &Context, args: &RunArgs, job: &Job) -> Result<PathBuf> {
    let home = args.run.join(CROSS_VALIDATION_DIR);
    let mut summaries = vec![];
    for found in cross_validation::run(context, args, job)? {
        let summary = Summary::of(&[&found.home])?;
        write_json(&found.home.join(SUMMARY_FILE), &summary)?;
        summaries.push((found.variant, summary));
    }
    match &summaries[..] {
        [(Variant::AsCurated, summary)] => {
            context.ui.done("cross-validate", &home, json!(summary), summary.text());
        }
        _ => {
            let all = Variants::of(summaries);
            write_json(&home.join(VARIANTS_FILE), &all)?;
            context.ui.done("cross-validate", &home, json!(all), all.text());
        }
    }
    Ok(home)
}

/// What the cross-validation of a run found, if it was done.
pub fn of(source: &mut Source) -> Option<Summary> {
    let home = source.run.join(CROSS_VALIDATION_DIR);
    if !home.join(CLIENTS_FILE).is_file() {
        return None;
    }
    match Summary::of(&[&home]) {
        Ok(summary) => Some(summary),
        Err(error) => {
            source.note(&home, format!("{error:#}"));
            None
        }
    }
}

impl Summary {
    /// Of one or several directories.
    pub fn of(homes: &[&Path]) -> Result<Self> {
        let clients = homes.iter().map(|home| clients(home)).collect::<Result<Vec<_>>>()?;
        let dirs: Vec<PathBuf> = homes
            .iter()
            .zip(&clients)
            .flat_map(|(home, clients)| clients.iter().map(|client| home.join(&client.dir)))
            .collect();
        let clients = clients.concat();
        let (scored, unusable) = collect(&dirs.iter().map(PathBuf::as_path).collect::<Vec<_>>());
        if let Some((path, why)) = unusable.first() {
            anyhow::bail!("{}: {why}", shown(path));
        }
        let table = Table::of(&scored).0.into_iter().next().context("no translator was scored")?;
        ensure!(
            clients.len() == table.data.len(),
            "expected scores of {} held-out groups, found {}: run `gradtx cross-validate` again",
            clients.len(),
            table.data.len()
        );
        let values = |entry| -> Result<Vec<f64>> {
            let row =
                table.row(entry).context("a model was not scored: run `gradtx cross-validate` again")?;
            all_of(row)
        };
        let ends = [values(Entry::Finetuned(Role::Tiny))?, values(Entry::Finetuned(Role::Llm))?];
        let rows: Vec<(&Row, Vec<f64>)> = table
            .rows
            .iter()
            .filter(|row| matches!(row.entry, Entry::Translated { .. } | Entry::Refined(_)))
            .map(|row| Ok((row, all_of(row)?)))
            .collect::<Result<_>>()?;
        let draws = Draws::new(&ends);
        let translators = rows.iter().map(|(row, scores)| translator(row, scores, &ends, &draws)).collect();
        let against = rows
            .iter()
            .find(|(row, _)| row.entry == Entry::translated(rival()))
            .or(rows.first())
            .context("no translator was scored")?;
        let others = rows.iter().filter(|(row, _)| row.entry != against.0.entry);
        let differences = others.map(|(row, scores)| difference(row, scores, &against.1, &draws)).collect();
        let signals: Vec<Signals> = rows
            .iter()
            .filter(|(row, _)| {
                matches!(row.entry, Entry::Translated { random_student: false, .. } | Entry::Refined(_))
            })
            .map(|(row, scores)| Signals::of(row, scores, &ends, &table, &clients))
            .collect();
        let warnings = signals.iter().flat_map(Signals::warnings).collect();
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        Ok(Self {
            runs: homes.len(),
            clients: clients.len(),
            student: mean(&ends[0]),
            teacher: mean(&ends[1]),
            translators,
            differences,
            against: against.0.name.clone(),
            warnings,
            signals,
        })
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_preset(presets::ASCII_MARKDOWN);
        table.set_header([
            "translator",
            "score %",
            "PGR",
            "95 %",
            "reached",
            "less ridge",
            "95 %",
            "better",
            "worse",
        ]);
        for t in &self.translators {
            let mut cells = vec![
                t.name.clone(),
                format!("{:.1}", t.score),
                number(t.pgr),
                interval(t.interval),
                t.reached.to_string(),
            ];
            if let Some(d) = self.differences.iter().find(|d| d.name == t.name) {
                let points =
                    if d.points.is_finite() { format!("{:+.1}", d.points) } else { number(d.points) };
                let numbers = [points, interval(d.interval)];
                cells.extend(numbers.into_iter().chain([d.better.to_string(), d.worse.to_string()]));
            }
            cells.resize(9, String::new());
            table.add_row(cells);
        }
        for column in 1..9 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let mut text = format!(
            "{table}\n{} held-out groups of {} {}; P_S {:.1} %, P_T {:.1} %; PGR of means, bootstrap over groups; \
             reached: at least 95 % of P_T.",
            self.clients,
            self.runs,
            if self.runs == 1 { "run" } else { "runs" },
            self.student,
            self.teacher
        );
        for warning in &self.warnings {
            text += &format!("\n{}", warning.text());
        }
        text
    }
}

/// The translator that others are compared with: the simplest one that is any good.
fn rival() -> Method {
    Method::named("ridge").unwrap_or(Method::GradTransformer)
}

fn clients(home: &Path) -> Result<Vec<Client>> {
    let path: PathBuf = home.join(CLIENTS_FILE);
    serde_json::from_value(read_json(&path)?).with_context(|| format!("{}: malformed", shown(&path)))
}

fn all_of(row: &Row) -> Result<Vec<f64>> {
    let scores: Option<Vec<f64>> = row.scores.iter().copied().collect();
    let again = "run `gradtx cross-validate` again with it among --methods";
    scores.with_context(|| format!("{}: not scored on every held-out group: {again}", row.name))
}

fn translator(row: &Row, scores: &[f64], ends: &[Vec<f64>; 2], draws: &Draws<'_>) -> Translator {
    Translator {
        name: row.name.clone(),
        score: scores.iter().sum::<f64>() / scores.len() as f64,
        pgr: pgr(scores, ends),
        interval: draws.interval(|pgr| pgr(scores)),
        reached: scores
            .iter()
            .zip(&ends[1])
            .filter(|(score, teacher)| **score >= REACHED * **teacher)
            .count(),
    }
}

fn difference(row: &Row, scores: &[f64], against: &[f64], draws: &Draws<'_>) -> Difference {
    let count = |is: fn(&f64, &f64) -> bool| scores.iter().zip(against).filter(|(a, b)| is(a, b)).count();
    Difference {
        name: row.name.clone(),
        points: pgr(scores, draws.ends) - pgr(against, draws.ends),
        interval: draws.interval(|pgr| pgr(scores) - pgr(against)),
        better: count(|a, b| a > b),
        worse: count(|a, b| a < b),
    }
}

/// A number of a table; where nobody recovers anything, since there is no gap, PGR is none.
pub(crate) fn number(x: f64) -> String {
    if x.is_finite() { format!("{x:.1}") } else { "–".into() }
}

/// An interval of a table.
pub(crate) fn interval([low, high]: [f64; 2]) -> String {
    format!("[{}, {}]", number(low), number(high))
}
