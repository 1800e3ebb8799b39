//! Several clients' updates become one. No client is believed: an update that is far larger or
//! smaller than what shadow students learned, that is given twice, or that is nothing at all is
//! refused by the name of its file before anything is written.
//!
//! In: updates of one space, and the [`Norms`] of the shadow students. Out: one update: their mean or sum,
//! weighted or not, or a combination that a minority of them cannot decide ([`Combine`]).

mod accept;
mod options;
mod robust;

pub use accept::{Allow, Norms, check};
pub use options::{Aggregation, AggregationInputs, ClipNorm, Combine};

use anyhow::Result;
use gradtx_run::failure::failed;
use gradtx_runtime::artifact::UpdateVector;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Updates as one.
#[derive(Debug)]
pub struct Combined {
    /// The updates that were scaled down, as they were combined: each with its place among all.
    pub clipped: BTreeMap<usize, Vec<f32>>,
    /// Norms of the updates as they were given.
    pub norms: Vec<f64>,
    /// Cosines of all pairs of updates.
    pub cosines: Vec<Vec<f64>>,
    /// What each is multiplied by before they are added up; none where they are combined value by value.
    pub shares: Option<Vec<f64>>,
    /// `[L · d]`
    pub values: Vec<f32>,
    /// Examples that they were trained on, of all of them together.
    pub examples: u64,
}

/// Updates as one; `files` are where they are from.
///
/// # Errors
/// When the options do not fit the updates, or a sum is no number of 32 bits.
pub fn combine(files: &[PathBuf], updates: &[UpdateVector], how: &Aggregation) -> Result<Combined> {
    how.check(updates.len())?;
    let all: Vec<&[f32]> = updates.iter().map(|update| update.values.as_slice()).collect();
    let products = robust::inner_products(&all);
    let norms: Vec<f64> = (0..all.len()).map(|i| products[i][i].sqrt()).collect();
    let cosine = |i: usize, j: usize| products[i][j] / (norms[i] * norms[j]).max(f64::MIN_POSITIVE);
    let cosines = (0..all.len()).map(|i| (0..all.len()).map(|j| cosine(i, j)).collect()).collect();
    let clipped = how.clip_norm.map_or_else(BTreeMap::new, |clip| clipped(&all, &norms, clip));
    let rows: Vec<&[f32]> =
        all.iter().enumerate().map(|(i, update)| clipped.get(&i).map_or(*update, Vec::as_slice)).collect();
    let (weights, total) = match how.combine {
        Combine::Mean => (vec![1.0; rows.len()], rows.len() as f64),
        Combine::Sum => (vec![1.0; rows.len()], 1.0),
        Combine::Weighted => {
            let weights = how.weights_of(files, updates)?;
            let total = weights.iter().sum();
            (weights, total)
        }
        Combine::GeometricMedian => (robust::geometric_median(&robust::inner_products(&rows)), 1.0),
        Combine::Median | Combine::TrimmedMean => (vec![], 1.0),
    };
    let values = match how.combine {
        Combine::Median => robust::median(&rows),
        Combine::TrimmedMean => robust::trimmed_mean(&rows, how.left_out(rows.len())?),
        _ => weighted_sum(&rows, &weights, 1.0 / total),
    };
    let width = updates.first().map_or(1, |update| update.meta.space.width.max(1));
    if let Some(at) = values.iter().position(|x| !x.is_finite()) {
        let block = at / width;
        let what = format!("the sum of {} updates is too large for 32 bits in block {block}", updates.len());
        return Err(failed(what, "give --combine mean"));
    }
    let shares = (!weights.is_empty()).then(|| weights.iter().map(|weight| weight * (1.0 / total)).collect());
    let examples = updates.iter().fold(0u64, |sum, update| sum.saturating_add(update.meta.examples));
    Ok(Combined { clipped, norms, cosines, shares, values, examples })
}

/// Updates times their weights, added up in order, and multiplied by `scale`.
fn weighted_sum(updates: &[&[f32]], weights: &[f64], scale: f64) -> Vec<f32> {
    let mut sum = vec![0.0f64; updates.first().map_or(0, |update| update.len())];
    for (update, weight) in updates.iter().zip(weights) {
        sum.iter_mut().zip(*update).for_each(|(s, &x)| *s += weight * f64::from(x));
    }
    sum.into_iter().map(|s| (s * scale) as f32).collect()
}

/// Updates of a larger norm, scaled down to it.
fn clipped(updates: &[&[f32]], norms: &[f64], clip: ClipNorm) -> BTreeMap<usize, Vec<f32>> {
    let most = match clip {
        ClipNorm::Norm(norm) => norm,
        ClipNorm::Median => {
            let mut sorted = norms.to_vec();
            sorted.sort_by(f64::total_cmp);
            let n = sorted.len();
            0.5 * (sorted[(n - 1) / 2] + sorted[n / 2])
        }
    };
    let scaled = |(i, norm): (usize, &f64)| {
        let by = most / norm;
        (i, updates[i].iter().map(|&x| (f64::from(x) * by) as f32).collect())
    };
    norms.iter().enumerate().filter(|(_, norm)| **norm > most).map(scaled).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use gradtx_run::failure::ErrorReport;
    use gradtx_runtime::artifact::{Privacy, UpdateMeta, UpdateSpace};

    pub(super) fn update(values: [f32; 4]) -> UpdateVector {
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

    fn files(count: usize) -> Vec<PathBuf> {
        (0..count).map(|i| PathBuf::from(format!("client-{i}"))).collect()
    }

    fn how(combine: Combine) -> Aggregation {
        Aggregation { combine, ..Aggregation::default() }
    }

    #[test]
    fn sums_that_are_too_large_are_named() {
        let large = [update([1.0, 1.0, 3e38, 1.0]), update([2.0, 1.0, 3e38, 1.0]), update([0.0; 4])];
        let message = combine(&files(3), &large, &how(Combine::Sum)).unwrap_err().to_string();
        assert!(message.contains("3 updates") && message.contains("block 1"), "{message}");
        let Combined { values, examples, .. } = combine(&files(3), &large, &how(Combine::Mean)).unwrap();
        assert_eq!((values[0], values[2], examples), (1.0, 2e38, u64::MAX));
    }

    #[test]
    fn weights_are_examples_unless_they_are_given() {
        let mut updates = [update([1.0, 0.0, 2.0, 4.0]), update([3.0, 0.0, 2.0, 0.0])];
        (updates[0].meta.examples, updates[1].meta.examples) = (300, 100);
        let of = |updates: &[UpdateVector], weights: &[f64]| {
            let how = Aggregation { weights: weights.into(), ..how(Combine::Weighted) };
            combine(&files(2), updates, &how).map(|combined| (combined.values, combined.shares.unwrap()))
        };
        assert_eq!(of(&updates, &[]).unwrap(), (vec![1.5, 0.0, 2.0, 3.0], vec![0.75, 0.25]));
        assert_eq!(of(&updates, &[0.0, 2.0]).unwrap().0, updates[1].values);
        for wrong in [&[1.0][..], &[-1.0, 2.0], &[0.0, 0.0], &[f64::NAN, 1.0], &[f64::MAX, f64::MAX]] {
            assert!(of(&updates, wrong).unwrap_err().to_string().contains("--weights"), "{wrong:?}");
        }
        updates[1].meta.examples = 0;
        let message = of(&updates, &[]).unwrap_err().to_string();
        assert!(message.contains("client-1: does not state"), "{message}");
    }

    #[test]
    fn large_updates_are_scaled_down() {
        let updates =
            [update([3.0, 0.0, 4.0, 0.0]), update([0.0, 50.0, 0.0, 0.0]), update([0.0, 0.0, 0.0, 1.0])];
        let of = |clip_norm: ClipNorm| {
            let how = Aggregation { clip_norm: Some(clip_norm), ..how(Combine::Sum) };
            combine(&files(3), &updates, &how).unwrap()
        };
        assert_eq!(of(ClipNorm::Median).values, [3.0, 5.0, 4.0, 1.0]);
        assert_eq!(of(ClipNorm::Norm(1.0)).values, [0.6, 1.0, 0.8, 1.0]);
        let combined = of(ClipNorm::Norm(1e3));
        assert_eq!((combined.values, combined.norms), (vec![3.0, 50.0, 4.0, 1.0], vec![5.0, 50.0, 1.0]));
        assert!(combined.clipped.is_empty());
        for (text, is_norm) in
            [("median", true), ("2.5", true), ("0", false), ("inf", false), ("mean", false)]
        {
            assert_eq!(text.parse::<ClipNorm>().is_ok(), is_norm, "{text}");
        }
    }

    #[test]
    fn no_robust_choice_follows_one_poisoned_update() {
        let honest = [[1.0, 2.0, 3.0, 4.0], [1.1, 2.1, 2.9, 4.2], [0.9, 1.8, 3.1, 3.9], [1.0, 2.2, 3.0, 4.1]];
        let mut updates: Vec<UpdateVector> = honest.map(update).into();
        updates.push(update([-100.0, -200.0, -300.0, -400.0]));
        let far = |how: &Aggregation| {
            let combined = combine(&files(5), &updates, how).unwrap();
            let errors = combined.values.iter().zip(honest[0]).map(|(x, want)| (x - want).abs());
            errors.fold(0.0f32, f32::max)
        };
        assert!(far(&how(Combine::Mean)) > 50.0);
        for combine in [Combine::Median, Combine::TrimmedMean, Combine::GeometricMedian] {
            let error = far(&how(combine));
            assert!(error < 0.4, "{combine:?}: {error}");
        }
        let clipped = Aggregation { clip_norm: Some(ClipNorm::Median), ..how(Combine::Mean) };
        assert!(far(&clipped) < 2.0);
    }

    #[test]
    fn options_that_do_nothing_are_refused() {
        let updates = [update([1.0; 4]), update([2.0; 4]), update([3.0; 4])];
        let refused = |how: Aggregation, words: &str| {
            let report = ErrorReport::from(&combine(&files(3), &updates, &how).unwrap_err());
            let said = report.message + &report.hint.unwrap_or_default();
            assert!(said.contains(words), "{said}");
        };
        refused(Aggregation { weights: vec![1.0; 3], ..how(Combine::Mean) }, "--combine weighted only");
        refused(Aggregation { trim: Some(0.3), ..how(Combine::Median) }, "--combine trimmed-mean only");
        refused(Aggregation { trim: Some(0.5), ..how(Combine::TrimmedMean) }, "below 0.5");
        refused(how(Combine::TrimmedMean), "--trim 0.334 or more");
        let third = Aggregation { trim: Some(0.334), ..how(Combine::TrimmedMean) };
        assert_eq!(combine(&files(3), &updates, &third).unwrap().values, [2.0; 4]);
    }
}
