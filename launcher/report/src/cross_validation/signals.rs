//! How well doubt in a translation can be seen before it is used, by signals that need no test data.

use crate::table::{Row, Table, TestData};
use gradtx_pipeline::cross_validation::Client;
use serde::Serialize;
use std::cmp::Ordering;

/// Signals that can be seen without test data.
const AGREEMENT: &str = "share of answers that agree";
const DISTANCE: &str = "distance to the shadows' span";
/// PGR below which a translation is bad, and above which it is good, for [`Warning`].
const BAD: f64 = 50.0;
const GOOD: f64 = 90.0;

/// The translations of one translator, with what is known of each without test data.
#[derive(Clone, Debug, Default)]
pub(crate) struct Signals {
    /// What a reader calls the translator.
    pub(crate) name: String,
    /// PGR of every client; NaN where the LLM is not better than the TinyLM.
    pub(crate) pgr: Vec<f64>,
    /// Answers on which TinyLM and translation agree, as a part of all.
    pub(crate) agreement: Vec<Option<f64>>,
    /// Distance of the update to the shadows' span.
    pub(crate) distance: Vec<Option<f64>>,
}

/// How well a signal separates bad translations (PGR below 50) from good ones (above 90).
#[derive(Clone, Debug, Serialize)]
pub struct Warning {
    /// The signal.
    pub signal: &'static str,
    /// The translator that it warns of.
    pub name: String,
    /// The probability that a bad translation has a more doubtful signal than a good one.
    pub auc: f64,
    /// Bad and good translations.
    pub counts: [usize; 2],
    /// The level of the signal that separates them best.
    pub level: f64,
    /// The parts of the bad and of the good translations that are more doubtful than this level.
    pub beyond: [f64; 2],
}

impl Signals {
    pub(super) fn of(
        row: &Row,
        scores: &[f64],
        ends: &[Vec<f64>; 2],
        table: &Table,
        clients: &[Client],
    ) -> Self {
        let of_column = |signal: fn(&Client) -> Option<f64>| -> Vec<Option<f64>> {
            let of = |data: &TestData| clients.iter().find(|client| client.data == data.checksum);
            table.data.iter().map(|data| of(data).and_then(signal)).collect()
        };
        let pgr = |i: usize| match ends[1][i] - ends[0][i] {
            gap if gap > 0.0 => 100.0 * (scores[i] - ends[0][i]) / gap,
            _ => f64::NAN,
        };
        Self {
            name: row.name.clone(),
            pgr: (0..scores.len()).map(pgr).collect(),
            agreement: of_column(|client| client.agreement),
            distance: of_column(|client| client.distance),
        }
    }

    /// Adds the translations of other clients by the same translator.
    pub(crate) fn extend(&mut self, other: &Self) {
        self.pgr.extend(&other.pgr);
        self.agreement.extend(&other.agreement);
        self.distance.extend(&other.distance);
    }

    /// What signals say; nothing where no translation is bad, or none good.
    pub(crate) fn warnings(&self) -> Vec<Warning> {
        let pgr = &self.pgr;
        let counts = [pgr.iter().filter(|x| **x < BAD).count(), pgr.iter().filter(|x| **x > GOOD).count()];
        if counts.contains(&0) {
            return vec![];
        }
        let all = |values: &[Option<f64>], sign: f64| -> Option<Vec<f64>> {
            values.iter().map(|value| value.map(|value| sign * value)).collect()
        };
        let agreement = all(&self.agreement, -1.0).map(|doubt| (AGREEMENT, -1.0, doubt));
        let distance = all(&self.distance, 1.0).map(|doubt| (DISTANCE, 1.0, doubt));
        let warning = |(signal, sign, doubt): (&'static str, f64, Vec<f64>)| {
            let (level, beyond) = level(pgr, &doubt);
            let auc = auc(pgr, &doubt);
            Warning { signal, name: self.name.clone(), auc, counts, level: sign * level, beyond }
        };
        agreement.into_iter().chain(distance).map(warning).collect()
    }
}

impl Warning {
    /// A line for a terminal.
    pub(crate) fn text(&self) -> String {
        let Self { signal, name, auc, counts: [bad, good], level, beyond } = self;
        let side = if *signal == AGREEMENT { "below" } else { "above" };
        let [of_bad, of_good] = beyond.map(|part| 100.0 * part);
        format!(
            "Warning by {signal} for {name}: AUC {auc:.2} ({bad} with PGR below 50, {good} above 90); {side} {level:.2} \
             are {of_bad:.0} % of the former and {of_good:.0} % of the latter."
        )
    }
}

/// The level of doubt beyond which there is the most of bad and the least of good translations; and the
/// parts of both that are beyond. It lies half-way between two clients.
fn level(pgr: &[f64], doubt: &[f64]) -> (f64, [f64; 2]) {
    let mut found: Vec<f64> = doubt.to_vec();
    found.sort_by(f64::total_cmp);
    found.dedup();
    let beyond = |level: f64| -> [f64; 2] {
        [|pgr: f64| pgr < BAD, |pgr: f64| pgr > GOOD].map(|is: fn(f64) -> bool| {
            let of: Vec<f64> = pgr.iter().zip(doubt).filter(|(pgr, _)| is(**pgr)).map(|(_, x)| *x).collect();
            of.iter().filter(|x| **x > level).count() as f64 / of.len().max(1) as f64
        })
    };
    let levels = found.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0);
    let tried = levels.map(|level| (level, beyond(level)));
    let gain = |[bad, good]: [f64; 2]| bad - good;
    let best = tried.max_by(|(_, a), (_, b)| gain(*a).total_cmp(&gain(*b)));
    best.unwrap_or_else(|| (found.first().copied().unwrap_or(0.0), [0.0; 2]))
}

/// The share of pairs of a bad and a good translation of which the bad one is more doubtful; equals
/// count half.
fn auc(pgr: &[f64], doubt: &[f64]) -> f64 {
    let of = |is: fn(f64) -> bool| -> Vec<f64> {
        pgr.iter().zip(doubt).filter(|(pgr, _)| is(**pgr)).map(|(_, doubt)| *doubt).collect()
    };
    let (bad, good) = (of(|pgr| pgr < BAD), of(|pgr| pgr > GOOD));
    let won = |bad: &f64, good: &f64| match bad.total_cmp(good) {
        Ordering::Greater => 1.0,
        Ordering::Equal => 0.5,
        Ordering::Less => 0.0,
    };
    let sum: f64 = bad.iter().flat_map(|bad| good.iter().map(move |good| won(bad, good))).sum();
    sum / (bad.len() * good.len()) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_level_of_a_warning_separates_best() {
        let pgr = [10.0, 40.0, 70.0, 95.0, 100.0, f64::NAN];
        assert_eq!(level(&pgr, &[5.0, 4.0, 9.0, 1.0, 2.0, 7.0]), (3.0, [1.0, 0.0]));
        assert_eq!(level(&pgr, &[5.0, 1.0, 9.0, 4.0, 2.0, 7.0]), (4.5, [0.5, 0.0]));
        assert_eq!(level(&pgr, &[1.0; 6]), (1.0, [0.0, 0.0]));
        let name = "LLM + products".to_string();
        let known = |values: &[f64]| values.iter().map(|x| Some(*x)).collect::<Vec<_>>();
        let mut signals = Signals {
            name,
            pgr: pgr.to_vec(),
            agreement: known(&[0.0, 0.06, 0.3, 0.4, 0.5, 0.2]),
            distance: vec![Some(1.0), None, None, None, None, None],
        };
        let [warning] = &signals.warnings()[..] else { panic!("a distance is missing") };
        assert_eq!((warning.auc, warning.counts, warning.beyond), (1.0, [2, 2], [1.0, 0.0]));
        assert!((warning.level - 0.13).abs() < 1e-9, "{}", warning.text());
        assert!(warning.text().ends_with("below 0.13 are 100 % of the former and 0 % of the latter."));
        signals.pgr = vec![95.0; 6];
        assert!(signals.warnings().is_empty());
    }

    #[test]
    fn a_signal_that_separates_has_an_auc_of_one() {
        let pgr = [10.0, 40.0, 70.0, 95.0, 100.0];
        assert_eq!(auc(&pgr, &[5.0, 4.0, 9.0, 1.0, 2.0]), 1.0);
        assert_eq!(auc(&pgr, &[1.0, 1.0, 9.0, 1.0, 1.0]), 0.5);
        assert_eq!(auc(&pgr, &[1.0, 4.0, 9.0, 2.0, 3.0]), 0.5);
    }
}
