//! Everything on the page that stands in rows.

use super::{prose, section, short};
use crate::curves::{Client, Clients};
use crate::figures::{class, loss_text, row_class};
use crate::headline::{grouped, number};
use crate::svg::{escape, fixed};
use crate::table::{Row, display_name};
use crate::times::Times;
use crate::tuples::{Side, Tuples};
use crate::{Report, Scores, Spread};
use gradtx_run::role::Role;
use gradtx_runtime::artifact::Privacy;
use serde_json::Value;
use std::fmt::Write as _;

/// Clients that get a column of their own.
const COLUMNS: usize = 10;
/// Clients that get a row of their own.
const CLIENTS: usize = 40;

/// A table. Cells are HTML; the first of a row is its heading. `left` columns are words.
fn table(head: &[&str], rows: &[(String, Vec<String>)], left: &[usize], caption: &str) -> String {
    let align = |i: usize| if left.contains(&i) { " class=\"left\"" } else { "" };
    let mut out =
        "<div class=\"card\">\n<div class=\"scroll\" tabindex=\"0\">\n<table>\n<thead><tr>".to_string();
    for (i, name) in head.iter().enumerate() {
        let _ = write!(out, "<th scope=\"col\"{}>{name}</th>", align(i));
    }
    out += "</tr></thead>\n<tbody>\n";
    for (class, cells) in rows {
        let plain = if class.is_empty() { " class=\"plain\"" } else { "" };
        let _ = write!(out, "<tr class=\"{class}\">");
        for (i, cell) in cells.iter().enumerate() {
            let _ = match i {
                0 => write!(out, "<th scope=\"row\"{plain}>{cell}</th>"),
                _ => write!(out, "<td{}>{cell}</td>", align(i)),
            };
        }
        out += "</tr>\n";
    }
    // Below the table and not in it: a caption that scrolls with a wide table cannot be read.
    let caption = match caption.is_empty() {
        true => String::new(),
        false => format!("<p class=\"caption\">{}</p>\n", prose(caption)),
    };
    format!("{out}</tbody>\n</table>\n</div>\n{caption}</div>\n")
}

fn with_interval(value: Option<f64>, half: Option<f64>) -> String {
    let Some(value) = value else { return "–".into() };
    let half = half.map_or(String::new(), |half| format!(" <span class=\"pm\">± {}</span>", number(half)));
    format!("{}{half}", number(value))
}

/// The table of scores.
pub fn scores(scores: &Scores) -> String {
    let table_of = &scores.table;
    let unit = format!("{}, %", table_of.metric.label());
    let pgr = "PGR, %".to_string();
    let mut head: Vec<String> = vec!["model".into(), unit, pgr];
    let few = table_of.data.len() <= COLUMNS;
    if few {
        head.extend(column_names(table_of.data.iter().map(|d| d.name.as_str()).collect()));
    } else {
        head.extend(["lowest client".into(), "median".into(), "highest".into()]);
    }
    let row = |row: &Row| {
        let pgr = if row.pgr.is_some() { with_interval(row.pgr, row.pgr_interval) } else { String::new() };
        let mut cells = vec![prose(&row.name), with_interval(row.mean, row.interval), pgr];
        if few {
            cells.extend(row.scores.iter().map(|s| s.map_or("–".into(), number)));
        } else {
            cells.extend(extremes(&row.scores));
        }
        (row_class(row.entry).to_string(), cells)
    };
    let rows: Vec<_> = table_of.rows.iter().map(row).collect();
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    let caption = format!(
        "Mean over clients with its 95 % interval, PGR with its paired interval, and the score on each client’s \
         test data ({} examples in all). P_S and P_T are 0 and 100 on the scale of PGR.",
        grouped(table_of.examples as u64)
    );
    table(&head, &rows, &[], &caption)
}

fn extremes(scores: &[Option<f64>]) -> [String; 3] {
    let mut there: Vec<f64> = scores.iter().flatten().copied().collect();
    there.sort_by(f64::total_cmp);
    let text = |value: Option<f64>| value.map_or("–".into(), number);
    [
        text(there.first().copied()),
        text(Spread::of(there.iter().copied()).map(|s| s.median)),
        text(there.last().copied()),
    ]
}

/// Names of test data without the end that all have in common, such as `/test`.
fn column_names(names: Vec<&str>) -> Vec<String> {
    let ends: Vec<Option<&str>> = names.iter().map(|n| n.rsplit_once('/').map(|(_, end)| end)).collect();
    let common = ends.first().copied().flatten().filter(|end| ends.iter().all(|e| *e == Some(*end)));
    let trim = |name: &&str| match common {
        Some(end) => escape(name.strip_suffix(end).and_then(|n| n.strip_suffix('/')).unwrap_or(name)),
        None => escape(name),
    };
    names.iter().map(trim).collect()
}

/// What every client sent.
pub fn clients(clients: &Clients) -> String {
    if clients.each.is_empty() {
        return String::new();
    }
    let optional = |value: Option<f64>| value.map_or("–".into(), loss_text);
    let row = |client: &Client| {
        let privacy = match &client.privacy {
            None => "–".into(),
            Some(Privacy::None) => "none".into(),
            Some(Privacy::DpSgd { epsilon, delta, .. }) => {
                format!("ε {}, δ {}", loss_text(*epsilon), loss_text(*delta))
            }
        };
        let cells = vec![
            format!("<code>{}</code>", escape(&client.name)),
            client.model.map_or("–".into(), |role| display_name(role).into()),
            client.examples.map_or("–".into(), grouped),
            optional(client.first),
            optional(client.last),
            optional(client.update_norm),
            privacy,
        ];
        (client.model.map_or("muted", class).to_string(), cells)
    };
    let rows: Vec<_> = clients.each.iter().take(CLIENTS).map(row).collect();
    let mut caption =
        "Loss is the mean over the first and the last twentieth of the steps. Only the TinyLM’s \
                       update leaves a client; the LLM’s is what P_T is measured with."
            .to_string();
    if clients.each.len() > CLIENTS {
        let _ = write!(caption, " The first {CLIENTS} of {}; report.json has all.", clients.each.len());
    }
    let head = ["fine-tuned", "model", "examples", "first loss", "last loss", "norm of update", "privacy"];
    table(&head, &rows, &[1], &caption)
}

/// Sizes of the tuples.
pub fn tuples(tuples: &Tuples) -> String {
    let median = |spread: Option<Spread>| spread.map_or("–".into(), |s| fixed(s.median, 2));
    let row = |role: Role, side: &Side| {
        let cosines = side.cosines.as_ref();
        let last = Spread::of(side.last_norms.iter().copied());
        let cells = vec![
            format!("{} updates", display_name(role)),
            format!("{} × {}", grouped(side.blocks as u64), grouped(side.width as u64)),
            grouped(side.values as u64),
            bytes(side.bytes),
            last.map_or("–".into(), |s| loss_text(s.median)),
            side.mean_share.map_or("–".into(), |share| format!("{} %", fixed(100.0 * share, 1))),
            median(cosines.and_then(|c| c.within)),
            median(cosines.and_then(|c| c.between)),
        ];
        (class(role).to_string(), cells)
    };
    let rows = [row(Role::Tiny, &tuples.student), row(Role::Llm, &tuples.teacher)];
    let head = [
        "",
        "blocks × width",
        "values",
        "on disk",
        "norm, median",
        "share of the mean",
        "cosine within a task",
        "cosine between subsets",
    ];
    let caption = "Share of the mean: squared norm of the mean update over the mean squared norm, that is, how much \
                   of an update a constant already has. Cosines are medians of the updates as they are, of the \
                   last snapshot.";
    table(&head, &rows, &[], caption)
}

fn bytes(count: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let power = (0..units.len() - 1).find(|&p| count < 1 << (10 * (p + 1))).unwrap_or(units.len() - 1);
    fixed(count as f64 / (1u64 << (10 * power)) as f64, usize::from(power > 0)) + " " + units[power]
}

fn sizes(smallest: usize, largest: usize) -> String {
    match smallest == largest {
        true => grouped(largest as u64),
        false => format!("{} to {}", grouped(smallest as u64), grouped(largest as u64)),
    }
}

/// Who has which rows.
pub fn rows(report: &Report) -> String {
    let mut rows: Vec<Vec<String>> = vec![];
    if let Some(shadow) = &report.rows.shadow {
        let data = escape(shadow.data.as_deref().unwrap_or("public data"));
        let sum = shadow.checksum.as_deref().map_or(String::new(), short_code);
        let by = match shadow.group_by.as_deref() {
            Some("random") | None => "drawn at random".to_string(),
            Some(column) => format!("grouped by <code>{}</code>", escape(column)),
        };
        let note = format!(
            "{by}; {} different rows, {} of them in more than one subset",
            grouped(shadow.rows as u64),
            grouped(shadow.shared as u64)
        );
        rows.push(vec![
            "shadow subsets".into(),
            data,
            grouped(shadow.subsets as u64),
            sizes(shadow.smallest, shadow.largest),
            sum,
            note,
        ]);
    }
    for split in &report.rows.splits {
        for list in &split.lists {
            let note = format!("of {} rows, seed {}", grouped(split.rows as u64), split.seed);
            rows.push(vec![
                escape(&list.name),
                escape(&split.name),
                grouped(list.lists as u64),
                sizes(list.smallest, list.largest),
                short_code(&split.source),
                note,
            ]);
        }
    }
    let trained = report.clients.each.iter().filter(|c| c.model != Some(Role::Llm)).take(CLIENTS);
    for client in trained {
        rows.push(vec![
            "private training data".into(),
            format!("<code>{}</code>", escape(&client.name)),
            "1".into(),
            client.examples.map_or("–".into(), grouped),
            client.data.as_deref().map_or(String::new(), short_code),
            String::new(),
        ]);
    }
    for data in report.scores.iter().flat_map(|s| &s.table.data).take(CLIENTS) {
        rows.push(vec![
            "test data".into(),
            escape(&data.name),
            "1".into(),
            grouped(data.examples as u64),
            short_code(&data.checksum),
            trained_on(report, &data.checksum),
        ]);
    }
    if rows.is_empty() {
        return String::new();
    }
    let rows: Vec<_> = rows.into_iter().map(|cells| (String::new(), cells)).collect();
    let head = ["what", "where", "lists", "rows of each", "checksum", ""];
    section(
        "Who has which rows",
        "Counts and checksums of the files; which row numbers they are is in the run’s subsets.json and split.json.",
        &table(&head, &rows, &[1, 4, 5], ""),
    )
}

/// A warning where test data is also somebody's training data.
fn trained_on(report: &Report, checksum: &str) -> String {
    let shadow = report.rows.shadow.as_ref().and_then(|s| s.checksum.as_deref());
    let mut clients = report.clients.each.iter().filter_map(|c| c.data.as_deref());
    match shadow == Some(checksum) || clients.any(|data| data == checksum) {
        true => "<b>was trained on</b>".into(),
        false => String::new(),
    }
}

fn short_code(checksum: &str) -> String {
    format!("<code>{}</code>", escape(short(checksum)))
}

/// Throughput and dates.
pub fn times(times: &Times) -> String {
    let mut content = String::new();
    let mut rates: Vec<(String, Vec<String>)> = times
        .tokens
        .iter()
        .map(|rate| {
            let cells = vec![
                escape(&rate.stage),
                rate.model.map_or("–".into(), |role| display_name(role).into()),
                grouped(rate.runs as u64),
                grouped(rate.tokens),
                format!("{} s", fixed(rate.seconds, 1)),
                rate.tokens_per_s.map_or("–".into(), |r| format!("{} tokens/s", fixed(r, 0))),
            ];
            (rate.model.map_or("muted", class).to_string(), cells)
        })
        .collect();
    if let Some(rate) = &times.translator {
        let cells = vec![
            "train".into(),
            "Grad-Transformer".into(),
            "1".into(),
            String::new(),
            rate.seconds.map_or("–".into(), |s| format!("{} s", fixed(s, 1))),
            format!("{} tuples/s", fixed(rate.tuples_per_s, 0)),
        ];
        rates.push(("rival".into(), cells));
    }
    if !rates.is_empty() {
        let head = ["stage", "model", "runs", "tokens", "time", "rate"];
        content += &table(&head, &rates, &[1], "Time is that of the steps alone, runs added up.");
    }
    let stage = |stage: &crate::times::StageDates| {
        let cells = vec![
            escape(&stage.stage),
            grouped(stage.finished as u64),
            stage.first.clone(),
            stage.last.clone(),
        ];
        (String::new(), cells)
    };
    let dates: Vec<_> = times.stages.iter().map(stage).collect();
    if !dates.is_empty() {
        let head = ["stage", "results", "first finished, UTC", "last finished, UTC"];
        content += &table(&head, &dates, &[], "");
    }
    section("Time", "As measured on the machine that ran each stage.", &content)
}

/// Fingerprints, and every setting.
pub fn settings(report: &Report) -> String {
    let mut rows: Vec<(String, Vec<String>)> = vec![];
    for (role, model) in [(Role::Tiny, &report.run.tiny), (Role::Llm, &report.run.llm)] {
        if let Some(fingerprint) = &model.fingerprint {
            let name = model.name.as_deref().unwrap_or("–");
            let cells = vec![
                display_name(role).into(),
                escape(name),
                format!("<code>{}</code>", escape(fingerprint)),
            ];
            rows.push((class(role).into(), cells));
        }
    }
    let mut content = String::new();
    if !rows.is_empty() {
        content += &table(&["base model", "directory", "fingerprint of the weights"], &rows, &[1, 2], "");
    }
    if let Some(settings) = &report.run.settings {
        let mut leaves = vec![];
        flatten("", settings, &mut leaves);
        let rows: Vec<_> = leaves
            .into_iter()
            .map(|(key, value)| {
                let cells = vec![
                    format!("<code>{}</code>", escape(&key)),
                    format!("<code>{}</code>", escape(&value)),
                ];
                (String::new(), cells)
            })
            .collect();
        let _ = write!(
            content,
            "<details><summary>All {} settings as resolved</summary>\n{}</details>\n",
            rows.len(),
            table(&["setting", "value"], &rows, &[1], "Of paths only the last part.")
        );
    }
    section("Provenance", "What would have to be the same to get the same bytes again.", &content)
}

fn flatten(at: &str, value: &Value, out: &mut Vec<(String, String)>) {
    match value {
        Value::Object(entries) => {
            for (key, inner) in entries {
                let key = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                flatten(&key, inner, out);
            }
        }
        other => out.push((at.into(), other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lose_what_all_have_in_common() {
        assert_eq!(column_names(vec!["a/test", "<b>/test"]), ["a", "&lt;b&gt;"]);
        assert_eq!(column_names(vec!["a/test", "b/dev"]), ["a/test", "b/dev"]);
        assert_eq!(column_names(vec!["test"]), ["test"]);
    }

    #[test]
    fn bytes_for_people() {
        assert_eq!([bytes(7), bytes(1536), bytes(3 << 30)], ["7 bytes", "1.5 KiB", "3.0 GiB"]);
    }
}
