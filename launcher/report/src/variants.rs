//! What a cross-validation found with clients that differ from the shadows: a row for every kind of client and
//! translator, and how well bad translations of all of them can be seen before they are used.

use crate::cross_validation::{Signals, Summary, Warning, interval, number};
use comfy_table::{CellAlignment, Table, presets};
use gradtx_pipeline::variant::Variant;
use serde::Serialize;

/// The summary of all kinds of clients, in the directory of a cross-validation.
pub const VARIANTS_FILE: &str = "variants.json";

/// All kinds of clients.
#[derive(Clone, Debug, Serialize)]
pub struct Variants {
    /// Each of them.
    pub variants: Vec<OneVariant>,
    /// What signals say of the clients of all kinds together.
    pub warnings: Vec<Warning>,
}

/// One kind of clients.
#[derive(Clone, Debug, Serialize)]
pub struct OneVariant {
    /// How they differ from the shadows.
    pub variant: Variant,
    /// What was found.
    #[serde(flatten)]
    pub summary: Summary,
}

impl Variants {
    /// From what each of them found.
    pub fn of(summaries: Vec<(Variant, Summary)>) -> Self {
        let mut all: Vec<Signals> = vec![];
        for own in summaries.iter().flat_map(|(_, summary)| &summary.signals) {
            match all.iter_mut().find(|signals| signals.name == own.name) {
                Some(signals) => signals.extend(own),
                None => all.push(own.clone()),
            }
        }
        let variants =
            summaries.into_iter().map(|(variant, summary)| OneVariant { variant, summary }).collect();
        Self { variants, warnings: all.iter().flat_map(Signals::warnings).collect() }
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let mut table = Table::new();
        table.load_preset(presets::ASCII_MARKDOWN);
        table.set_header([
            "clients",
            "groups",
            "P_S %",
            "P_T %",
            "translator",
            "score %",
            "PGR",
            "95 %",
            "reached",
        ]);
        for OneVariant { variant, summary } in &self.variants {
            for (i, t) in summary.translators.iter().enumerate() {
                let clients = match i {
                    0 => [
                        variant.name().to_string(),
                        summary.clients.to_string(),
                        format!("{:.1}", summary.student),
                        format!("{:.1}", summary.teacher),
                    ],
                    _ => [(); 4].map(|()| String::new()),
                };
                let found = [
                    t.name.clone(),
                    format!("{:.1}", t.score),
                    number(t.pgr),
                    interval(t.interval),
                    t.reached.to_string(),
                ];
                table.add_row(clients.into_iter().chain(found));
            }
        }
        for column in [1, 2, 3, 5, 6, 7, 8] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let mut text = format!(
            "{table}\nPGR of means, bootstrap over groups; reached: at least 95 % of P_T. All clients together:"
        );
        for warning in &self.warnings {
            text += &format!("\n{}", warning.text());
        }
        if self.warnings.is_empty() {
            text +=
                "\nNo warning can be judged: no translation is bad (PGR below 50), or none good (above 90).";
        }
        text
    }
}
