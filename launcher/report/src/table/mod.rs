//! The table of the pipeline's result: what every model scores, and how much of the gap
//! between the client's small model and the best large one a translation recovers.
//!
//! In: the `score.json` files that `evaluate` wrote, found below some directories
//! ([`collect`]), or scores that are at hand ([`Scored`]). Out: [`Table`], one for each
//! metric. Scores of the same test data stand in the same column; a column is a client.
//!
//! With P_S the fine-tuned TinyLM's mean score, P_T that of the LLM fine-tuned on the
//! private data itself, and P a translated LLM's, `PGR = 100 · (P − P_S) / (P_T − P_S)`.
//! Its interval is paired: a client that is easy for one model is easy for the others.

mod collect;
mod entry;

pub use collect::{collect, find};
pub(crate) use entry::display_name;
pub use entry::{Entry, Tuned};

use comfy_table::{CellAlignment, presets};
use gradtx_pipeline::score::mean_with_interval;
use gradtx_run::role::Role;
use gradtx_run::text::counted;
use gradtx_runtime::data::Metric;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Name of the file that `evaluate` writes.
pub const SCORE_FILE: &str = "score.json";

/// One score of one model on one file of test data.
#[derive(Clone, Debug)]
pub struct Scored {
    /// The model.
    pub entry: Entry,
    /// What was measured.
    pub metric: Metric,
    /// From 0 to 1; not finite where nothing could be measured.
    pub score: f64,
    /// Examples.
    pub examples: usize,
    /// Checksum of the test data.
    pub data: String,
    /// A short name of it, such as `client-1/test`.
    pub data_name: String,
    /// Where the score was found.
    pub path: PathBuf,
}

/// Test data: a column of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TestData {
    /// A short name of the file.
    pub name: String,
    /// Checksum of the file.
    pub checksum: String,
    /// Examples in it.
    pub examples: usize,
}

/// One model: a row of the table. All scores are in percent.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What a reader calls the model.
    pub name: String,
    #[serde(flatten)]
    pub(crate) entry: Entry,
    /// One score for each test data; `null` where there is none.
    pub scores: Vec<Option<f64>>,
    /// Mean of the scores that there are.
    pub mean: Option<f64>,
    /// Half the width of the 95 % confidence interval over clients.
    pub interval: Option<f64>,
    /// Performance gap recovered, in percent, over the clients that have P_S and P_T too.
    pub pgr: Option<f64>,
    /// Half the width of its 95 % confidence interval, paired over these clients.
    pub pgr_interval: Option<f64>,
}

/// How two rows differ.
#[derive(Clone, Copy, Debug)]
pub struct Difference {
    /// Mean of one less the mean of the other, in points.
    pub mean: f64,
    /// Half the width of its 95 % confidence interval.
    pub interval: f64,
}

/// All models on all test data of one metric.
#[derive(Clone, Debug, Serialize)]
pub struct Table {
    /// What the scores measure.
    pub metric: Metric,
    /// Columns.
    pub data: Vec<TestData>,
    /// Test examples of all columns.
    pub examples: usize,
    /// Rows, from what a client has to what only the provider could have.
    pub rows: Vec<Row>,
}

impl Table {
    /// One table for each metric; and scores that stand aside because another one is of
    /// the same model and data (the first by path counts).
    pub fn of(scored: &[Scored]) -> (Vec<Self>, Vec<PathBuf>) {
        let mut metrics: BTreeMap<Metric, Vec<&Scored>> = BTreeMap::new();
        scored.iter().for_each(|s| metrics.entry(s.metric).or_default().push(s));
        let mut aside = vec![];
        let tables = metrics.into_iter().map(|(metric, scored)| Self::one(metric, scored, &mut aside));
        let mut tables: Vec<Self> = tables.collect();
        // The one with more behind it first.
        tables.sort_by_key(|table| std::cmp::Reverse(table.examples));
        (tables, aside)
    }

    fn one(metric: Metric, mut scored: Vec<&Scored>, aside: &mut Vec<PathBuf>) -> Self {
        scored.sort_by(|a, b| a.path.cmp(&b.path));
        let mut data: Vec<TestData> = vec![];
        for s in &scored {
            if data.iter().all(|d| d.checksum != s.data) {
                let (name, checksum) = (s.data_name.clone(), s.data.clone());
                data.push(TestData { name, checksum, examples: s.examples });
            }
        }
        data.sort_by_cached_key(|d| natural(&d.name));
        let mut rows: Vec<Row> = vec![];
        for s in scored {
            let column = data.iter().position(|d| d.checksum == s.data).expect("every score has its column");
            let at = rows.iter().position(|row| row.entry == s.entry).unwrap_or_else(|| {
                rows.push(Row::new(s.entry, data.len()));
                rows.len() - 1
            });
            match &mut rows[at].scores[column] {
                Some(_) => aside.push(s.path.clone()),
                empty => *empty = Some(100.0 * s.score).filter(|x| x.is_finite()),
            }
        }
        rows.sort_by_key(|row| row.entry.order());
        let mut table = Self { metric, examples: data.iter().map(|d| d.examples).sum(), data, rows };
        table.compute();
        table
    }

    fn compute(&mut self) {
        let ends = [Role::Tiny, Role::Llm].map(|role| self.scores(Entry::Finetuned(role)));
        for row in &mut self.rows {
            let there: Vec<f64> = row.scores.iter().flatten().copied().collect();
            if !there.is_empty() {
                let (mean, interval) = mean_with_interval(&there);
                (row.mean, row.interval) = (Some(mean), interval);
            }
            if let (true, [Some(student), Some(teacher)]) = (row.is_translated(), &ends) {
                (row.pgr, row.pgr_interval) = pgr(&row.scores, student, teacher);
            }
        }
    }

    fn scores(&self, entry: Entry) -> Option<Vec<Option<f64>>> {
        self.row(entry).map(|row| row.scores.clone())
    }

    /// The row of a model.
    pub fn row(&self, entry: Entry) -> Option<&Row> {
        self.rows.iter().find(|row| row.entry == entry)
    }

    /// Number of clients that both models have a score of.
    pub(crate) fn clients_of_both(&self, a: &Row, b: &Row) -> usize {
        a.scores.iter().zip(&b.scores).filter(|(a, b)| a.is_some() && b.is_some()).count()
    }

    /// `a` less `b`: over the clients that both have, paired; with one client, over its
    /// examples, with the largest variance that scores from 0 to 1 of these means can have.
    pub fn difference(&self, a: &Row, b: &Row) -> Option<Difference> {
        let columns = a.scores.iter().zip(&b.scores).zip(&self.data);
        let both: Vec<(f64, f64, usize)> =
            columns.filter_map(|((a, b), data)| Some(((*a)?, (*b)?, data.examples))).collect();
        let differences: Vec<f64> = both.iter().map(|(a, b, _)| a - b).collect();
        match both[..] {
            [] => None,
            [(a, b, examples)] => {
                let spread = |percent: f64| percent * (100.0 - percent);
                let interval = 1.96 * ((spread(a) + spread(b)) / examples.max(1) as f64).max(0.0).sqrt();
                Some(Difference { mean: a - b, interval })
            }
            _ => {
                let (mean, interval) = mean_with_interval(&differences);
                interval.map(|interval| Difference { mean, interval })
            }
        }
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_preset(presets::ASCII_MARKDOWN);
        table.set_header(["model", &format!("{} %", self.metric.label()), "± 95 %", "PGR", "by client"]);
        let one_digit = |value: Option<f64>| value.map_or(String::new(), |x| format!("{x:.1}"));
        for row in &self.rows {
            let clients: Vec<String> =
                row.scores.iter().map(|s| s.map_or("–".into(), |s| format!("{s:.1}"))).collect();
            table.add_row([
                row.name.clone(),
                one_digit(row.mean),
                one_digit(row.interval),
                one_digit(row.pgr),
                clients.join("  "),
            ]);
        }
        for column in 1..=3 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        format!(
            "{table}\n{} of {}; ± is the 95 % confidence interval over clients; \
             PGR = 100 · (score − P_S) / (P_T − P_S).",
            counted(self.examples, "test example"),
            counted(self.data.len(), "client")
        )
    }
}

impl Row {
    /// Whether a translator has a part in the model.
    pub(crate) fn is_translated(&self) -> bool {
        matches!(self.entry, Entry::Translated { .. } | Entry::Refined(_))
    }

    fn new(entry: Entry, columns: usize) -> Self {
        Self {
            name: entry.label(),
            entry,
            scores: vec![None; columns],
            mean: None,
            interval: None,
            pgr: None,
            pgr_interval: None,
        }
    }
}

/// PGR over the clients with all three scores, and half its 95 % interval: a ratio of two
/// paired means, linearised at the ratio itself. None where there is no gap to recover.
fn pgr(
    scores: &[Option<f64>],
    student: &[Option<f64>],
    teacher: &[Option<f64>],
) -> (Option<f64>, Option<f64>) {
    let columns = scores.iter().zip(student).zip(teacher);
    let pairs: Vec<(f64, f64)> =
        columns.filter_map(|((p, s), t)| Some(((*p)? - (*s)?, (*t)? - (*s)?))).collect();
    let mean = |of: fn(&(f64, f64)) -> f64| pairs.iter().map(of).sum::<f64>() / pairs.len() as f64;
    let (recovered, gap) = (mean(|p| p.0), mean(|p| p.1));
    // No pairs give NaN, which is no gap either.
    if gap.is_nan() || gap <= 0.0 {
        return (None, None);
    }
    let ratio = recovered / gap;
    let residuals: Vec<f64> = pairs.iter().map(|(d, g)| 100.0 * (d - ratio * g) / gap).collect();
    (Some(100.0 * ratio), mean_with_interval(&residuals).1)
}

/// Text and numbers of a name, so that client-10 comes after client-9.
pub fn natural(name: &str) -> Vec<(String, u64)> {
    let mut parts = vec![];
    let mut rest = name;
    while !rest.is_empty() {
        let text = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let digits = rest[text..].find(|c: char| !c.is_ascii_digit()).map_or(rest.len(), |n| text + n);
        parts.push((rest[..text].to_string(), rest[text..digits].parse().unwrap_or(0)));
        rest = &rest[digits..];
    }
    parts
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use gradtx_train::baselines::Method;

    pub(crate) fn scored(entry: Entry, client: usize, score: f64) -> Scored {
        Scored {
            entry,
            metric: Metric::ExactMatch,
            score,
            examples: 100,
            data: format!("sum-{client}"),
            data_name: format!("client-{client}/test"),
            path: PathBuf::from(format!("{}/{client}/score.json", entry.label())),
        }
    }

    /// Scores of these models (P_S, P_T, then others), each a list by client.
    pub(crate) fn world(rows: &[(Entry, &[f64])]) -> Vec<Scored> {
        let of = |&(entry, scores): &(Entry, &[f64])| {
            scores.iter().enumerate().map(move |(i, &s)| scored(entry, i + 1, s)).collect::<Vec<_>>()
        };
        rows.iter().flat_map(of).collect()
    }

    const S: Entry = Entry::Finetuned(Role::Tiny);
    const T: Entry = Entry::Finetuned(Role::Llm);

    #[test]
    fn pgr_by_hand() {
        let all = world(&[
            (T, &[0.9, 0.8, 1.0]),
            (S, &[0.5, 0.4, 0.3]),
            (Entry::GRAD_TRANSFORMER, &[0.8, 0.7, 0.9]),
        ]);
        let (tables, aside) = Table::of(&all);
        assert!(aside.is_empty() && tables.len() == 1);
        let table = &tables[0];
        let names: Vec<&str> = table.rows.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["TinyLM fine-tuned (P_S)", "LLM + Grad-Transformer", "LLM fine-tuned (P_T)"]);
        let row = table.row(Entry::GRAD_TRANSFORMER).unwrap();
        // Recovered 30, 30, 60 of gaps 40, 40, 70: 40 of 50 in the mean.
        assert!((row.pgr.unwrap() - 80.0).abs() < 1e-9);
        // Residuals d − 0.8 g = −2, −2, 4; over the gap of 50: −4, −4, 8 percent.
        let expected = 4.303 * ((16.0 + 16.0 + 64.0) / 2.0 / 3.0f64).sqrt();
        assert!((row.pgr_interval.unwrap() - expected).abs() < 1e-9);
        assert!((row.mean.unwrap() - 80.0).abs() < 1e-9);
        assert_eq!((table.examples, table.data.len()), (300, 3));
        assert!(table.row(S).unwrap().pgr.is_none());
    }

    #[test]
    fn pgr_uses_only_clients_that_have_all_three() {
        let all =
            world(&[(S, &[0.5, 0.5, 0.5]), (T, &[1.0, 1.0]), (Entry::GRAD_TRANSFORMER, &[0.75, 0.75, 0.0])]);
        let table = &Table::of(&all).0[0];
        let row = table.row(Entry::GRAD_TRANSFORMER).unwrap();
        assert_eq!((row.pgr, row.pgr_interval), (Some(50.0), Some(0.0)));
        assert_eq!(row.scores.len(), 3);
        assert_eq!(table.row(T).unwrap().scores[2], None);
        assert!(table.text().contains('–'));
        // No gap, no PGR.
        let none = world(&[(S, &[0.5, 0.6]), (T, &[0.5, 0.5]), (Entry::GRAD_TRANSFORMER, &[0.7, 0.7])]);
        assert_eq!(Table::of(&none).0[0].row(Entry::GRAD_TRANSFORMER).unwrap().pgr, None);
        assert!(Table::of(&[]).0.is_empty());
    }

    #[test]
    fn differences_are_paired_over_clients_or_examples() {
        let mean = Entry::translated(Method::named("mean").unwrap());
        let all = world(&[(Entry::GRAD_TRANSFORMER, &[0.9, 0.5, 0.1]), (mean, &[0.8, 0.4, 0.0])]);
        let table = &Table::of(&all).0[0];
        let of = |table: &Table| {
            table.difference(table.row(Entry::GRAD_TRANSFORMER).unwrap(), table.row(mean).unwrap())
        };
        let found = of(table).unwrap();
        assert!((found.mean - 10.0).abs() < 1e-9 && found.interval < 1e-9);
        let all = world(&[(Entry::GRAD_TRANSFORMER, &[0.9]), (mean, &[0.8])]);
        let found = of(&Table::of(&all).0[0]).unwrap();
        assert!((found.interval - 196.0 * ((0.09 + 0.16) / 100.0f64).sqrt()).abs() < 1e-9);
    }

    #[test]
    fn second_scores_of_model_and_data_stand_aside() {
        let mut second = scored(S, 1, 0.9);
        second.path = PathBuf::from("zzz/score.json");
        let (tables, aside) = Table::of(&[second, scored(S, 1, 0.25), scored(T, 1, f64::NAN)]);
        assert_eq!(aside, [PathBuf::from("zzz/score.json")]);
        assert_eq!(tables[0].row(S).unwrap().scores, [Some(25.0)]);
        assert_eq!(tables[0].row(T).unwrap().mean, None);
        assert!(serde_json::to_string(&tables).unwrap().contains("\"mean\":null"));
    }

    #[test]
    fn columns_are_in_the_order_of_people() {
        let (tables, _) = Table::of(&[scored(S, 10, 0.1), scored(S, 9, 0.2)]);
        assert_eq!(tables[0].data[0].name, "client-9/test");
    }
}
