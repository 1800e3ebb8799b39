//! Several clients' updates become one. No client is believed: an update that is far larger or
//! smaller than what shadow students learned, that is given twice, or that is nothing at all is
//! refused by the name of its file before anything is written.
//!
//! In: updates of one space, and the [`Norms`] of the shadow students. Out: one update.

use anyhow::Result;
use clap::ValueEnum;
use gradtx_run::failure::failed;
use gradtx_runtime::artifact::{Role, TupleStore, UpdateVector, checksum, little_endian};
use gradtx_runtime::text::shown;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::PathBuf;

/// So many times larger than the largest shadow student's, or smaller than the smallest's, is
/// a norm that no recipe explains.
const FAR: f64 = 10.0;

/// Euclidean norms of the TinyLM's shadow updates' updates.
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

/// How several updates become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Combine {
    /// Their mean.
    Mean,
    /// Their sum.
    Sum,
}

/// What is accepted although it is unusual.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allow {
    /// Updates of any norm.
    pub outliers: bool,
    /// The same update more than once.
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

/// Mean or sum of updates, added up in order; and the examples that they were trained on.
///
/// # Errors
/// When a sum is no number of 32 bits.
pub fn combine(updates: &[UpdateVector], how: Combine) -> Result<(Vec<f32>, u64)> {
    let share = match how {
        Combine::Mean => 1.0 / updates.len() as f64,
        Combine::Sum => 1.0,
    };
    let mut sum = vec![0.0f64; updates.first().map_or(0, |u| u.values.len())];
    let mut examples = 0u64;
    for update in updates {
        sum.iter_mut().zip(&update.values).for_each(|(s, &x)| *s += f64::from(x));
        examples = examples.saturating_add(update.meta.examples);
    }
    let combined: Vec<f32> = sum.into_iter().map(|s| (s * share) as f32).collect();
    match combined.iter().position(|x| !x.is_finite()) {
        None => Ok((combined, examples)),
        Some(at) => {
            let block = updates.first().map_or(0, |u| at / u.meta.space.width.max(1));
            let what =
                format!("the sum of {} updates is too large for 32 bits in block {block}", updates.len());
            Err(failed(what, "give --combine mean"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_run::failure::ErrorReport;
    use gradtx_runtime::artifact::{Privacy, UpdateMeta, UpdateSpace};

    fn update(values: [f32; 4]) -> UpdateVector {
        let space = UpdateSpace {
            blocks: 2,
            width: 2,
            layout: "a".into(),
            base_model: "b".into(),
            targets: vec![],
            rank: 1,
            alpha: 1.0,
            freeze_a: false,
            init: "c".into(),
        };
        let meta = UpdateMeta { space, examples: u64::MAX / 2, privacy: Privacy::None, refinement: false };
        UpdateVector { meta, values: values.into() }
    }

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

    #[test]
    fn sums_that_are_too_large_are_named() {
        let large = [update([1.0, 1.0, 3e38, 1.0]), update([2.0, 1.0, 3e38, 1.0]), update([0.0; 4])];
        let message = combine(&large, Combine::Sum).unwrap_err().to_string();
        assert!(message.contains("3 updates") && message.contains("block 1"), "{message}");
        let (mean, examples) = combine(&large, Combine::Mean).unwrap();
        assert_eq!((mean[0], mean[2], examples), (1.0, 2e38, u64::MAX));
    }
}
