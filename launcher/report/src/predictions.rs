//! What the models answered, example by example.
//!
//! In: the `predictions.jsonl` of every evaluation. Out: [`Predictions`]: for each file of test
//! data its examples with the answers of all models beside each other, and where an answer differs
//! from the reference. These are private texts: they go to a page of their own, and only when it is
//! asked for.

mod diff;

pub use diff::{Change, Piece, changes};

use crate::source::{Source, run_name};
use crate::table::{Entry, SCORE_FILE, Scored, natural};
use gradtx_pipeline::stages::evaluate::PREDICTIONS_FILE;
use gradtx_runtime::data::Metric;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// The answers to all test data.
#[derive(Debug)]
pub struct Predictions {
    /// Name of the run directory.
    pub run: String,
    /// One for each file of test data.
    pub sets: Vec<TestSet>,
    /// Files that could not be used, and why.
    pub notes: Vec<String>,
}

/// The answers to one file of test data.
#[derive(Debug)]
pub struct TestSet {
    /// A short name of the file.
    pub name: String,
    /// What was measured.
    pub metric: Metric,
    /// Examples in the file.
    pub all: usize,
    /// Models, in the order of the table.
    pub models: Vec<Entry>,
    /// Those of the examples that are shown, in the order of the file.
    pub examples: Vec<Example>,
}

/// One example.
#[derive(Debug)]
pub struct Example {
    /// Its line in the file.
    pub line: u64,
    /// The text that the models were given; older evaluations did not keep it.
    pub prompt: Option<String>,
    /// The answer that the data has.
    pub reference: String,
    /// What each model answered; none where it was not asked.
    pub answers: Vec<Option<Answer>>,
}

/// What one model answered: a line of predictions.jsonl.
#[derive(Clone, Debug, Deserialize)]
pub struct Answer {
    line: u64,
    #[serde(default)]
    prompt: Option<String>,
    /// The answer.
    pub prediction: String,
    reference: String,
    /// Exact match.
    pub right: bool,
    /// ROUGE-1 F1, from 0 to 1.
    pub rouge1: f64,
    /// It ended by itself; otherwise it reached the limit.
    pub ended: bool,
}

impl Example {
    /// The example at this place of each model's answers.
    fn of(at: usize, answers: &[Vec<Answer>]) -> Option<Self> {
        let answers: Vec<Option<Answer>> = answers.iter().map(|of| of.get(at).cloned()).collect();
        let Answer { line, reference, .. } = answers.iter().flatten().next()?.clone();
        let prompt = answers.iter().flatten().find_map(|answer| answer.prompt.clone());
        Some(Self { line, prompt, reference, answers })
    }

    /// Whether some models are right and others are wrong.
    pub(crate) fn is_disputed(&self) -> bool {
        let verdicts: BTreeSet<bool> = self.answers.iter().flatten().map(|answer| answer.right).collect();
        verdicts.len() == 2
    }
}

impl Predictions {
    /// At most so many examples of each file of test data, evenly spaced.
    pub fn of(source: &mut Source, most: usize) -> Self {
        let before = source.notes.len();
        let mut sets: BTreeMap<String, Vec<Scored>> = BTreeMap::new();
        for scored in source.scores() {
            sets.entry(scored.data.clone()).or_default().push(scored);
        }
        let mut sets: Vec<TestSet> =
            sets.into_values().filter_map(|scored| TestSet::of(source, scored, most)).collect();
        sets.sort_by_cached_key(|set| natural(&set.name));
        Self { run: run_name(&source.run), sets, notes: source.notes.split_off(before) }
    }
}

impl TestSet {
    /// The answers of models to the same data.
    fn of(source: &mut Source, mut scored: Vec<Scored>, most: usize) -> Option<Self> {
        scored.sort_by_key(|scored| scored.entry.order());
        // The first by path counts, as in the table.
        scored.dedup_by_key(|scored| scored.entry);
        let mut models = vec![];
        // The same data gives the same lines in the same order.
        let mut answers: Vec<Vec<Answer>> = vec![];
        for scored in &scored {
            let path = scored.path.with_file_name(PREDICTIONS_FILE);
            let lines = source.lines(&path);
            if lines.is_empty() {
                source.note(&path, format!("there are no predictions beside its {SCORE_FILE}"));
                continue;
            }
            match lines.into_iter().map(serde_json::from_value).collect::<Result<Vec<Answer>, _>>() {
                Err(error) => source.note(&path, format!("not predictions: {error}")),
                Ok(found) => {
                    models.push(scored.entry);
                    answers.push(found);
                }
            }
        }
        let first = scored.first()?;
        let all = answers.iter().map(Vec::len).max().unwrap_or(0);
        let shown = all.min(most);
        let example = |i: usize| Example::of(i * all / shown, &answers);
        Some(Self {
            name: first.data_name.clone(),
            metric: first.metric,
            all,
            models,
            examples: (0..shown).filter_map(example).collect(),
        })
    }
}
