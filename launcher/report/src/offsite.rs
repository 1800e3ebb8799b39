//! What a table says of offsite-tuning: an edge that clients trained through an emulator, in the emulator and in the
//! LLM.
//!
//! In: a [`Table`]. Out: [`Offsite`]. The privacy gap is the score of the LLM with the trained edge less that of the
//! emulator with it, paired over clients: what a client cannot have without giving its edge back.

use crate::headline::number;
use crate::table::{Entry, Row, Table, Tuned};
use gradtx_run::role::Role;
use serde::Serialize;

/// What the rows of an emulator say.
#[derive(Debug, Serialize)]
pub struct Offsite {
    /// In a sentence or two.
    pub text: String,
    /// What speaks against this emulator, or these settings of fine-tuning.
    pub warnings: Vec<String>,
    /// Plugged in less tuned emulator, in points, with half its 95 % interval.
    pub privacy_gap: Option<f64>,
    /// See there.
    pub privacy_gap_interval: Option<f64>,
    /// Plugged in, as a part of the LLM whose edge was fine-tuned in place; in percent.
    pub of_edge_in_place: Option<f64>,
}

const TUNED: Entry = Entry::Emulator(Tuned::Edge);
const ATTACKED: Entry = Entry::Emulator(Tuned::WholeThenEdge);
const IN_PLACE: Entry = Entry::FinetunedEdge(Role::Llm);

/// What it says; nothing where no edge was plugged in.
pub fn of(table: &Table) -> Option<Offsite> {
    let plugged_in = table.row(Entry::PluggedIn)?;
    let reached = plugged_in.mean?;
    let mean = |entry: Entry| table.row(entry).and_then(|row: &Row| row.mean);
    let unit = table.metric.label();
    let mut text =
        format!("With the edge that was trained through the emulator the LLM reaches {reached:.1} % {unit}");
    let others = [
        (mean(TUNED), "the emulator itself"),
        (mean(Entry::Base(Role::Llm)), "the LLM as it is"),
        (mean(IN_PLACE), "the LLM whose edge was fine-tuned in place"),
        (mean(Entry::Finetuned(Role::Llm)), "the LLM with all layers fine-tuned"),
    ];
    for (score, what) in others {
        if let Some(score) = score {
            text += &format!("; {what} {score:.1} %");
        }
    }
    text.push('.');
    let less = |a: Option<&Row>, b: Option<&Row>| table.difference(a?, b?);
    let gap = less(Some(plugged_in), table.row(TUNED));
    if let Some(gap) = gap {
        let (low, high) = (number(gap.mean - gap.interval), number(gap.mean + gap.interval));
        text += &format!(" The privacy gap is {} points (95 % interval {low} to {high}).", number(gap.mean));
    }
    let mut warnings = vec![];
    let mut warn_below = |entry: Entry, what: &str, hint: &str| {
        if let Some(by) = less(Some(plugged_in), table.row(entry)).filter(|by| by.mean < 0.0) {
            warnings
                .push(format!("Plugged in, the edge is {} points below {what}: {hint}.", number(-by.mean)));
        }
    };
    warn_below(
        Entry::Base(Role::Llm),
        "the LLM as it is",
        "it does not fit the LLM; take a larger emulator.ratio, fewer steps or a lower learning rate",
    );
    warn_below(
        TUNED,
        "the emulator with it",
        "it learnt to live in the emulator, which clients keep; take fewer steps, a lower rank or fewer layers",
    );
    if let (Some(attack), Some(_)) = (mean(ATTACKED), mean(TUNED))
        && attack >= reached
    {
        warnings.push(format!(
            "An emulator whose layers were all fine-tuned first reaches {attack:.1} % with the client's data, and the LLM \
             with the edge no more: who has this emulator does not need the LLM. Take a smaller emulator.ratio."
        ));
    }
    let whole = mean(IN_PLACE).filter(|whole| *whole > 0.0);
    Some(Offsite {
        text,
        warnings,
        privacy_gap: gap.map(|gap| gap.mean),
        privacy_gap_interval: gap.map(|gap| gap.interval),
        of_edge_in_place: whole.map(|whole| 100.0 * reached / whole),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::tests::world;

    const LLM: Entry = Entry::Base(Role::Llm);

    fn said(rows: &[(Entry, &[f64])]) -> Option<Offsite> {
        of(&Table::of(&world(rows)).0[0])
    }

    #[test]
    fn the_gap_is_paired_over_clients() {
        let said = said(&[
            (LLM, &[0.02, 0.0, 0.01]),
            (TUNED, &[0.7, 0.6, 0.8]),
            (Entry::PluggedIn, &[0.9, 0.82, 0.98]),
            (IN_PLACE, &[0.95, 0.95, 1.0]),
        ]);
        let said = said.unwrap();
        assert!((said.privacy_gap.unwrap() - 20.0).abs() < 1e-9);
        // Gaps of 20, 22 and 18 points: a standard error of 2/√3, and 4.303 for three clients.
        assert!((said.privacy_gap_interval.unwrap() - 4.303 * 2.0 / 3f64.sqrt()).abs() < 1e-2);
        assert!((said.of_edge_in_place.unwrap() - 100.0 * 0.9 / (2.9 / 3.0)).abs() < 1e-9);
        assert!(said.warnings.is_empty(), "{:?}", said.warnings);
        assert!(said.text.contains("reaches 90.0 %") && said.text.contains("20.0 points"), "{}", said.text);
    }

    #[test]
    fn what_speaks_against_an_emulator_is_a_warning() {
        let warnings = |plugged_in: &[f64], attack: &[f64]| {
            said(&[
                (LLM, &[0.5, 0.5]),
                (TUNED, &[0.7, 0.7]),
                (ATTACKED, attack),
                (Entry::PluggedIn, plugged_in),
            ])
            .unwrap()
            .warnings
        };
        assert!(warnings(&[0.8, 0.8], &[0.7, 0.7]).is_empty());
        let below = warnings(&[0.4, 0.4], &[0.1, 0.1]);
        assert!(below[0].contains("below the LLM as it is") && below[1].contains("below the emulator"));
        assert!(warnings(&[0.8, 0.8], &[0.9, 0.9])[0].contains("does not need the LLM"));
    }

    #[test]
    fn without_a_plug_in_there_is_nothing_to_say() {
        assert!(said(&[(LLM, &[0.5]), (TUNED, &[0.7])]).is_none());
    }
}
