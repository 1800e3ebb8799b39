//! [`Statistics`]: what all examples are like as tokens, and what would go wrong with them.

use anyhow::Result;
use gradtx_runtime::data::{DataSummary, Dataset, Record};
use gradtx_train::prompts::Prompts;
use serde::Serialize;
use std::fmt;

/// What all examples are like.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Statistics {
    /// Lengths and labels of the examples as long as they are.
    #[serde(flatten)]
    summary: DataSummary,
    /// Tokens that are kept of an example.
    limit: usize,
    /// What sets that.
    limit_set_by: &'static str,
    /// Examples that are longer, and where the first one stands.
    over_limit: Found,
    /// Labels that are cut off.
    lost_labels: usize,
    /// The same as a share of all labels.
    lost_share: f64,
    /// The share that may be lost.
    max_lost_labels: f64,
    /// Examples of which no label is left: training refuses them.
    without_labels: Found,
    /// Examples with tokens of what the tokenizer does not know.
    with_unknown: Found,
    /// Examples with ids that the model has no row for: training refuses them.
    outside_vocabulary: Found,
    /// Examples that have no token, within the limit, at which generation stops.
    without_end: Found,
}

/// How many examples, and the first of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Found {
    count: usize,
    first: Option<String>,
}

impl Found {
    fn add(&mut self, record: &Record) {
        self.count += 1;
        self.first.get_or_insert_with(|| record.origin.to_string());
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.first {
            None => write!(f, "none"),
            Some(first) => write!(f, "{} (first: {first})", self.count),
        }
    }
}

impl Statistics {
    /// Of all records.
    pub(super) fn of(records: &[Record], prompts: &Prompts, max_lost: f64, threads: usize) -> Result<Self> {
        let data = prompts.uncut(records, threads)?;
        let (limit, limit_set_by) = prompts.limit();
        let mut found = Self { limit, limit_set_by, max_lost_labels: max_lost, ..Self::default() };
        found.count(records, &data, prompts);
        found.summary = data.summary;
        Ok(found)
    }

    fn count(&mut self, records: &[Record], data: &Dataset, prompts: &Prompts) {
        let (unknown, stops) = (prompts.tokenizer.unknown(), prompts.check.stops());
        let mut labels = 0;
        for (record, example) in records.iter().zip(&data.examples) {
            let kept = self.limit.min(example.tokens.len());
            let lost = example.trained[kept..].iter().filter(|&&is| is).count();
            labels += example.labels();
            self.lost_labels += lost;
            let note = |is: bool, found: &mut Found| {
                if is {
                    found.add(record);
                }
            };
            note(kept < example.tokens.len(), &mut self.over_limit);
            note(lost == example.labels(), &mut self.without_labels);
            note(example.tokens.iter().any(|&id| Some(id) == unknown), &mut self.with_unknown);
            note(
                example.tokens.iter().any(|&id| id as usize >= prompts.vocabulary()),
                &mut self.outside_vocabulary,
            );
            let mut learned = example.tokens[..kept].iter().zip(&example.trained);
            note(!learned.any(|(id, trained)| *trained && stops.contains(id)), &mut self.without_end);
        }
        self.lost_share = self.lost_labels as f64 / labels.max(1) as f64;
    }

    /// Name and value of every line.
    pub(super) fn rows(&self) -> Vec<(&'static str, String)> {
        let DataSummary {
            examples,
            tokens,
            trained,
            shortest,
            median,
            p95,
            longest,
            unknown,
            straddling,
            ..
        } = self.summary;
        let share = 100.0 * self.summary.trained_share();
        let (lost, most) = (100.0 * self.lost_share, 100.0 * self.max_lost_labels);
        let mut rows = vec![
            ("examples", examples.to_string()),
            ("tokens", format!("{tokens}, {shortest} to {longest}, median {median}, 95 % at most {p95}")),
            ("trained on", format!("{trained} tokens, {share:.1} %")),
            ("limit", format!("{} tokens ({})", self.limit, self.limit_set_by)),
            ("over the limit", self.over_limit.to_string()),
            (
                "labels lost",
                format!(
                    "{} of {trained}, {lost:.1} %; at most {most:.1} % may be (data.max_lost_labels)",
                    self.lost_labels
                ),
            ),
            ("no label left", self.without_labels.to_string()),
            ("no end token", self.without_end.to_string()),
            ("unknown tokens", format!("{unknown}, examples: {}", self.with_unknown)),
            ("outside vocabulary", self.outside_vocabulary.to_string()),
        ];
        if straddling > 0 {
            rows.push(("token across prompt and answer", straddling.to_string()));
        }
        rows
    }

    /// What keeps training from using these examples, a line each.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = vec![];
        let mut refuse = |found: &Found, what: &str| {
            if found.count > 0 {
                problems.push(format!("training refuses examples {what}: {found}"));
            }
        };
        refuse(&self.without_labels, "whose answers are cut off");
        refuse(&self.outside_vocabulary, "with tokens that the model has no row for");
        if self.lost_share > self.max_lost_labels {
            problems.push(format!(
                "training refuses to lose {:.1} % of the labels: see data.max_length and data.max_lost_labels",
                100.0 * self.lost_share
            ));
        }
        problems
    }
}

impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nall examples")?;
        self.rows().iter().try_for_each(|(name, value)| writeln!(f, "  {name:19} {value}"))?;
        self.problems().iter().try_for_each(|problem| writeln!(f, "PROBLEM  {problem}"))
    }
}
