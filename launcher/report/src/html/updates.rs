//! The part of a report about clients' updates: how far they are from the shadow updates, and from each other.

use super::view::{Block, Cell, Part, Table};
use crate::Report;
use crate::svg::{fixed, significant};
use gradtx_pipeline::clients::Clients;
use gradtx_train::shadows::Distance;

/// Clients that get a row of their own.
const CLIENTS: usize = 40;
/// What stands where there is no number.
const NONE: &str = "–";

/// The part.
pub(super) fn part(report: &Report) -> Option<Part> {
    let intro = "How far every client's update is from the shadow updates that the translator has seen. Usual is \
                 what shadows of left-out groups have; a client above the warning level, their 95 % quantile, is \
                 unlike anything that the translator was made of.";
    Part::of("updates", "Clients' updates", intro, vec![Block::table(table(report))])
}

fn table(report: &Report) -> Table {
    let head = [
        "client",
        "combined",
        "norm",
        "share",
        "Mahalanobis distance",
        "outside the span",
        "predicted error",
        "warnings",
    ];
    let caption = "Mahalanobis distance: in the span of the shadow updates, by the root of its dimension. Outside \
                   the span: share of the squared distance from their mean. Predicted error: 1 is that of the mean \
                   of the LLM's shadow updates.";
    let mut table = Table::new(&head, &[1, 7], caption);
    for updates in &report.updates {
        let of = &updates.clients;
        for client in of.clients.iter().take(CLIENTS) {
            let mut cells = vec![
                Cell::code(&client.name),
                how(of).into(),
                significant(client.norm).into(),
                client.share.map_or(NONE.into(), |share| significant(share).into()),
            ];
            cells.extend(distance(client.distance.as_ref()));
            cells.push(match client.warnings.is_empty() {
                true => NONE.into(),
                false => client.warnings.join("; ").into(),
            });
            table.push("", cells);
        }
        if let Some(whole) = &of.combined {
            let mut cells =
                vec!["together".into(), how(of).into(), significant(whole.norm).into(), NONE.into()];
            cells.extend(distance(whole.distance.as_ref()));
            cells.push(NONE.into());
            table.push("", cells);
        }
        if let Some(usual) = &of.usual {
            let level = |median: f64, warning: f64| -> Cell {
                format!("{} ({})", significant(median), significant(warning)).into()
            };
            let (outside, error) = (&usual.outside, &usual.error.errors);
            let cells = vec![
                format!("usual (warning level), of {} shadows", usual.shadows).into(),
                NONE.into(),
                significant(of.students.median).into(),
                NONE.into(),
                level(usual.mahalanobis.median, usual.mahalanobis.warning),
                format!("{} % ({} %)", fixed(100.0 * outside.median, 1), fixed(100.0 * outside.warning, 1))
                    .into(),
                level(error.median, error.warning),
                NONE.into(),
            ];
            table.push("", cells);
        }
    }
    table
}

/// How updates became one, in the words of the command line.
fn how(clients: &Clients) -> String {
    match clients.clients.len() {
        1 => NONE.into(),
        _ => clients.combine.name(),
    }
}

fn distance(distance: Option<&Distance>) -> [Cell; 3] {
    match distance {
        None => [NONE.into(), NONE.into(), NONE.into()],
        Some(found) => [
            significant(found.mahalanobis).into(),
            format!("{} %", fixed(100.0 * found.outside, 1)).into(),
            found.predicted_error.map_or(NONE.into(), |error| significant(error).into()),
        ],
    }
}
