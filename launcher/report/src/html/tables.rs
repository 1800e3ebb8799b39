//! Everything on the page of a report that stands in rows.

use super::view::{Block, Cell, Part, Table};
use crate::curves::{Client, Clients};
use crate::figures::{class, row_class};
use crate::headline::{grouped, number};
use crate::source::Assumed;
use crate::svg::{fixed, significant};
use crate::table::{Row, display_name};
use crate::times::{StageDates, Times, TokenRate};
use crate::tuples::{Side, Tuples};
use crate::{Report, Scores, Spread};
use gradtx_run::command_log::LoggedCommand;
use gradtx_run::role::Role;
use gradtx_run::text::{human_seconds, quoted};
use gradtx_runtime::artifact::{Generator, Privacy};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write as _;

/// Clients that get a column of their own.
const COLUMNS: usize = 10;
/// Clients that get a row of their own.
const CLIENTS: usize = 40;
/// Commands that are shown without being asked for.
const COMMANDS: usize = 12;
/// Assumptions that are shown; report.json has all.
const ASSUMED: usize = 24;
/// What stands where there is no number.
pub(super) const NONE: &str = "–";

fn with_interval(value: Option<f64>, half: Option<f64>) -> Cell {
    let Some(value) = value else { return NONE.into() };
    Cell { half: half.map(number), ..number(value).into() }
}

pub(super) fn optional<T>(value: Option<T>, text: impl Fn(T) -> String) -> Cell {
    value.map_or(NONE.into(), |value| text(value).into())
}

/// The first characters of a checksum: enough for a reader to distinguish two.
pub fn short(checksum: &str) -> &str {
    checksum.char_indices().nth(10).map_or(checksum, |(at, _)| &checksum[..at])
}

fn checksum(sum: &str) -> Cell {
    Cell::code(short(sum))
}

/// The table of scores.
pub fn scores(scores: &Scores) -> Table {
    let of = &scores.table;
    let has_pgr = scores.offsite_alone().is_none();
    let mut head: Vec<String> = vec!["model".into(), format!("{}, %", of.metric.label())];
    head.extend(has_pgr.then(|| "PGR, %".into()));
    let few = of.data.len() <= COLUMNS;
    if few {
        head.extend(column_names(of.data.iter().map(|d| d.name.as_str()).collect()));
    } else {
        head.extend(["lowest client".into(), "median".into(), "highest".into()]);
    }
    let [paired, scale] = match has_pgr {
        true => [" PGR with its paired interval,", " P_S and P_T are 0 and 100 on the scale of PGR."],
        false => ["", ""],
    };
    let caption = format!(
        "Mean over clients with its 95 % interval,{paired} and the score on each client's test data ({} examples in \
         all).{scale}",
        grouped(of.examples as u64)
    );
    let mut table = Table::new(&head, &[], caption);
    for row in &of.rows {
        let pgr = if row.pgr.is_some() { with_interval(row.pgr, row.pgr_interval) } else { Cell::default() };
        let mut cells = vec![row.name.clone().into(), with_interval(row.mean, row.interval)];
        cells.extend(has_pgr.then_some(pgr));
        match few {
            true => cells.extend(row.scores.iter().map(|score| optional(*score, number))),
            false => cells.extend(extremes(row)),
        }
        table.push(row_class(row.entry), cells);
    }
    table
}

fn extremes(row: &Row) -> [Cell; 3] {
    let mut there: Vec<f64> = row.scores.iter().flatten().copied().collect();
    there.sort_by(f64::total_cmp);
    let median = Spread::of(there.iter().copied()).map(|spread| spread.median);
    [there.first().copied(), median, there.last().copied()].map(|value| optional(value, number))
}

/// Names of test data without the end that all have in common, such as `/test`.
fn column_names(names: Vec<&str>) -> Vec<String> {
    let ends: Vec<Option<&str>> = names.iter().map(|n| n.rsplit_once('/').map(|(_, end)| end)).collect();
    let common = ends.first().copied().flatten().filter(|end| ends.iter().all(|e| *e == Some(*end)));
    let trim = |name: &str| match common {
        Some(end) => name.strip_suffix(end).and_then(|n| n.strip_suffix('/')).unwrap_or(name).to_string(),
        None => name.to_string(),
    };
    names.into_iter().map(trim).collect()
}

/// What every client sent.
pub fn clients(clients: &Clients) -> Table {
    let mut caption =
        "Loss is the mean over the first and the last twentieth of the steps. Only the TinyLM's \
                       update leaves a client; the LLM's is what P_T is measured with."
            .to_string();
    if clients.each.len() > CLIENTS {
        let _ = write!(caption, " The first {CLIENTS} of {}; report.json has all.", clients.each.len());
    }
    let head = ["fine-tuned", "model", "examples", "first loss", "last loss", "norm of update", "privacy"];
    let mut table = Table::new(&head, &[1], caption);
    for client in clients.each.iter().take(CLIENTS) {
        let cells = vec![
            Cell::code(&client.name),
            optional(client.model, |role| display_name(role).into()),
            optional(client.examples, grouped),
            optional(client.first, significant),
            optional(client.last, significant),
            optional(client.update_norm, significant),
            privacy(client),
        ];
        table.push(client.model.map_or("muted", class), cells);
    }
    table
}

fn privacy(client: &Client) -> Cell {
    match &client.privacy {
        None => NONE.into(),
        Some(Privacy::None) => "no guarantee".into(),
        Some(Privacy::DpSgd { generator: Generator::Insecure, .. }) => {
            "none: a test with a chosen seed".into()
        }
        Some(Privacy::DpSgd { epsilon, delta, .. }) => {
            format!("ε {}, δ {}", significant(*epsilon), significant(*delta)).into()
        }
    }
}

/// Sizes of the tuples.
pub fn tuples(tuples: &Tuples) -> Table {
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
    let mut table = Table::new(&head, &[], caption);
    table.push(class(Role::Tiny), side(Role::Tiny, &tuples.student));
    table.push(class(Role::Llm), side(Role::Llm, &tuples.teacher));
    table
}

fn side(role: Role, side: &Side) -> Vec<Cell> {
    let cosines = side.cosines.as_ref();
    let median = |spread: Option<Spread>| optional(spread, |spread| fixed(spread.median, 2));
    vec![
        format!("{} updates", display_name(role)).into(),
        format!("{} × {}", grouped(side.blocks as u64), grouped(side.width as u64)).into(),
        grouped(side.values as u64).into(),
        bytes(side.bytes).into(),
        optional(Spread::of(side.last_norms.iter().copied()), |spread| significant(spread.median)),
        optional(side.mean_share, |share| format!("{} %", fixed(100.0 * share, 1))),
        median(cosines.and_then(|c| c.within)),
        median(cosines.and_then(|c| c.between)),
    ]
}

fn bytes(count: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let power = (0..units.len() - 1).find(|&p| count < 1 << (10 * (p + 1))).unwrap_or(units.len() - 1);
    fixed(count as f64 / (1u64 << (10 * power)) as f64, usize::from(power > 0)) + " " + units[power]
}

fn sizes(smallest: usize, largest: usize) -> Cell {
    match smallest == largest {
        true => grouped(largest as u64).into(),
        false => format!("{} to {}", grouped(smallest as u64), grouped(largest as u64)).into(),
    }
}

/// Who has which rows.
pub fn rows(report: &Report) -> Option<Part> {
    let head = ["what", "where", "lists", "rows of each", "checksum", ""];
    let mut table = Table::new(&head, &[1, 4, 5], "");
    shadow_rows(report, &mut table);
    for split in &report.rows.splits {
        for list in &split.lists {
            let note = format!("of {} rows, seed {}", grouped(split.rows as u64), split.seed);
            let cells = vec![
                list.name.clone().into(),
                split.name.clone().into(),
                grouped(list.lists as u64).into(),
                sizes(list.smallest, list.largest),
                checksum(&split.source),
                note.into(),
            ];
            table.push("", cells);
        }
    }
    let trained = report.clients.each.iter().filter(|c| c.model != Some(Role::Llm)).take(CLIENTS);
    for client in trained {
        let cells = vec![
            "private training data".into(),
            Cell::code(&client.name),
            "1".into(),
            optional(client.examples, grouped),
            client.data.as_deref().map_or(Cell::default(), checksum),
            Cell::default(),
        ];
        table.push("", cells);
    }
    for data in report.scores.iter().flat_map(|s| &s.table.data).take(CLIENTS) {
        let cells = vec![
            "test data".into(),
            data.name.clone().into(),
            "1".into(),
            grouped(data.examples as u64).into(),
            checksum(&data.checksum),
            trained_on(report, &data.checksum),
        ];
        table.push("", cells);
    }
    let intro = "Counts and checksums of the files; which row numbers they are is in the run's subsets.json and \
                 split.json.";
    Part::of("rows", "Who has which rows", intro, vec![Block::table(table)])
}

fn shadow_rows(report: &Report, table: &mut Table) {
    let Some(shadow) = &report.rows.shadow else { return };
    let by = match shadow.group_by.as_deref() {
        Some("random") | None => "drawn at random".to_string(),
        Some(column) => format!("grouped by `{}`", column.replace('`', "'")),
    };
    let note = format!(
        "{by}; {} different rows, {} of them in more than one subset",
        grouped(shadow.rows as u64),
        grouped(shadow.shared as u64)
    );
    let cells = vec![
        "shadow subsets".into(),
        shadow.data.as_deref().unwrap_or("public data").into(),
        grouped(shadow.subsets as u64).into(),
        sizes(shadow.smallest, shadow.largest),
        shadow.checksum.as_deref().map_or(Cell::default(), checksum),
        note.into(),
    ];
    table.push("", cells);
}

/// A warning where test data is also somebody's training data.
fn trained_on(report: &Report, checksum: &str) -> Cell {
    let shadow = report.rows.shadow.as_ref().and_then(|s| s.checksum.as_deref());
    let mut clients = report.clients.each.iter().filter_map(|c| c.data.as_deref());
    match shadow == Some(checksum) || clients.any(|data| data == checksum) {
        true => Cell::strong("was trained on"),
        false => Cell::default(),
    }
}

/// Throughput of the stages.
pub fn rates(times: &Times) -> Table {
    let head = ["stage", "model", "runs", "tokens", "time", "rate"];
    let mut table = Table::new(&head, &[1], "Time is that of the steps alone, runs added up.");
    for TokenRate { stage, model, runs, tokens, seconds, tokens_per_s } in &times.tokens {
        let cells = vec![
            stage.clone().into(),
            optional(*model, |role| display_name(role).into()),
            grouped(*runs as u64).into(),
            grouped(*tokens).into(),
            format!("{} s", fixed(*seconds, 1)).into(),
            optional(*tokens_per_s, |rate| format!("{} tokens/s", fixed(rate, 0))),
        ];
        table.push(model.map_or("muted", class), cells);
    }
    if let Some(rate) = &times.translator {
        let cells = vec![
            "train".into(),
            "Grad-Transformer".into(),
            "1".into(),
            Cell::default(),
            optional(rate.seconds, |seconds| format!("{} s", fixed(seconds, 1))),
            format!("{} tuples/s", fixed(rate.tuples_per_s, 0)).into(),
        ];
        table.push("rival", cells);
    }
    table
}

/// When the stages were finished.
pub fn dates(times: &Times) -> Table {
    let mut table = Table::new(&["stage", "results", "first finished, UTC", "last finished, UTC"], &[], "");
    for StageDates { stage, finished, first, last } in &times.stages {
        let cells = [stage.clone(), grouped(*finished as u64), first.clone(), last.clone()];
        table.push("", cells.map(Cell::from).into());
    }
    table
}

/// Fingerprints of the base models.
pub fn models(report: &Report) -> Table {
    let mut table = Table::new(&["base model", "directory", "fingerprint of the weights"], &[1, 2], "");
    for (role, model) in [(Role::Tiny, &report.run.tiny), (Role::Llm, &report.run.llm)] {
        if let Some(fingerprint) = &model.fingerprint {
            let name = model.name.as_deref().unwrap_or(NONE);
            table.push(class(role), vec![display_name(role).into(), name.into(), Cell::code(fingerprint)]);
        }
    }
    table
}

/// What was assumed about data and models.
pub fn assumed(report: &Report) -> Table {
    let head = ["stage", "results", "assumed where the settings leave it open"];
    let mut table = Table::new(&head, &[2], "`gradtx preview` shows examples as they are trained on.");
    for Assumed { stage, results, what } in report.run.assumed.iter().take(ASSUMED) {
        table.push("", vec![stage.clone().into(), grouped(*results as u64).into(), what.clone().into()]);
    }
    table
}

/// What each stage was computed on, and by which versions.
pub fn devices(report: &Report) -> Table {
    let head = ["stage", "results", "gradtx", "device", "where its bits depend on it"];
    let mut table = Table::new(&head, &[2, 3, 4], "");
    for stage in &report.run.stages {
        let list = |items: &BTreeSet<String>| items.iter().cloned().collect::<Vec<_>>().join(", ");
        let cells = [
            stage.stage.clone(),
            grouped(stage.results as u64),
            list(&stage.versions),
            list(&stage.devices),
            list(&stage.computed_on),
        ];
        table.push("", cells.map(Cell::from).into());
    }
    table
}

/// The commands that worked on the run.
pub fn commands(times: &Times) -> Option<Block> {
    let head = ["started, UTC", "took", "host", "ranks × threads", "gradtx", "exit code", "command"];
    let caption = "From commands.jsonl of the run directory; of absolute paths only the last part.";
    let mut table = Table::new(&head, &[2, 4, 6], caption);
    for LoggedCommand { started, seconds, command, host, ranks, threads, version, slurm_job, exit_code } in
        &times.commands
    {
        let words: Vec<String> = command.iter().map(|word| quoted(word)).collect();
        let job = slurm_job.as_ref().map_or(String::new(), |job| format!(", SLURM job {job}"));
        let cells = vec![
            started.clone().into(),
            human_seconds(*seconds).into(),
            format!("{host}{job}").into(),
            format!("{ranks} × {threads}").into(),
            version.clone().into(),
            exit_code.to_string().into(),
            Cell::code(words.join(" ")),
        ];
        table.push("", cells);
    }
    match table.rows.len() {
        0..=COMMANDS => Block::table(table),
        n => Some(Block::Details { summary: format!("All {n} commands"), table }),
    }
}

/// Every setting.
pub fn settings(report: &Report) -> Option<Block> {
    let mut leaves = vec![];
    flatten("", report.run.settings.as_ref()?, &mut leaves);
    let summary = format!("All {} settings as resolved", leaves.len());
    let mut table = Table::new(&["setting", "value"], &[1], "Of paths only the last part.");
    for (key, value) in leaves {
        table.push("", vec![Cell::code(key), Cell::code(value)]);
    }
    Some(Block::Details { summary, table })
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
        assert_eq!(column_names(vec!["a/test", "<b>/test"]), ["a", "<b>"]);
        assert_eq!(column_names(vec!["a/test", "b/dev"]), ["a/test", "b/dev"]);
        assert_eq!(column_names(vec!["test"]), ["test"]);
    }

    #[test]
    fn bytes_for_people() {
        assert_eq!([bytes(7), bytes(1536), bytes(3 << 30)], ["7 bytes", "1.5 KiB", "3.0 GiB"]);
    }
}
