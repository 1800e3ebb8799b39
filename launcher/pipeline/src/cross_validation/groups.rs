//! The groups of shadow pairs, and how they are held out.

use super::Job;
use super::variants::rows_with;
use crate::artifacts::Tuples;
use crate::variant::Variant;
use anyhow::{Context as _, Result};
use gradtx_kernels::rng::{Stream, derive, derive_named};
use gradtx_run::config::{Config, GroupBy};
use gradtx_run::failure::{failed, unusable};
use gradtx_runtime::text::shown;
use gradtx_train::examples::{Data, Group};
use std::collections::{BTreeMap, HashSet};

/// A group of shadows with its rows of the public data and of the test data.
#[derive(Clone)]
pub(super) struct Unit {
    pub(super) name: String,
    pub(super) shadows: Vec<usize>,
    /// Rows that the first of the shadows was trained on.
    pub(super) subset: Vec<usize>,
    pub(super) rows: Vec<usize>,
    pub(super) test: Vec<usize>,
}

/// What a client is trained and tested on.
pub(super) struct Examples {
    pub(super) name: String,
    pub(super) subset: Vec<usize>,
    pub(super) test: Vec<usize>,
}

impl Examples {
    pub(super) fn of(unit: &Unit) -> Self {
        Self { name: unit.name.clone(), subset: unit.subset.clone(), test: unit.test.clone() }
    }

    /// The first half of the examples of one group, and the second half of another's.
    pub(super) fn mixture(first: &Unit, second: &Unit) -> Self {
        let halves = |a: &[usize], b: &[usize]| -> Vec<usize> {
            let mut rows = [&a[..a.len() / 2], &b[b.len() / 2..]].concat();
            rows.sort_unstable();
            rows.dedup();
            rows
        };
        Self {
            name: format!("{} and {}", first.name, second.name),
            subset: halves(&first.subset, &second.subset),
            test: halves(&first.test, &second.test),
        }
    }
}

/// The groups of the shadow pairs, with their rows.
pub(super) fn units(config: &Config, tuples: &Tuples, public: &Data, job: &Job) -> Result<Vec<Unit>> {
    let known = &tuples.store.manifest().provenance["data"];
    if *known != *public.checksum {
        let what = format!("data.public: is not the data that the tuples were made of ({known})");
        return Err(failed(what, "give the same files; see `gradtx inspect` of the tuple store"));
    }
    let Some(labels) = tuples.groups()? else {
        let what = "the tuple store does not say which shadows are of one group: an older version made it";
        return Err(failed(what, "run `gradtx curate` again in a new directory"));
    };
    let subsets = tuples.subsets()?;
    let column = match &config.curate.group_by {
        GroupBy::Column(column) if config.curate.dirichlet_alpha == 0.0 => Some(column.as_str()),
        _ => None,
    };
    let by_column = column.map(|column| public.groups(column)).transpose()?;
    let tests = match &job.data {
        None => None,
        Some(path) => {
            let test = Data::read_for_test(std::slice::from_ref(path), &config.data, "--data")?;
            Some((column.map(|column| test.groups(column)).transpose()?, test.records.len()))
        }
    };
    let mut shadows: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (pair, label) in labels.iter().enumerate() {
        shadows.entry(*label).or_default().push(pair);
    }
    let key = derive_named(config.seed, "test examples of groups");
    let mut units = vec![];
    for (label, pairs) in shadows {
        let (name, rows) = match &by_column {
            Some(groups) => {
                let group: &Group = groups.get(label).with_context(|| {
                    format!("groups.json names group {label}; data.public has {}", groups.len())
                })?;
                (group.name.clone(), group.rows.clone())
            }
            None => (format!("shadow {label}"), subsets[pairs[0]].clone()),
        };
        let candidates: Vec<usize> = match &tests {
            Some((Some(groups), _)) => {
                groups.iter().find(|group| group.name == name).map_or(vec![], |group| group.rows.clone())
            }
            Some((None, count)) => (0..*count).collect(),
            None => {
                let seen: HashSet<usize> = subsets[pairs[0]].iter().copied().collect();
                rows.iter().copied().filter(|row| !seen.contains(row)).collect()
            }
        };
        if candidates.is_empty() {
            let what = match &job.data {
                Some(path) => format!("{}: no test example of group `{name}`", shown(path)),
                None => format!("group `{name}`: its client was trained on all of its examples"),
            };
            return Err(failed(what, "give test examples of every group with --data"));
        }
        let order = Stream::new(derive(key, label as u64)).permutation(candidates.len());
        let mut test: Vec<usize> = order.into_iter().take(job.examples).map(|i| candidates[i]).collect();
        test.sort_unstable();
        let shadows = pairs.iter().map(|&pair| tuples.store.shadow(pair)).collect();
        units.push(Unit { name, shadows, subset: subsets[pairs[0]].clone(), rows, test });
    }
    Ok(units)
}

/// The groups in folds, drawn by the seed.
pub(super) fn folds(units: Vec<Unit>, count: usize, seed: u64) -> Result<Vec<Vec<Unit>>> {
    if count < 2 || units.len() < count {
        return Err(unusable(format!(
            "--folds is {count}: expected 2 to {}, the number of groups of shadows",
            units.len()
        )));
    }
    let order = Stream::new(derive_named(seed, "folds of cross-validation")).permutation(units.len());
    let mut at: Vec<(usize, Unit)> = order.into_iter().zip(units).collect();
    at.sort_by_key(|(place, _)| *place);
    let mut folds: Vec<Vec<Unit>> = (0..count).map(|_| vec![]).collect();
    at.into_iter().enumerate().for_each(|(i, (_, unit))| folds[i % count].push(unit));
    Ok(folds)
}

/// The folds of [`Variant::UnseenValue`]: for each text, the groups whose name contains it.
pub(super) fn left_out(units: &[Unit], job: &Job) -> Result<Vec<Vec<Unit>>> {
    if !job.variants.contains(&Variant::UnseenValue) {
        return Ok(vec![]);
    }
    let texts = &job.leave_out;
    let with = |text: &String| units.iter().filter(|unit| unit.name.contains(text)).cloned().collect();
    let folds: Vec<Vec<Unit>> = texts.iter().map(with).collect();
    for (text, fold) in texts.iter().zip(&folds) {
        if fold.is_empty() || fold.len() == units.len() {
            let found = if fold.is_empty() { "no group has a name" } else { "all groups have names" };
            return Err(unusable(format!(
                "--leave-out: {found} with `{text}`: expected a part of the names of some of the {} groups, such as `{}`",
                units.len(),
                units[0].name
            )));
        }
    }
    Ok(folds)
}

/// The group whose examples are mixed with those of a unit.
pub(super) fn partner(units: &[Unit], at: usize) -> Result<&Unit> {
    let next = &units[(at + 1) % units.len()];
    if units.len() < 2 {
        let what = format!("group `{}` is held out alone: a mixture needs two held-out groups", next.name);
        return Err(failed(what, "give fewer folds, or leave more groups out together"));
    }
    Ok(next)
}

/// Rows of prompts that are not to be asked.
pub(super) fn not_asked(public: &Data, job: &Job) -> Result<Vec<usize>> {
    if !job.variants.contains(&Variant::FewerPrompts) {
        return Ok(vec![]);
    }
    let rows = rows_with(&public.records, &job.without_prompts);
    if rows.is_empty() || rows.len() == public.records.len() {
        return Err(unusable(format!(
            "--without-prompts: {} of {} public prompts contain one of its texts: expected some, and not all",
            rows.len(),
            public.records.len()
        )));
    }
    Ok(rows)
}

/// Fails unless there are prompts beside those of held-out groups and those that are not to be asked.
pub(super) fn expect_prompts(left_out: &[usize], all: usize) -> Result<()> {
    let left_out: HashSet<usize> = left_out.iter().copied().collect();
    if left_out.len() < all {
        return Ok(());
    }
    let what = "--without-prompts: no public prompt of the other groups is left to ask";
    Err(failed(what, "give texts of fewer prompts"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(i: usize) -> Unit {
        Unit { name: format!("t{i}"), shadows: vec![i], subset: vec![], rows: vec![], test: vec![] }
    }

    #[test]
    fn groups_are_left_out_by_their_names() {
        let units: Vec<Unit> = (8..12).map(unit).collect();
        let folds = |texts: &[&str]| {
            let leave_out = texts.iter().map(|text| (*text).to_string()).collect();
            let job = Job { leave_out, variants: vec![Variant::UnseenValue], ..Job::default() };
            left_out(&units, &job)
        };
        let names: Vec<Vec<String>> = folds(&["t1", "8", "11"])
            .unwrap()
            .iter()
            .map(|fold| fold.iter().map(|unit| unit.name.clone()).collect())
            .collect();
        assert_eq!(names, [vec!["t10", "t11"], vec!["t8"], vec!["t11"]]);
        let message = |texts: &[&str]| folds(texts).err().unwrap().to_string();
        assert!(message(&["x"]).contains("no group has a name with `x`"));
        assert!(message(&["t"]).contains("all groups have names with `t`"));
        assert!(left_out(&units, &Job::default()).unwrap().is_empty());
        assert!(expect_prompts(&[2, 0, 2], 3).is_ok() && expect_prompts(&[2, 0, 1], 3).is_err());
    }

    #[test]
    fn a_mixture_has_half_of_both_groups() {
        let of = |rows: std::ops::Range<usize>| Unit {
            subset: rows.clone().collect(),
            test: rows.clone().map(|row| row + 100).collect(),
            ..unit(rows.start)
        };
        let found = Examples::mixture(&of(0..4), &of(10..16));
        assert_eq!(found.subset, [0, 1, 13, 14, 15]);
        assert_eq!(found.test, [100, 101, 113, 114, 115]);
        assert_eq!(found.name, "t0 and t10");
        assert!(partner(&[unit(1)], 0).is_err());
    }

    #[test]
    fn every_group_is_in_one_fold() {
        let folds = folds((0..10).map(unit).collect(), 4, 7).unwrap();
        assert_eq!(folds.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 2, 2]);
        let mut all: Vec<usize> = folds.iter().flatten().map(|unit| unit.shadows[0]).collect();
        assert_ne!(all, (0..10).collect::<Vec<_>>());
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
        assert!(super::folds(vec![unit(0)], 2, 7).is_err());
    }
}
