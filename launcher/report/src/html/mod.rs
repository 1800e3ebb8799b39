//! The page: one HTML file that needs nothing else, no network and no script.
//!
//! In: a [`Report`]. Out: its text. Light and dark follow the reader's system, paper is
//! always light; wide tables scroll on a phone. All words are escaped, for names of
//! directories are other people's words.
//!
//! * tables: everything that stands in rows.

mod tables;

use super::figures::{self, Figure};
use super::headline::{Headline, Verdict, count, grouped, number};
use super::source::Model;
use super::svg::escape;
use super::{Report, SCHEMA, Scores};
use crate::table::{Entry, Row};
use gradtx_run::role::Role;
use std::fmt::Write as _;

const STYLE: &str = include_str!("style.css");

/// The page.
pub fn page(report: &Report) -> String {
    let name = escape(&report.run.name);
    let body = [
        header(report),
        results(&report.scores),
        losses(report),
        translator(report),
        tuples(report),
        tables::rows(report),
        tables::times(&report.times),
        tables::settings(report),
        notes(report),
    ];
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\n<meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{name} · gradtx report</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{}{}</main>\n\
         </body>\n</html>\n",
        body.concat(),
        footer()
    )
}

fn footer() -> String {
    format!(
        "<footer>PGR = 100 · (P − P<sub>S</sub>) / (P<sub>T</sub> − P<sub>S</sub>): the part of the gap between the \
         fine-tuned TinyLM (P<sub>S</sub>) and the LLM fine-tuned on the private data (P<sub>T</sub>) that a \
         translated LLM (P) recovers. Intervals are 95 % by Student’s t over clients; that of PGR is paired. The same content is in report.json, \
         schema {SCHEMA}. No text of an example or a prediction is on this page.</footer>\n"
    )
}

fn header(report: &Report) -> String {
    let run = &report.run;
    let mut facts = vec![];
    for (label, model) in [("TinyLM", &run.tiny), ("LLM", &run.llm)] {
        facts.extend(model_fact(label, model));
    }
    facts.extend(run.seed.map(|seed| format!("seed <b>{seed}</b>")));
    if !run.versions.is_empty() {
        facts.push(format!("gradtx <b>{}</b>", escape(&run.versions.join(", "))));
    }
    let dates = &report.times.stages;
    if let (Some(first), Some(last)) =
        (dates.iter().map(|d| &d.first).min(), dates.iter().map(|d| &d.last).max())
    {
        let (from, to) = (&first[..10.min(first.len())], &last[..10.min(last.len())]);
        facts.push(if from == to {
            format!("<b>{from}</b>")
        } else {
            format!("<b>{from}</b> to <b>{to}</b>")
        });
    }
    let facts: String = facts.iter().map(|fact| format!("<li>{fact}</li>")).collect();
    let lead = report.scores.first().map_or("This run has no scores yet.", |s| s.headline.text.as_str());
    let conclusion = report.scores.first().map(|s| conclusion(&s.headline)).unwrap_or_default();
    let tiles = report.scores.first().map(tiles).unwrap_or_default();
    format!(
        "<header>\n<p class=\"eyebrow\">gradtx report</p>\n<h1>{}</h1>\n<ul class=\"facts\">{facts}</ul>\n\
         <p class=\"lead\">{}</p>\n{conclusion}{tiles}{}</header>\n",
        escape(&run.name),
        prose(lead),
        list("Not there yet", &report.missing)
    )
}

fn conclusion(headline: &Headline) -> String {
    if headline.conclusion.is_empty() {
        return String::new();
    }
    let nothing =
        headline.findings.iter().any(|f| matches!(f.verdict, Verdict::ShowsNothing | Verdict::SaysLittle));
    let class = if nothing { "conclusion shows_nothing" } else { "conclusion" };
    format!("<p class=\"{class}\">{}</p>\n", prose(&headline.conclusion))
}

/// Sentences, escaped and set as print sets them: curly apostrophes, subscripts, numbers
/// that stay with their unit, and what stands in backticks as code.
fn prose(text: &str) -> String {
    let escaped = escape(text);
    let parts: Vec<&str> = escaped.split('`').collect();
    let mut out = String::new();
    for (i, part) in parts.iter().enumerate() {
        match (i % 2 == 1, i + 1 < parts.len()) {
            (false, _) => out += part,
            (true, true) => out += &format!("<code>{part}</code>"),
            // A backtick without a second one.
            (true, false) => out += &format!("`{part}"),
        }
    }
    out.replace("&#39;", "’")
        .replace("P_S", "P<sub>S</sub>")
        .replace("P_T", "P<sub>T</sub>")
        .replace(" %", "\u{a0}%")
}

fn model_fact(label: &str, model: &Model) -> Option<String> {
    let name = model.name.as_deref().or(model.fingerprint.as_deref().map(short))?;
    let mut size: Vec<String> = vec![];
    size.extend(model.family.clone());
    size.extend(model.layers.map(|n| count(n as usize, "layer")));
    size.extend(model.hidden.map(|n| format!("width {}", grouped(n))));
    let size = if size.is_empty() { String::new() } else { format!(" ({})", size.join(", ")) };
    Some(format!("{label} <b>{}</b>{}", escape(name), escape(&size)))
}

/// The first characters of a checksum: enough for a reader to distinguish two.
fn short(checksum: &str) -> &str {
    checksum.char_indices().nth(10).map_or(checksum, |(at, _)| &checksum[..at])
}

fn tiles(scores: &Scores) -> String {
    let (headline, table) = (&scores.headline, &scores.table);
    let mut out = "<div class=\"tiles\">\n".to_string();
    let mut tile = |class: &str,
                    what: &str,
                    value: Option<f64>,
                    half: Option<f64>,
                    unit: &str,
                    note: &str| {
        let value = value.map_or("–".into(), number);
        let half = half.map_or(String::new(), |half| format!(" <small>± {}</small>", number(half)));
        let unit = if unit.is_empty() { String::new() } else { format!(" <small>{unit}</small>") };
        let _ = writeln!(
            out,
            "<div class=\"tile {class}\"><div class=\"what\">{}</div><div class=\"number\">{value}{unit}{half}\
             </div><div class=\"note\">{note}</div></div>",
            prose(what)
        );
    };
    let behind =
        format!("{} of {}", count(headline.examples, "test example"), count(headline.clients, "client"));
    tile("grad", "PGR of the Grad-Transformer", headline.pgr, headline.pgr_interval, "", &behind);
    let unit = table.metric.label();
    for (class, what, entry, note) in [
        ("student", "P_S", Entry::Finetuned(Role::Tiny), "TinyLM fine-tuned"),
        ("grad", "P", Entry::GRAD_TRANSFORMER, "LLM + Grad-Transformer"),
        ("teacher", "P_T", Entry::Finetuned(Role::Llm), "LLM fine-tuned"),
    ] {
        let mean = table.row(entry).and_then(|row: &Row| row.mean);
        tile(class, &format!("{what}, {unit}"), mean, None, "%", note);
    }
    out + "</div>\n"
}

fn list(title: &str, items: &[String]) -> String {
    if items.is_empty() {
        return String::new();
    }
    let items: String = items.iter().map(|item| format!("<li>{}</li>", prose(item))).collect();
    format!("<div class=\"callout\"><b>{title}</b><ul>{items}</ul></div>\n")
}

fn notes(report: &Report) -> String {
    if report.notes.is_empty() {
        return String::new();
    }
    format!("<section>\n{}</section>\n", list("What could not be used", &report.notes))
}

/// A part of the page; nothing when it has no content.
fn section(title: &str, intro: &str, content: &str) -> String {
    if content.is_empty() {
        return String::new();
    }
    format!("<section>\n<h2>{title}</h2>\n<p class=\"intro\">{}</p>\n{content}</section>\n", prose(intro))
}

fn figure(figure: &Figure) -> String {
    format!(
        "<figure>\n<h3>{}</h3>\n{}<figcaption>{}</figcaption>\n</figure>\n",
        escape(&figure.title),
        figure.svg,
        prose(&figure.caption)
    )
}

fn grid(all: &[Figure]) -> String {
    if all.is_empty() {
        return String::new();
    }
    format!("<div class=\"figures\">\n{}</div>\n", all.iter().map(figure).collect::<String>())
}

fn results(scores: &[Scores]) -> String {
    let mut out = String::new();
    for (i, scores) in scores.iter().enumerate() {
        let findings: String = scores
            .headline
            .findings
            .iter()
            .map(|finding| {
                let (class, says) = verdict(finding.verdict);
                format!("<li class=\"{class}\"><b>{says}</b>{}</li>\n", prose(&finding.text))
            })
            .collect();
        let findings = match findings.is_empty() {
            true => String::new(),
            false => format!("<ul class=\"findings\">\n{findings}</ul>\n"),
        };
        let title =
            if i == 0 { "Result".into() } else { format!("Result by {}", scores.table.metric.label()) };
        let intro = match i {
            0 => "What every model scores on the clients’ test data, and what the sceptic’s translators and \
                  the random student beside the Grad-Transformer say about it."
                .into(),
            _ => format!("{} {}", scores.headline.text, scores.headline.conclusion),
        };
        let figure = figure(&figures::gap(&format!("gap-{i}"), scores));
        let content = format!("<div class=\"two\">\n{figure}{findings}</div>\n{}", tables::scores(scores));
        out += &section(&title, &intro, &content);
    }
    out
}

fn verdict(verdict: Verdict) -> (&'static str, &'static str) {
    match verdict {
        Verdict::Supports => ("supports", "Speaks for the Grad-Transformer"),
        Verdict::SaysLittle => ("shows_nothing", "This comparison shows little"),
        Verdict::NotNeeded => ("not_needed", "A simpler translator does as well"),
        Verdict::ShowsNothing => ("shows_nothing", "This comparison shows nothing"),
        Verdict::Unknown => ("unknown", "Not known"),
    }
}

fn losses(report: &Report) -> String {
    let figures: Vec<Figure> =
        [figures::shadow(&report.shadow), figures::clients(&report.clients)].into_iter().flatten().collect();
    let content = grid(&figures) + &tables::clients(&report.clients);
    let not_finite = [&report.shadow.tiny, &report.shadow.llm, &report.clients.tiny, &report.clients.llm]
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
    section("Fine-tuning", &intro, &content)
}

fn were(count: usize) -> String {
    if count == 1 { "1 loss was".into() } else { format!("{} losses were", grouped(count as u64)) }
}

fn translator(report: &Report) -> String {
    let Some(training) = &report.translator else { return String::new() };
    let mut intro = format!("{} of training", count(training.steps as usize, "step"));
    if let Some(planned) = training.planned.filter(|&planned| planned != training.steps) {
        let _ = write!(intro, ", of at most {}", grouped(planned));
    }
    let _ = write!(intro, ", {}.", count(training.validations.len(), "validation"));
    if training.not_finite > 0 {
        let _ = write!(intro, " {} not a number and left out.", were(training.not_finite));
    }
    section("Grad-Transformer", &intro, &grid(&figures::translator(training)))
}

fn tuples(report: &Report) -> String {
    let Some(tuples) = &report.tuples else { return String::new() };
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
             the correlation of their students’ and their teachers’ cosines is {}.",
            super::svg::fixed(agreement, 2)
        );
    }
    section("Update vectors", &intro, &(tables::tuples(tuples) + &grid(&figures::tuples(tuples))))
}
