//! The page of a report.
//!
//! In: a [`Report`]. Out: its text. Light and dark follow the reader's system, paper is always
//! light; wide tables scroll on a phone, with their first column in place.

use super::environment::render;
use super::tables::{self, short};
use super::translators;
use super::view::{Block, Entry, Finding, Part};
use crate::figures::{self, Figure};
use crate::headline::{Verdict, count, grouped, number};
use crate::source::Model;
use crate::table::{Entry as TableEntry, Row, Tuned};
use crate::{Report, SCHEMA, Scores, svg};
use anyhow::Result;
use gradtx_run::role::Role;
use serde::Serialize;
use std::fmt::Write as _;

/// What the template shows.
#[derive(Serialize)]
struct View<'a> {
    title: &'a str,
    kind: &'static str,
    contents: Vec<Entry>,
    facts: Vec<Fact>,
    lead: &'a str,
    conclusion: Conclusion,
    tiles: Vec<Tile>,
    missing: &'a [String],
    parts: Vec<Part>,
    notes: &'a [String],
    schema: u32,
}

/// A fact about the run, in a few words.
#[derive(Serialize)]
struct Fact {
    label: &'static str,
    value: String,
    note: String,
}

#[derive(Default, Serialize)]
struct Conclusion {
    text: String,
    class: &'static str,
}

/// A number that is seen first, in percent.
#[derive(Serialize)]
struct Tile {
    class: &'static str,
    what: String,
    value: String,
    half: Option<String>,
    note: String,
}

/// The page.
///
/// # Errors
/// If a template cannot be filled in, which is a bug.
pub fn page(report: &Report) -> Result<String> {
    let first = report.scores.first();
    let parts: Vec<Part> = results(&report.scores)
        .chain([
            fine_tuning(report),
            translator(report),
            tuples(report),
            super::updates::part(report),
            translators::cross_validation(report),
            translators::refinements(report),
            tables::rows(report),
            times(report),
            provenance(report),
        ])
        .flatten()
        .collect();
    let mut contents = Part::contents(&parts);
    if !report.notes.is_empty() {
        contents.push(Entry { id: "not-used".into(), title: "Not used".into() });
    }
    let view = View {
        title: &report.run.name,
        kind: "report",
        contents,
        facts: facts(report),
        lead: first.map_or("This run has no scores yet.", Scores::text),
        conclusion: first.map(conclusion).unwrap_or_default(),
        tiles: first.map(tiles).unwrap_or_default(),
        missing: &report.missing,
        parts,
        notes: &report.notes,
        schema: SCHEMA,
    };
    render("report.html", &view)
}

fn facts(report: &Report) -> Vec<Fact> {
    let run = &report.run;
    let fact = |label, value: String| Fact { label, value, note: String::new() };
    let mut facts: Vec<Fact> = [("TinyLM", &run.tiny), ("LLM", &run.llm)]
        .into_iter()
        .filter_map(|(l, m)| model_fact(l, m))
        .collect();
    facts.extend(run.seed.map(|seed| fact("seed", seed.to_string())));
    if !run.versions.is_empty() {
        facts.push(fact("gradtx", run.versions.join(", ")));
    }
    let dates = &report.times.stages;
    if let (Some(first), Some(last)) =
        (dates.iter().map(|d| &d.first).min(), dates.iter().map(|d| &d.last).max())
    {
        let (from, to) = (&first[..10.min(first.len())], &last[..10.min(last.len())]);
        facts.push(fact("", if from == to { from.into() } else { format!("{from} to {to}") }));
    }
    facts
}

fn model_fact(label: &'static str, model: &Model) -> Option<Fact> {
    let name = model.name.as_deref().or(model.fingerprint.as_deref().map(short))?;
    let mut size: Vec<String> = vec![];
    size.extend(model.family.clone());
    size.extend(model.layers.map(|n| count(n as usize, "layer")));
    size.extend(model.hidden.map(|n| format!("width {}", grouped(n))));
    let note = if size.is_empty() { String::new() } else { format!(" ({})", size.join(", ")) };
    Some(Fact { label, value: name.into(), note })
}

fn conclusion(scores: &Scores) -> Conclusion {
    if let Some(offsite) = scores.offsite_alone() {
        let class = if offsite.warnings.is_empty() { "" } else { " shows_nothing" };
        return Conclusion { text: offsite.warnings.join(" "), class };
    }
    let headline = &scores.headline;
    let shows_little =
        headline.findings.iter().any(|f| matches!(f.verdict, Verdict::ShowsNothing | Verdict::SaysLittle));
    Conclusion { text: headline.conclusion.clone(), class: if shows_little { " shows_nothing" } else { "" } }
}

fn tiles(scores: &Scores) -> Vec<Tile> {
    const GRAD: TableEntry = TableEntry::GRAD_TRANSFORMER;
    let (headline, table) = (&scores.headline, &scores.table);
    let text = |value: Option<f64>| value.map_or("–".into(), number);
    let note = format!("{} of {}", count(table.examples, "test example"), count(headline.clients, "client"));
    let (what, value, half, rows) = match scores.offsite_alone() {
        Some(offsite) => {
            let rows = [
                ("student", "emulator", TableEntry::Emulator(Tuned::Edge), "its edge fine-tuned"),
                ("grad", "plugged in", TableEntry::PluggedIn, "the LLM with this edge"),
                ("teacher", "LLM", TableEntry::Finetuned(Role::Llm), "all layers fine-tuned"),
            ];
            ("privacy gap, in points", offsite.privacy_gap, offsite.privacy_gap_interval, rows)
        }
        None => {
            let rows = [
                ("student", "P_S", TableEntry::Finetuned(Role::Tiny), "TinyLM fine-tuned"),
                ("grad", "P", GRAD, "LLM + Grad-Transformer"),
                ("teacher", "P_T", TableEntry::Finetuned(Role::Llm), "LLM fine-tuned"),
            ];
            ("PGR of the Grad-Transformer", headline.pgr, headline.pgr_interval, rows)
        }
    };
    let first = Tile { class: "grad", what: what.into(), value: text(value), half: half.map(number), note };
    let unit = table.metric.label();
    let of_row = |(class, what, entry, note): (_, &str, _, &str)| {
        let mean = table.row(entry).and_then(|row: &Row| row.mean);
        Tile { class, what: format!("{what}, {unit}"), value: text(mean), half: None, note: note.into() }
    };
    std::iter::once(first).chain(rows.map(of_row)).collect()
}

/// A part for every metric.
fn results(scores: &[Scores]) -> impl Iterator<Item = Option<Part>> {
    scores.iter().enumerate().map(|(i, scores)| {
        let (title, intro) = match i {
            0 => (
                "Result".into(),
                match scores.offsite_alone() {
                    Some(_) => "What every model scores on the clients' test data.".into(),
                    None => "What every model scores on the clients' test data, and what the sceptic's translators \
                             and the random student beside the Grad-Transformer say about it."
                        .into(),
                },
            ),
            _ => (
                format!("Result by {}", scores.table.metric.label()),
                format!("{} {}", scores.text(), conclusion(scores).text),
            ),
        };
        let (figure, findings) = (figures::gap(&format!("gap-{i}"), scores), findings(scores));
        let blocks =
            vec![Some(Block::Findings { figure, findings }), Block::table(tables::scores(scores))];
        Part::of(&format!("result-{i}"), &title, intro, blocks)
    })
}

/// What follows from the rows beside the Grad-Transformer; those without a score in one finding.
fn findings(scores: &Scores) -> Vec<Finding> {
    let headline = &scores.headline;
    let (unknown, known): (Vec<_>, Vec<_>) =
        headline.findings.iter().partition(|finding| finding.verdict == Verdict::Unknown);
    let shown = |finding: &crate::headline::Finding| {
        let (class, title) = verdict(finding.verdict);
        Finding { class, title, text: finding.text.clone() }
    };
    let mut findings: Vec<Finding> = known.into_iter().map(shown).collect();
    let names: Vec<&str> =
        unknown.iter().map(|finding| finding.text.split(": ").next().unwrap_or_default()).collect();
    if !names.is_empty() {
        let (class, title) = verdict(Verdict::Unknown);
        let text = format!("No score to compare with: {}.", names.join(", "));
        findings.push(Finding { class, title, text });
    }
    findings
}

fn verdict(verdict: Verdict) -> (&'static str, &'static str) {
    match verdict {
        Verdict::Supports => ("supports", "Speaks for the Grad-Transformer"),
        Verdict::SaysLittle => ("shows_nothing", "This comparison shows little"),
        Verdict::NotNeeded => ("not_needed", "A simpler translator does as well"),
        Verdict::ShowsNothing => ("shows_nothing", "This comparison shows nothing"),
        Verdict::Unknown => ("unknown", "Not compared"),
    }
}

fn fine_tuning(report: &Report) -> Option<Part> {
    let figures: Vec<Figure> = [
        figures::shadow(&report.shadow),
        figures::clients(&report.clients),
        figures::learning_rates(&report.shadow, &report.clients),
    ]
    .into_iter()
    .flatten()
    .collect();
    let not_finite: usize =
        [&report.shadow.tiny, &report.shadow.llm, &report.clients.tiny, &report.clients.llm]
            .into_iter()
            .flatten()
            .map(|jobs| jobs.not_finite)
            .sum();
    let mut intro =
        "Shadow pairs learn on public data and give the tuples; clients learn on their own data and \
                     send one update."
            .to_string();
    if not_finite > 0 {
        let _ = write!(intro, " {} not a number and left out.", were(not_finite));
    }
    let blocks = vec![Block::figures(figures), Block::table(tables::clients(&report.clients))];
    Part::of("fine-tuning", "Fine-tuning", intro, blocks)
}

fn were(count: usize) -> String {
    if count == 1 { "1 loss was".into() } else { format!("{} losses were", grouped(count as u64)) }
}

fn translator(report: &Report) -> Option<Part> {
    let training = report.translator.as_ref()?;
    let mut intro = format!("{} of training", count(training.steps as usize, "step"));
    if let Some(planned) = training.planned.filter(|&planned| planned != training.steps) {
        let _ = write!(intro, ", of at most {}", grouped(planned));
    }
    let _ = write!(intro, ", {}.", count(training.validations.len(), "validation"));
    if training.not_finite > 0 {
        let _ = write!(intro, " {} not a number and left out.", were(training.not_finite));
    }
    Part::of("translator", "Grad-Transformer", intro, vec![Block::figures(figures::translator(training))])
}

fn tuples(report: &Report) -> Option<Part> {
    let tuples = report.tuples.as_ref()?;
    let mut intro = format!(
        "{}: {} with {} each.",
        count(tuples.tuples, "tuple"),
        count(tuples.subsets, "shadow subset"),
        count(tuples.snapshots, "snapshot")
    );
    if let Some(agreement) = tuples.agreement {
        let _ = write!(
            intro,
            " A translator can exist only where similar students have similar teachers: over pairs of subsets, \
             the correlation of their students' and their teachers' cosines is {}.",
            svg::fixed(agreement, 2)
        );
    }
    let blocks = vec![Block::table(tables::tuples(tuples)), Block::figures(figures::tuples(tuples))];
    Part::of("updates", "Update vectors", intro, blocks)
}

fn times(report: &Report) -> Option<Part> {
    let blocks = vec![
        Block::table(tables::rates(&report.times)),
        Block::figures(figures::throughput(&report.times)),
        Block::table(tables::dates(&report.times)),
    ];
    Part::of("time", "Time", "As measured on the machine that ran each stage.", blocks)
}

fn provenance(report: &Report) -> Option<Part> {
    let blocks = vec![
        Block::table(tables::models(report)),
        Block::table(tables::assumed(report)),
        Block::table(tables::devices(report)),
        tables::commands(&report.times),
        tables::settings(report),
    ];
    Part::of(
        "provenance",
        "Provenance",
        "What would have to be the same to get the same bytes again.",
        blocks,
    )
}
