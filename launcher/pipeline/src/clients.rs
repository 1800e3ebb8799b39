//! What a provider sees of the clients behind a translation: [`Clients`], in `clients.json`.
//!
//! In: their updates, as they were combined, and the tuple store. Out: norms, cosines, how far each is from
//! the shadow updates, and warnings. Nothing of it is an example of a client: all of it follows from the
//! updates that they sent.

use crate::aggregate::{AggregationInputs, Combine, Combined, Norms};
use crate::artifacts::Tuples;
use crate::calibration::{self, group_labels, single_pairs};
use anyhow::Result;
use gradtx_run::context::Context;
use gradtx_runtime::artifact::{Privacy, UpdateVector};
use gradtx_train::products::{Groups, Kernel};
use gradtx_train::shadows::{Calibration, Distance, Shadows};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The file in a translation's directory.
pub const CLIENTS_FILE: &str = "clients.json";
/// Of more clients only those with a warning are shown, and no table of cosines.
const SHOWN: usize = 12;

/// The clients of a translation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Clients {
    /// How their updates became one.
    pub combine: Combine,
    /// What of that is not as by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aggregation: Option<AggregationInputs>,
    /// Each of them, in the order in which they were given.
    pub clients: Vec<Client>,
    /// Cosines of all pairs.
    pub cosines: Vec<Vec<f64>>,
    /// Of what they became, where they are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub combined: Option<Whole>,
    /// Norms of the TinyLM's shadow updates.
    pub students: Norms,
    /// Which distances are usual; none where there are too few groups of shadows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usual: Option<Calibration>,
    /// Why they are not compared with the shadow updates, if they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_compared: Option<String>,
}

/// One client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Client {
    /// Name of its file or directory.
    pub name: String,
    /// Checksum of its file.
    pub checksum: String,
    /// Examples that it states.
    pub examples: u64,
    /// The guarantee that it states.
    pub privacy: Privacy,
    /// Norm of its update, as it was given.
    pub norm: f64,
    /// What it is multiplied by in the sum; none where updates are combined value by value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<f64>,
    /// How far it is from the shadow updates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distance: Option<Distance>,
    /// What is unusual about it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// What several updates became.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Whole {
    /// Its norm.
    pub norm: f64,
    /// How far it is from the shadow updates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distance: Option<Distance>,
}

/// What is known of the clients before they are compared with the shadows.
pub struct Given<'a> {
    /// The names of their files.
    pub names: Vec<String>,
    /// The files' checksums.
    pub checksums: &'a [String],
    /// Their updates.
    pub updates: &'a [UpdateVector],
    /// The updates as one.
    pub combined: &'a Combined,
    /// How.
    pub combine: Combine,
    /// What of that is not as by default.
    pub aggregation: Option<AggregationInputs>,
    /// Norms of the shadow students.
    pub students: Norms,
}

impl Clients {
    /// Compares clients with each other and with the shadow updates of the run; `tuples` are these, or
    /// why they are not there. What keeps a comparison from being made is a notice, not an error: the
    /// translation does not depend on it.
    pub fn compare(
        context: &Context,
        run: &Path,
        given: &Given<'_>,
        tuples: Result<&Tuples, String>,
    ) -> Self {
        let found = tuples.and_then(|tuples| {
            given.distances(context, run, tuples).map_err(|error| format!("{error:#}").replace('\n', " "))
        });
        let (mut distances, usual, not_compared) = match found {
            Ok((distances, usual)) => (distances, usual, None),
            Err(why) => (vec![], None, Some(why)),
        };
        let whole = given.updates.len() > 1;
        let combined = whole.then(|| Whole {
            norm: given.combined.values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt(),
            distance: distances.pop(),
        });
        let clients = (0..given.updates.len()).map(|i| given.client(i, distances.get(i).copied()));
        let mut clients = Self {
            combine: given.combine,
            aggregation: given.aggregation.clone(),
            clients: clients.collect(),
            cosines: given.combined.cosines.clone(),
            combined,
            students: given.students,
            usual,
            not_compared,
        };
        for i in 0..clients.clients.len() {
            clients.clients[i].warnings = clients.warnings(i);
        }
        clients
    }

    /// What is unusual about a client.
    fn warnings(&self, client: usize) -> Vec<String> {
        let mut warnings: Vec<String> = self.far(&self.clients[client].distance).into_iter().collect();
        let [least, most] = self.usual.as_ref().map_or([0.0, 1.0], |usual| usual.cosines);
        let others: Vec<usize> = (0..self.clients.len()).filter(|&other| other != client).collect();
        for &other in &others {
            let cosine = self.cosines[client][other];
            if cosine > most {
                warnings.push(format!(
                    "more like {} (cosine {cosine:.4}) than any two shadow updates are alike ({most:.4})",
                    self.clients[other].name
                ));
            }
        }
        // Directions, so that one update of a large norm is not all that there is of the others.
        let sum_of_cosines: f64 = others.iter().map(|&other| self.cosines[client][other]).sum();
        let square: f64 = others.iter().flat_map(|&i| others.iter().map(move |&j| self.cosines[i][j])).sum();
        if others.len() > 1 && square > 0.0 && sum_of_cosines / square.sqrt() < least.min(0.0) {
            let cosine = sum_of_cosines / square.sqrt();
            warnings.push(format!(
                "points away from the other clients: cosine {cosine:.4} with their mean direction"
            ));
        }
        warnings
    }

    /// What is said of an update that is far from the shadows.
    fn far(&self, distance: &Option<Distance>) -> Option<String> {
        let (usual, found) = (self.usual.as_ref()?, distance.as_ref()?);
        let mut above = vec![];
        if found.mahalanobis > usual.mahalanobis.warning {
            let warning = usual.mahalanobis.warning;
            above.push(format!("Mahalanobis distance {:.3} (warning level {warning:.3})", found.mahalanobis));
        }
        if found.outside > usual.outside.warning {
            let [found, warning] = [found.outside, usual.outside.warning].map(|share| 100.0 * share);
            above.push(format!("{found:.1} % outside their span (warning level {warning:.1} %)"));
        }
        if let Some(error) = found.predicted_error.filter(|error| *error > usual.error.errors.warning) {
            let warning = usual.error.errors.warning;
            above.push(format!("predicted error {error:.3} (warning level {warning:.3})"));
        }
        (!above.is_empty()).then(|| format!("far from the shadow updates: {}", above.join(", ")))
    }

    /// Shows it.
    pub fn show(&self, context: &Context) {
        let ui = &context.ui;
        let all = self.clients.len() <= SHOWN;
        for client in self.clients.iter().filter(|_| all) {
            ui.line(format!(
                "translate: {}: norm {:.4e}{}",
                client.name,
                client.norm,
                shown(&client.distance)
            ));
        }
        if self.clients.len() > 1 && all {
            ui.line("translate: cosines of the clients' updates");
            for (client, row) in self.clients.iter().zip(&self.cosines) {
                let row: Vec<String> = row.iter().map(|cosine| format!("{cosine:7.4}")).collect();
                ui.line(format!("  {}  {}", row.join(" "), client.name));
            }
        }
        if let Some(Whole { norm, distance }) = &self.combined {
            let count = self.clients.len();
            ui.line(format!("translate: {count} updates as one: norm {norm:.4e}{}", shown(distance)));
        }
        for client in &self.clients {
            for warning in &client.warnings {
                ui.notice(&format!("translate: warning: {}: {warning}", client.name));
            }
        }
        if let Some(why) = &self.not_compared {
            ui.line(format!("translate: not compared with the shadow updates: {why}"));
        }
    }
}

fn shown(distance: &Option<Distance>) -> String {
    let Some(Distance { mahalanobis, outside, predicted_error }) = distance else { return String::new() };
    let error = predicted_error.map_or(String::new(), |error| format!(", predicted error {error:.3}"));
    let outside = 100.0 * outside;
    format!(
        ", Mahalanobis distance {mahalanobis:.3} from the shadows, {outside:.1} % outside their span{error}"
    )
}

impl Given<'_> {
    fn client(&self, i: usize, distance: Option<Distance>) -> Client {
        let meta = &self.updates[i].meta;
        Client {
            name: self.names[i].clone(),
            checksum: self.checksums[i].clone(),
            examples: meta.examples,
            privacy: meta.privacy.clone(),
            norm: self.combined.norms[i],
            share: self.combined.shares.as_ref().map(|shares| shares[i]),
            distance,
            warnings: vec![],
        }
    }

    /// Of every update as it was given, and of several as one; and what is usual.
    fn distances(
        &self,
        context: &Context,
        run: &Path,
        tuples: &Tuples,
    ) -> Result<(Vec<Distance>, Option<Calibration>)> {
        let mut rows: Vec<&[f32]> = self.updates.iter().map(|update| update.values.as_slice()).collect();
        if rows.len() > 1 {
            rows.push(&self.combined.values);
        }
        let kernel = Kernel::read(&tuples.store, &single_pairs(tuples), &rows)?;
        let usual = calibration::of(context, run, tuples, &kernel.groups)?;
        let shadows = Shadows::new(&kernel.groups, &Groups::new(&group_labels(tuples)?))?;
        let model = usual.as_ref().map(|usual| &usual.error);
        let distance = |i: usize| shadows.distance(&kernel.clients[i], kernel.squares[i], model);
        Ok(((0..rows.len()).map(distance).collect::<Result<_>>()?, usual))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_train::shadows::{ErrorModel, Level};

    fn usual() -> Calibration {
        let level = |warning: f64| Level { median: 0.5 * warning, warning };
        let errors = level(0.8);
        let error = ErrorModel { penalty: 0.1, factor: 1.0, unit: 1.0, errors, rank_correlation: 0.5 };
        let (mahalanobis, outside) = (level(2.0), level(0.4));
        Calibration { shadows: 9, groups: 5, mahalanobis, outside, error, cosines: [-0.2, 0.9] }
    }

    fn clients(distance: Distance, cosines: Vec<Vec<f64>>) -> Clients {
        let client = |i: usize| Client {
            name: format!("client-{i}"),
            checksum: String::new(),
            examples: 1,
            privacy: Privacy::None,
            norm: 1.0,
            share: None,
            distance: Some(distance),
            warnings: vec![],
        };
        Clients {
            combine: Combine::Mean,
            aggregation: None,
            clients: (0..cosines.len()).map(client).collect(),
            cosines,
            combined: None,
            students: Norms { smallest: 1.0, median: 1.0, largest: 1.0 },
            usual: Some(usual()),
            not_compared: None,
        }
    }

    #[test]
    fn warnings_name_what_is_above_its_level() {
        let near = Distance { mahalanobis: 1.9, outside: 0.3, predicted_error: Some(0.7) };
        assert!(clients(near, vec![vec![1.0]]).warnings(0).is_empty());
        for (far, words) in [
            (Distance { mahalanobis: 2.1, ..near }, "Mahalanobis distance 2.100 (warning level 2.000)"),
            (Distance { outside: 0.5, ..near }, "50.0 % outside their span (warning level 40.0 %)"),
            (Distance { predicted_error: Some(0.9), ..near }, "predicted error 0.900 (warning level 0.800)"),
        ] {
            let found = clients(far, vec![vec![1.0]]).warnings(0);
            assert!(found.len() == 1 && found[0].contains(words), "{found:?}");
        }
    }

    #[test]
    fn colluding_and_opposing_clients_are_named() {
        let near = Distance { mahalanobis: 1.0, outside: 0.1, predicted_error: None };
        let cosines = |pair: f64, away: f64| {
            let mut rows = vec![vec![0.5; 4]; 4];
            (0..4).for_each(|i| rows[i][i] = 1.0);
            (rows[0][1], rows[1][0]) = (pair, pair);
            (0..3).for_each(|i| (rows[3][i], rows[i][3]) = (away, away));
            rows
        };
        let usual = clients(near, cosines(0.89, 0.3));
        assert!((0..4).all(|i| usual.warnings(i).is_empty()));
        let found = clients(near, cosines(0.99, -0.5));
        assert!(
            found.warnings(0)[0].contains("more like client-1 (cosine 0.9900)"),
            "{:?}",
            found.warnings(0)
        );
        assert!(found.warnings(1)[0].contains("more like client-0"));
        assert!(found.warnings(2).is_empty(), "{:?}", found.warnings(2));
        assert!(found.warnings(3)[0].contains("points away"), "{:?}", found.warnings(3));
    }
}
