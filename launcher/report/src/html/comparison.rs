//! The page of a comparison of runs.
//!
//! In: a [`Comparison`]. Out: its text: what differs between the runs, their scores between P_S and
//! P_T, and what they took.

use super::environment::render;
use super::view::{Block, Cell, Entry, Part, Table};
use crate::comparison::Comparison;
use crate::figures::{self, Figure};
use crate::headline::count;
use crate::svg::significant;
use anyhow::Result;
use gradtx_runtime::data::Metric;
use serde::Serialize;

#[derive(Serialize)]
struct View<'a> {
    title: String,
    kind: &'static str,
    contents: Vec<Entry>,
    lead: String,
    notes: &'a [String],
    parts: Vec<Part>,
}

/// The page.
///
/// # Errors
/// If a template cannot be filled in, which is a bug.
pub fn page(comparison: &Comparison) -> Result<String> {
    let parts: Vec<Part> =
        [scores(comparison), settings(comparison), all(comparison)].into_iter().flatten().collect();
    let view = View {
        title: format!("Comparison of {}", count(comparison.runs.len(), "run")),
        kind: "comparison",
        contents: Part::contents(&parts),
        lead: format!(
            "Settings that differ: {}. All runs together took {} {}, every curation counted once.",
            comparison.settings.len(),
            significant(comparison.rank_hours()),
            comparison.unit()
        ),
        notes: &comparison.notes,
        parts,
    };
    render("comparison.html", &view)
}

/// A figure for every metric.
fn scores(comparison: &Comparison) -> Option<Part> {
    let metrics = [
        (Metric::ExactMatch, "compared-exact"),
        (Metric::Rouge1, "compared-rouge"),
        (Metric::MultipleChoice, "compared-acc"),
        (Metric::MultipleChoiceNorm, "compared-acc-norm"),
    ];
    let figures: Vec<Figure> =
        metrics.into_iter().filter_map(|(metric, id)| figures::compared(id, comparison, metric)).collect();
    Part::of("scores", "Scores", "", vec![Block::figures(figures)])
}

/// The settings that differ, a column for every run.
fn settings(comparison: &Comparison) -> Option<Part> {
    let head = std::iter::once("setting").chain(comparison.runs.iter().map(|run| run.name.as_str()));
    let head: Vec<&str> = head.collect();
    let left: Vec<usize> = (1..head.len()).collect();
    let mut table = Table::new(&head, &left, "");
    for setting in &comparison.settings {
        let values = setting.values.iter().map(|value| Cell::from(value.as_deref().unwrap_or("–")));
        table.push("", std::iter::once(Cell::code(&setting.key)).chain(values).collect());
    }
    let intro = "Settings that are the same in all runs are left out.";
    Part::of("settings", "Settings that differ", intro, vec![Block::table(table)])
}

/// The rows of the terminal and of CSV, without columns in which no run has anything.
fn all(comparison: &Comparison) -> Option<Part> {
    let (head, rows) = (comparison.header(), comparison.rows());
    let is_shown = |column: &usize| *column == 0 || rows.iter().any(|row| !row[*column].is_empty());
    let shown: Vec<usize> = (0..head.len()).filter(is_shown).collect();
    // Run, settings, metric and model are words.
    let words = comparison.settings.len() + 2;
    let left: Vec<usize> = (1..shown.len()).filter(|at| shown[*at] <= words).collect();
    let titles: Vec<&str> = shown.iter().map(|column| head[*column].as_str()).collect();
    let mut table = Table::new(&titles, &left, "");
    for row in &rows {
        table.push("", shown.iter().map(|column| Cell::from(row[*column].as_str())).collect());
    }
    let intro = "A row for every run and model. Curation that several runs share is counted in full in each row, with \
                 their number.";
    Part::of("runs", "Runs", intro, vec![Block::table(table)])
}
