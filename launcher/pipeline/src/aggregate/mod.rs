//! Several clients' updates become one. No client is believed: an update that is far larger or
//! smaller than what shadow students learned, that is given twice, or that is nothing at all is
//! refused by the name of its file before anything is written.
//!
//! In: updates of one space, and the [`Norms`] of the shadow students. Out: one update: their mean or sum,
//! weighted or not, or a combination that a minority of them cannot decide ([`Combine`]).

mod robust;

use anyhow::Result;
use clap::ValueEnum;
use gradtx_run::failure::{failed, unusable, unusable_with};
use gradtx_runtime::artifact::{Role, TupleStore, UpdateVector, checksum, little_endian};
use gradtx_runtime::text::shown;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
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
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Combine {
    /// Their mean.
    #[default]
    Mean,
    /// Their sum.
    Sum,
    /// Their mean, each weighted by the examples that it was trained on, or by --weights.
    Weighted,
    /// The median of every value.
    Median,
    /// The mean of every value without its smallest and largest (--trim).
    TrimmedMean,
    /// The point whose distances to all updates have the smallest sum.
    GeometricMedian,
}

impl Combine {
    /// The name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// How several updates become one, with what the choice needs.
#[derive(Clone, Debug, Default, PartialEq, clap::Args)]
pub struct Aggregation {
    /// How several updates become one.
    #[arg(long, value_enum, default_value_t = Combine::Mean)]
    pub combine: Combine,
    /// Weights of the updates, in their order, for --combine weighted.
    #[arg(long, value_name = "W,W,...", value_delimiter = ',')]
    pub weights: Vec<f64>,
    /// Scale updates of a larger norm down to this one before they are combined: a number, or
    /// `median` for the median norm of the updates that are given.
    #[arg(long, value_name = "NORM|median")]
    pub clip_norm: Option<ClipNorm>,
    /// Share of the updates that --combine trimmed-mean leaves out on each side of every value (default: 0.2).
    #[arg(long, value_name = "SHARE")]
    pub trim: Option<f64>,
}

/// The largest norm of an update that is combined with others.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClipNorm {
    /// The median norm of the updates.
    Median,
    /// This one.
    #[serde(untagged)]
    Norm(f64),
}

impl std::str::FromStr for ClipNorm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            _ if text == "median" => Ok(Self::Median),
            Ok(norm) if norm > 0.0 && f64::is_finite(norm) => Ok(Self::Norm(norm)),
            _ => Err("expected a number above 0, or median".into()),
        }
    }
}

/// Where `--trim` is not given.
const TRIM: f64 = 0.2;

/// What of an [`Aggregation`] is not as by default, apart from [`Combine`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AggregationInputs {
    /// Weights of the updates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weights: Vec<f64>,
    /// The largest norm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<ClipNorm>,
    /// Share of the updates that a trimmed mean leaves out on each side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trim: Option<f64>,
}

impl Aggregation {
    /// As records have it.
    pub fn inputs(&self) -> Option<AggregationInputs> {
        let Self { weights, clip_norm, trim, combine } = self.clone();
        let trim = trim.or(Some(TRIM)).filter(|_| combine == Combine::TrimmedMean);
        let inputs = AggregationInputs { weights, clip_norm, trim };
        Some(inputs).filter(|inputs| *inputs != AggregationInputs::default())
    }

    /// From a record.
    pub fn recorded(combine: Combine, inputs: Option<AggregationInputs>) -> Self {
        let AggregationInputs { weights, clip_norm, trim } = inputs.unwrap_or_default();
        Self { combine, weights, clip_norm, trim }
    }
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

impl Aggregation {
    /// Fails unless the options fit together and so many updates.
    fn check(&self, updates: usize) -> Result<()> {
        let Self { combine, weights, trim, .. } = self;
        if !weights.is_empty() && *combine != Combine::Weighted {
            return Err(unusable("--weights: has an effect with --combine weighted only"));
        }
        if !weights.is_empty() && weights.len() != updates {
            let what = format!("--weights: {} weights of {updates} updates", weights.len());
            return Err(unusable_with(what, Some("give one for each update, in their order".into())));
        }
        let is_weight = |w: &f64| w.is_finite() && *w >= 0.0;
        let sum: f64 = weights.iter().sum();
        let are_weights = weights.iter().all(is_weight) && sum > 0.0 && sum.is_finite();
        if !weights.is_empty() && !are_weights {
            return Err(unusable("--weights: expected numbers from 0, of which one at least is above 0"));
        }
        if trim.is_some() && *combine != Combine::TrimmedMean {
            return Err(unusable("--trim: has an effect with --combine trimmed-mean only"));
        }
        if trim.is_some_and(|trim| !(trim > 0.0 && trim < 0.5)) {
            return Err(unusable("--trim: expected a share above 0 and below 0.5"));
        }
        Ok(())
    }

    /// Updates that a trimmed mean leaves out on each side.
    fn left_out(&self, updates: usize) -> Result<usize> {
        let trim = self.trim.unwrap_or(TRIM);
        // A share such as 0.1 is a little more or less than the number that it stands for.
        let left_out = (trim * updates as f64 + 1e-9) as usize;
        if left_out > 0 && 2 * left_out < updates {
            return Ok(left_out);
        }
        let what = format!("--trim {trim}: leaves none of {updates} updates out: it would be the mean");
        let hint = match updates {
            0..3 => "a trimmed mean needs three updates at least".into(),
            _ => format!("give --trim {:.3} or more, or --combine mean", 1.0 / updates as f64 + 5e-4),
        };
        Err(unusable_with(what, Some(hint)))
    }

    /// The weights that are given, or the examples of every update.
    fn weights_of(&self, files: &[PathBuf], updates: &[UpdateVector]) -> Result<Vec<f64>> {
        if !self.weights.is_empty() {
            return Ok(self.weights.clone());
        }
        for (path, update) in files.iter().zip(updates) {
            if update.meta.examples == 0 {
                let what = format!("{}: does not state its number of examples", shown(path));
                return Err(failed(what, "give --weights, one for each update, in their order"));
            }
        }
        Ok(updates.iter().map(|update| update.meta.examples as f64).collect())
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

    #[test]
    fn records_keep_what_is_not_as_by_default() {
        assert_eq!(how(Combine::Median).inputs(), None);
        let all = Aggregation { clip_norm: Some(ClipNorm::Norm(2.0)), ..how(Combine::TrimmedMean) };
        let inputs = all.inputs();
        let text = serde_json::to_string(&inputs).unwrap();
        assert_eq!(text, r#"{"clip_norm":2.0,"trim":0.2}"#);
        let back = Aggregation::recorded(Combine::TrimmedMean, serde_json::from_str(&text).unwrap());
        assert_eq!(back, Aggregation { trim: Some(0.2), ..all });
        let median = AggregationInputs { clip_norm: Some(ClipNorm::Median), ..AggregationInputs::default() };
        let text = serde_json::to_string(&median).unwrap();
        assert_eq!(serde_json::from_str::<AggregationInputs>(&text).unwrap(), median, "{text}");
    }
}
