//! [`check`]: which updates clients may send.

use anyhow::Result;
use gradtx_run::failure::failed;
use gradtx_runtime::artifact::{Role, TupleStore, UpdateVector, checksum, little_endian};
use gradtx_runtime::text::shown;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::PathBuf;

/// So many times larger than the largest shadow student's, or smaller than the smallest's, is
/// a norm that no recipe explains.
const FAR: f64 = 10.0;

/// Euclidean norms of the TinyLM's shadow updates.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Norms {
    /// The smallest.
    pub smallest: f64,
    /// The one in the middle.
    pub median: f64,
    /// The largest.
    pub largest: f64,
}

impl Norms {
    /// Of all student updates of a store.
    pub fn of(store: &TupleStore) -> Result<Self> {
        let mut update = vec![0.0; store.space(Role::Student).values()];
        let mut norms = Vec::with_capacity(store.pairs() * store.steps());
        for pair in 0..store.pairs() {
            for step in 0..store.steps() {
                store.read(Role::Student, pair, step, &mut update)?;
                norms.push(norm(&update));
            }
        }
        norms.sort_by(f64::total_cmp);
        let at = |i: usize| norms.get(i).copied().unwrap_or(0.0);
        Ok(Self { smallest: at(0), median: at(norms.len() / 2), largest: at(norms.len().saturating_sub(1)) })
    }
}

fn norm(update: &[f32]) -> f64 {
    update.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt()
}

/// What is accepted although it is unusual.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct Allow {
    /// Accept updates whose norm is far from those of the shadow updates.
    #[arg(id = "allow_outliers", long = "allow-outliers")]
    pub outliers: bool,
    /// Accept the same update more than once.
    #[arg(id = "allow_duplicates", long = "allow-duplicates")]
    pub duplicates: bool,
}

/// Fails, naming the file, unless every update is what a client may send.
pub fn check(files: &[PathBuf], updates: &[UpdateVector], norms: &Norms, allow: Allow) -> Result<()> {
    let mut seen: HashMap<String, &PathBuf> = HashMap::new();
    for (path, update) in files.iter().zip(updates) {
        let place = shown(path);
        if !allow.outliers
            && let Some(why) = far(norm(&update.values), norms)
        {
            return Err(failed(
                format!("{place}: {why}"),
                "ask this client for its settings; if it is meant so, give --allow-outliers",
            ));
        }
        let sum = checksum(&little_endian(&update.values));
        if let Some(before) = seen.insert(sum, path).filter(|_| !allow.duplicates) {
            return Err(failed(
                format!("{place}: the same update as {}: it would count twice", shown(before)),
                "leave one of them out; if it is meant so, give --allow-duplicates",
            ));
        }
    }
    Ok(())
}

/// What is unusual about a norm, if anything.
fn far(norm: f64, norms: &Norms) -> Option<String> {
    let Norms { smallest, largest, .. } = *norms;
    if norm == 0.0 {
        return Some("every value is zero: its client has learned nothing".into());
    }
    let (than, times) = match norm {
        norm if norm > FAR * largest => {
            (format!("largest of the shadow updates ({largest:.3e})"), norm / largest)
        }
        norm if FAR * norm < smallest => {
            (format!("smallest of the shadow updates ({smallest:.3e})"), norm / smallest)
        }
        _ => return None,
    };
    Some(format!(
        "its norm is {norm:.3e}, {times:.3} times the {than}: it would drown the others, or be lost"
    ))
}

#[cfg(test)]
mod tests {
    use super::super::tests::update;
    use super::*;
    use gradtx_run::failure::ErrorReport;

    const NORMS: Norms = Norms { smallest: 1.0, median: 2.0, largest: 4.0 };

    #[test]
    fn updates_that_no_client_may_send_are_named() {
        let files = ["a", "b", "c"].map(PathBuf::from);
        let with = |last: [f32; 4]| [update([1.0; 4]), update([0.5; 4]), update(last)];
        let refused = |updates: &[UpdateVector], words: &[&str], allow: Allow| {
            let error_report =
                ErrorReport::from(&check(&files, updates, &NORMS, Allow::default()).unwrap_err());
            let said = error_report.message + &error_report.hint.unwrap_or_default();
            assert!(words.iter().all(|word| said.contains(word)), "{said}");
            check(&files, updates, &NORMS, allow).unwrap();
        };
        let outliers = Allow { outliers: true, duplicates: false };
        refused(&with([100.0; 4]), &["c:", "50.000 times the largest", "--allow-outliers"], outliers);
        refused(&with([1e-3; 4]), &["c:", "0.002 times the smallest"], outliers);
        refused(&with([0.0; 4]), &["c:", "every value is zero"], outliers);
        let duplicates = Allow { outliers: false, duplicates: true };
        refused(&with([1.0; 4]), &["c:", "the same update as a", "--allow-duplicates"], duplicates);
        check(&files, &with([1.0, 1.0, 1.0, -1.0]), &NORMS, Allow::default()).unwrap();
        check(&files, &with([19.0; 4]), &NORMS, Allow::default()).unwrap();
    }
}
