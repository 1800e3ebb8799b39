//! What a cross-validation, or several of one kind, found: PGR of every translator with its interval,
//! how translators differ, and how well doubt in a translation can be seen before it is used.
//!
//! In: directories of [`gradtx_pipeline::cross_validation`]. Out: [`Summary`], as `summary.json` and as
//! text. Intervals are percentiles of a bootstrap over the held-out groups of all runs: a resampled
//! group keeps the scores of all models, so differences are paired.

use crate::source::Source;
use crate::table::{Entry, Row, Table, TestData, collect};
use crate::variants::{VARIANTS_FILE, Variants};
use anyhow::{Context as _, Result, ensure};
use comfy_table::{CellAlignment, presets};
use gradtx_kernels::rng::{Stream, derive_named};
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
use std::cmp::Ordering;
use std::path::{Path, PathBuf};

/// The summary in its directory.
pub const SUMMARY_FILE: &str = "summary.json";
/// Draws of the bootstrap.
const DRAWS: usize = 10_000;
/// A score within this part of P_T counts as reached.
const REACHED: f64 = 0.95;
/// Signals that can be seen without test data.
const AGREEMENT: &str = "share of answers that agree";
const DISTANCE: &str = "distance to the shadows' span";
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
    /// What [`Self::warnings`] come of.
    #[serde(skip)]
    pub(crate) signals: Vec<Signals>,
}

/// The translations of one translator, with what is known of each without test data.
#[derive(Clone, Debug, Default)]
pub(crate) struct Signals {
    /// What a reader calls the translator.
    pub(crate) name: String,
    /// PGR of every client; NaN where the LLM is not better than the TinyLM.
    pub(crate) pgr: Vec<f64>,
    /// Answers on which TinyLM and translation agree, as a part of all.
    pub(crate) agreement: Vec<Option<f64>>,
    /// Distance of the update to the shadows' span.
    pub(crate) distance: Vec<Option<f64>>,
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
    /// The level of the signal that separates them best.
    pub level: f64,
    /// The parts of the bad and of the good translations that are more doubtful than this level.
    pub beyond: [f64; 2],
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

impl Signals {
    fn of(row: &Row, scores: &[f64], ends: &[Vec<f64>; 2], table: &Table, clients: &[Client]) -> Self {
        let of_column = |signal: fn(&Client) -> Option<f64>| -> Vec<Option<f64>> {
            let of = |data: &TestData| clients.iter().find(|client| client.data == data.checksum);
            table.data.iter().map(|data| of(data).and_then(signal)).collect()
        };
        let pgr = |i: usize| match ends[1][i] - ends[0][i] {
            gap if gap > 0.0 => 100.0 * (scores[i] - ends[0][i]) / gap,
            _ => f64::NAN,
        };
        Self {
            name: row.name.clone(),
            pgr: (0..scores.len()).map(pgr).collect(),
            agreement: of_column(|client| client.agreement),
            distance: of_column(|client| client.distance),
        }
    }

    /// Adds the translations of other clients by the same translator.
    pub(crate) fn extend(&mut self, other: &Self) {
        self.pgr.extend(&other.pgr);
        self.agreement.extend(&other.agreement);
        self.distance.extend(&other.distance);
    }

    /// What signals say; nothing where no translation is bad, or none good.
    pub(crate) fn warnings(&self) -> Vec<Warning> {
        let pgr = &self.pgr;
        let counts = [pgr.iter().filter(|x| **x < BAD).count(), pgr.iter().filter(|x| **x > GOOD).count()];
        if counts.contains(&0) {
            return vec![];
        }
        let all = |values: &[Option<f64>], sign: f64| -> Option<Vec<f64>> {
            values.iter().map(|value| value.map(|value| sign * value)).collect()
        };
        let agreement = all(&self.agreement, -1.0).map(|doubt| (AGREEMENT, -1.0, doubt));
        let distance = all(&self.distance, 1.0).map(|doubt| (DISTANCE, 1.0, doubt));
        let warning = |(signal, sign, doubt): (&'static str, f64, Vec<f64>)| {
            let (level, beyond) = level(pgr, &doubt);
            let auc = auc(pgr, &doubt);
            Warning { signal, name: self.name.clone(), auc, counts, level: sign * level, beyond }
        };
        agreement.into_iter().chain(distance).map(warning).collect()
    }
}

impl Warning {
    /// A line for a terminal.
    pub(crate) fn text(&self) -> String {
        let Self { signal, name, auc, counts: [bad, good], level, beyond } = self;
        let side = if *signal == AGREEMENT { "below" } else { "above" };
        let [of_bad, of_good] = beyond.map(|part| 100.0 * part);
        format!(
            "Warning by {signal} for {name}: AUC {auc:.2} ({bad} with PGR below 50, {good} above 90); {side} {level:.2} \
             are {of_bad:.0} % of the former and {of_good:.0} % of the latter."
        )
    }
}

/// The level of doubt beyond which there is the most of bad and the least of good translations; and the
/// parts of both that are beyond. It lies half-way between two clients.
fn level(pgr: &[f64], doubt: &[f64]) -> (f64, [f64; 2]) {
    let mut found: Vec<f64> = doubt.to_vec();
    found.sort_by(f64::total_cmp);
    found.dedup();
    let beyond = |level: f64| -> [f64; 2] {
        [|pgr: f64| pgr < BAD, |pgr: f64| pgr > GOOD].map(|is: fn(f64) -> bool| {
            let of: Vec<f64> = pgr.iter().zip(doubt).filter(|(pgr, _)| is(**pgr)).map(|(_, x)| *x).collect();
            of.iter().filter(|x| **x > level).count() as f64 / of.len().max(1) as f64
        })
    };
    let levels = found.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
    let tried = levels.map(|level| (level, beyond(level)));
    let gain = |[bad, good]: [f64; 2]| bad - good;
    let best = tried.max_by(|(_, a), (_, b)| gain(*a).total_cmp(&gain(*b)));
    best.unwrap_or_else(|| (found.first().copied().unwrap_or(0.0), [0.0; 2]))
}

/// A number of a table; where nobody recovers anything, since there is no gap, PGR is none.
pub(crate) fn number(x: f64) -> String {
    if x.is_finite() { format!("{x:.1}") } else { "–".into() }
}

/// An interval of a table.
pub(crate) fn interval([low, high]: [f64; 2]) -> String {
    format!("[{}, {}]", number(low), number(high))
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
    fn the_level_of_a_warning_separates_best() {
        let pgr = [10.0, 40.0, 70.0, 95.0, 100.0, f64::NAN];
        assert_eq!(level(&pgr, &[5.0, 4.0, 9.0, 1.0, 2.0, 7.0]), (3.0, [1.0, 0.0]));
        assert_eq!(level(&pgr, &[5.0, 1.0, 9.0, 4.0, 2.0, 7.0]), (4.5, [0.5, 0.0]));
        assert_eq!(level(&pgr, &[1.0; 6]), (1.0, [0.0, 0.0]));
        let name = "LLM + products".to_string();
        let known = |values: &[f64]| values.iter().map(|x| Some(*x)).collect::<Vec<_>>();
        let mut signals = Signals {
            name,
            pgr: pgr.to_vec(),
            agreement: known(&[0.0, 0.06, 0.3, 0.4, 0.5, 0.2]),
            distance: vec![Some(1.0), None, None, None, None, None],
        };
        let [warning] = &signals.warnings()[..] else { panic!("a distance is missing") };
        assert_eq!((warning.auc, warning.counts, warning.beyond), (1.0, [2, 2], [1.0, 0.0]));
        assert!((warning.level - 0.13).abs() < 1e-9, "{}", warning.text());
        assert!(warning.text().ends_with("below 0.13 are 100 % of the former and 0 % of the latter."));
        signals.pgr = vec![95.0; 6];
        assert!(signals.warnings().is_empty());
    }

    #[test]
    fn a_signal_that_separates_has_an_auc_of_one() {
        let pgr = [10.0, 40.0, 70.0, 95.0, 100.0];
        assert_eq!(auc(&pgr, &[5.0, 4.0, 9.0, 1.0, 2.0]), 1.0);
        assert_eq!(auc(&pgr, &[1.0, 1.0, 9.0, 1.0, 1.0]), 0.5);
        assert_eq!(auc(&pgr, &[1.0, 4.0, 9.0, 2.0, 3.0]), 0.5);
    }
}
