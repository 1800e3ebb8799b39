//! What a cross-validation, or several of one kind, found: PGR of every translator with its interval,
//! how translators differ, and how well doubt in a translation can be seen before it is used.
//!
//! In: directories of [`gradtx_pipeline::cross_validation`]. Out: [`Summary`], as `summary.json` and as
//! text. Intervals are percentiles of a bootstrap over the held-out groups of all runs: a resampled
//! group keeps the scores of all models, so differences are paired.

use crate::source::Source;
use crate::table::{Entry, Row, Table, TestData, collect};
use anyhow::{Context as _, Result, ensure};
use comfy_table::{CellAlignment, presets};
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_pipeline::cross_validation::{self, CLIENTS_FILE, CROSS_VALIDATION_DIR, Client, Job};
use gradtx_run::config::RunArgs;
use gradtx_run::context::Context;
use gradtx_run::role::Role;
use gradtx_runtime::artifact::{read_json, write_json};
use gradtx_runtime::text::shown;
use gradtx_train::baselines::Method;
use serde::Serialize;
use serde_json::json;
use std::cmp::Ordering;
use std::path::{Path, PathBuf};

/// The summary in its directory.
pub const SUMMARY_FILE: &str = "summary.json";
/// Draws of the bootstrap.
const DRAWS: usize = 10_000;
/// A score within this part of P_T counts as reached.
const REACHED: f64 = 0.95;
/// PGR below which a translation is bad, and above which it is good, for [`Warning`].
const BAD: f64 = 50.0;
const GOOD: f64 = 90.0;

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

/// How well a signal separates bad translations (PGR below 50) from good ones (above 90).
#[derive(Clone, Debug, Serialize)]
pub struct Warning {
    /// The signal.
    pub signal: &'static str,
    /// The translator that it warns of.
    pub name: String,
    /// The probability that a bad translation has a more doubtful signal than a good one.
    pub auc: f64,
    /// Bad and good translations.
    pub counts: [usize; 2],
}

/// Cross-validates a run, and prints what it found; returns the directory of the results.
pub fn run(context: &Context, args: &RunArgs, job: &Job) -> Result<PathBuf> {
    let home = cross_validation::run(context, args, job)?;
    let summary = Summary::of(&[&home])?;
    write_json(&home.join(SUMMARY_FILE), &summary)?;
    context.ui.done("cross-validate", &home, json!(summary), summary.text());
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
        let (scored, unusable) = collect(homes);
        if let Some((path, why)) = unusable.first() {
            anyhow::bail!("{}: {why}", shown(path));
        }
        let table = Table::of(&scored).0.into_iter().next().context("no translator was scored")?;
        let clients = homes.iter().map(|home| clients(home)).collect::<Result<Vec<_>>>()?.concat();
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
        let warnings = rows
            .iter()
            .filter(|(row, _)| matches!(row.entry, Entry::Translated { random_student: false, .. }))
            .flat_map(|(row, scores)| warnings(row, scores, &ends, &table, &clients))
            .collect();
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
        // Where nobody recovers anything, since there is no gap, PGR is no number.
        let number = |x: f64| if x.is_finite() { format!("{x:.1}") } else { "–".into() };
        let interval = |[low, high]: [f64; 2]| format!("[{}, {}]", number(low), number(high));
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
        for w in &self.warnings {
            text += &format!(
                "\nWarning by {} for {}: AUC {:.2} ({} with PGR below 50, {} above 90).",
                w.signal, w.name, w.auc, w.counts[0], w.counts[1]
            );
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
    scores.with_context(|| format!("{}: not scored on every held-out group", row.name))
}

/// The bootstrap's draws of groups, the same for everything that is compared.
struct Draws<'a> {
    ends: &'a [Vec<f64>; 2],
    draws: Vec<Vec<u32>>,
}

impl<'a> Draws<'a> {
    fn new(ends: &'a [Vec<f64>; 2]) -> Self {
        let count = ends[0].len();
        let mut stream = Stream::new(derive_named(0, "bootstrap over groups"));
        let draw = |_| (0..count).map(|_| stream.below(count) as u32).collect();
        Self { ends, draws: (0..DRAWS).map(draw).collect() }
    }

    /// The 95 % interval of a statistic of PGR.
    fn interval(&self, of: impl Fn(&dyn Fn(&[f64]) -> f64) -> f64) -> [f64; 2] {
        let mut found: Vec<f64> = self
            .draws
            .iter()
            .map(|draw| {
                let sum = |values: &[f64]| draw.iter().map(|&i| values[i as usize]).sum::<f64>();
                let [student, teacher] = self.ends.each_ref().map(|values| sum(values));
                of(&|scores| 100.0 * (sum(scores) - student) / (teacher - student))
            })
            .collect();
        found.sort_by(f64::total_cmp);
        let at = |part: f64| found[((found.len() - 1) as f64 * part).round() as usize];
        [at(0.025), at(0.975)]
    }
}

/// PGR of means.
fn pgr(scores: &[f64], [student, teacher]: &[Vec<f64>; 2]) -> f64 {
    let sum = |values: &[f64]| values.iter().sum::<f64>();
    100.0 * (sum(scores) - sum(student)) / (sum(teacher) - sum(student))
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

/// What signals say of one translator; nothing where no translation is bad, or none good.
fn warnings(
    row: &Row,
    scores: &[f64],
    ends: &[Vec<f64>; 2],
    table: &Table,
    clients: &[Client],
) -> Vec<Warning> {
    let of_column = |signal: fn(&Client) -> Option<f64>| -> Option<Vec<f64>> {
        let of =
            |data: &TestData| clients.iter().find(|client| client.data == data.checksum).and_then(signal);
        table.data.iter().map(of).collect()
    };
    let own: Vec<f64> =
        (0..scores.len()).map(|i| 100.0 * (scores[i] - ends[0][i]) / (ends[1][i] - ends[0][i])).collect();
    let signals: [(&str, fn(&Client) -> Option<f64>); 2] = [
        ("share of answers that agree", |client| client.agreement.map(|share| -share)),
        ("distance to the shadows' span", |client| client.distance),
    ];
    let counts = [own.iter().filter(|x| **x < BAD).count(), own.iter().filter(|x| **x > GOOD).count()];
    if counts.contains(&0) {
        return vec![];
    }
    let found = signals.into_iter().filter_map(|(signal, of)| {
        let doubt = of_column(of)?;
        Some(Warning { signal, name: row.name.clone(), auc: auc(&own, &doubt), counts })
    });
    found.collect()
}

/// The share of pairs of a bad and a good translation of which the bad one is more doubtful; equals
/// count half.
fn auc(pgr: &[f64], doubt: &[f64]) -> f64 {
    let of = |is: fn(f64) -> bool| -> Vec<f64> {
        pgr.iter().zip(doubt).filter(|(pgr, _)| is(**pgr)).map(|(_, doubt)| *doubt).collect()
    };
    let (bad, good) = (of(|pgr| pgr < BAD), of(|pgr| pgr > GOOD));
    let won = |bad: &f64, good: &f64| match bad.total_cmp(good) {
        Ordering::Greater => 1.0,
        Ordering::Equal => 0.5,
        Ordering::Less => 0.0,
    };
    let sum: f64 = bad.iter().flat_map(|bad| good.iter().map(move |good| won(bad, good))).sum();
    sum / (bad.len() * good.len()) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_paired() {
        let ends = [vec![20.0, 60.0, 40.0, 50.0], vec![100.0; 4]];
        let draws = Draws::new(&ends);
        // The same part of the gap everywhere: no draw of groups changes it.
        let half: Vec<f64> = ends[0].iter().map(|student| (student + 100.0) / 2.0).collect();
        assert!((pgr(&half, &ends) - 50.0).abs() < 1e-9);
        assert!(draws.interval(|pgr| pgr(&half)).iter().all(|x| (x - 50.0).abs() < 1e-9));
        // Two translators that vary alike differ by the same in every draw.
        let uneven = [100.0, 60.0, 100.0, 50.0];
        let [low, high] = draws.interval(|pgr| pgr(&uneven));
        assert!(low < 40.0 && high > 80.0, "{low} {high}");
        let [low, high] = draws.interval(|pgr| pgr(&uneven) - pgr(&uneven));
        assert_eq!((low, high), (0.0, 0.0));
    }

    #[test]
    fn a_signal_that_separates_has_an_auc_of_one() {
        let pgr = [10.0, 40.0, 70.0, 95.0, 100.0];
        assert_eq!(auc(&pgr, &[5.0, 4.0, 9.0, 1.0, 2.0]), 1.0);
        assert_eq!(auc(&pgr, &[1.0, 1.0, 9.0, 1.0, 1.0]), 0.5);
        assert_eq!(auc(&pgr, &[1.0, 4.0, 9.0, 2.0, 3.0]), 0.5);
    }
}
