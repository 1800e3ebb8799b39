//! Who gets which rows: public and private halves, shadow subsets, clients, test sets.
//!
//! Everything is a list of row numbers drawn from a key, and written down
//! ([`Split`]), so that anyone can see afterwards which example went where.

use crate::artifact::{read_versioned, write_versioned};
use crate::{Error, Result};
use gradtx_kernels::rng::{Stream, derive, derive_named};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

const FORMAT: &str = "gradtx.split";
const VERSION: u64 = 1;

/// Rows in two parts at random, each in increasing order. The first gets `share` of
/// them, rounded to the nearest whole number.
///
/// # Panics
/// When `share` is not between 0 and 1.
pub fn two_parts(rows: &[usize], share: f64, key: u64) -> (Vec<usize>, Vec<usize>) {
    assert!((0.0..=1.0).contains(&share), "a share of {share}");
    let first = (rows.len() as f64 * share).round() as usize;
    let mut order: Vec<usize> = shuffled(rows, key);
    let mut second = order.split_off(first);
    order.sort_unstable();
    second.sort_unstable();
    (order, second)
}

/// Rows in `parts` parts at random whose sizes differ by at most one (the clients).
pub fn even_parts(rows: &[usize], parts: usize, key: u64) -> Vec<Vec<usize>> {
    let order = shuffled(rows, key);
    let mut out = vec![vec![]; parts];
    order.into_iter().enumerate().for_each(|(i, row)| out[i % parts].push(row));
    out.iter_mut().for_each(|part| part.sort_unstable());
    out
}

/// Rows of several groups in `parts` parts at random: each group's rows are divided by
/// proportions drawn from Dirichlet(`alpha`), so a small α gives parts of few groups and
/// of unequal size. Every row is in one part; a part may be empty.
pub fn skewed_parts(groups: &[Vec<usize>], parts: usize, alpha: f64, key: u64) -> Vec<Vec<usize>> {
    let mut out = vec![vec![]; parts];
    for (g, rows) in groups.iter().enumerate() {
        let key = derive(key, g as u64);
        let proportions = dirichlet(&mut Stream::new(derive_named(key, "proportions")), alpha, parts);
        let counts = apportion(&proportions, rows.len(), &vec![rows.len(); parts]);
        let mut order = shuffled(rows, derive_named(key, "rows")).into_iter();
        for (part, count) in out.iter_mut().zip(counts) {
            part.extend(order.by_ref().take(count));
        }
    }
    out.iter_mut().for_each(|part| part.sort_unstable());
    out
}

/// One random subset of `size` rows, without repetition, in which the groups have
/// proportions drawn from Dirichlet(`alpha`); what a group has too few rows for is
/// divided among the others. Rows come group by group.
///
/// # Errors
/// When all groups together have fewer rows than that.
pub fn mixed_subset(groups: &[Vec<usize>], size: usize, alpha: f64, key: u64) -> Result<Vec<usize>> {
    let limits: Vec<usize> = groups.iter().map(Vec::len).collect();
    let all: usize = limits.iter().sum();
    if size > all {
        let why = format!("subsets of {size} rows cannot be drawn from {all} rows");
        return Err(Error::invalid("shadow subsets", why));
    }
    let proportions = dirichlet(&mut Stream::new(derive_named(key, "proportions")), alpha, groups.len());
    let counts = apportion(&proportions, size, &limits);
    let mut drawn = vec![];
    for (g, (rows, count)) in groups.iter().zip(counts).enumerate() {
        let mut order = shuffled(rows, derive(derive_named(key, "rows"), g as u64));
        order.truncate(count);
        order.sort_unstable();
        drawn.extend(order);
    }
    Ok(drawn)
}

/// `n` proportions that sum to 1, from the symmetric Dirichlet distribution.
///
/// # Panics
/// When α is not positive or there is nothing to divide.
pub fn dirichlet(stream: &mut Stream, alpha: f64, n: usize) -> Vec<f64> {
    assert!(n > 0, "proportions of nothing");
    let logs: Vec<f64> = (0..n).map(|_| log_gamma_variate(stream, alpha)).collect();
    // A small α gives numbers far below the smallest that floating point has, so only
    // their ratios are formed.
    let largest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let values: Vec<f64> = logs.iter().map(|x| (x - largest).exp()).collect();
    let sum: f64 = values.iter().sum();
    values.into_iter().map(|x| x / sum).collect()
}

/// The logarithm of a number from the gamma distribution with this shape and scale 1
/// (Marsaglia and Tsang, "A simple method for generating gamma variables", 2000).
fn log_gamma_variate(stream: &mut Stream, shape: f64) -> f64 {
    assert!(shape > 0.0 && shape.is_finite(), "a gamma distribution of shape {shape}");
    // Uniform in (0, 1]: its logarithm is finite.
    let log_uniform = |stream: &mut Stream| (1.0 - stream.uniform()).ln();
    if shape < 1.0 {
        // Gamma(shape) = Gamma(shape + 1) · U^(1/shape)
        return log_gamma_variate(stream, shape + 1.0) + log_uniform(stream) / shape;
    }
    let d = shape - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = stream.normal();
        let v = (1.0 + c * x).powi(3);
        if v > 0.0 && log_uniform(stream) < 0.5 * x * x + d - d * v + d * v.ln() {
            return d.ln() + v.ln();
        }
    }
}

/// `total` things divided by proportions (largest remainders first), at most `limits` to
/// each; what is beyond a limit goes to the others. The limits must have room for all.
fn apportion(proportions: &[f64], total: usize, limits: &[usize]) -> Vec<usize> {
    assert!(total <= limits.iter().sum(), "no room for {total} in {limits:?}");
    let mut counts = vec![0; limits.len()];
    let mut open: Vec<usize> = (0..limits.len()).filter(|&i| limits[i] > 0).collect();
    let mut left = total;
    while left > 0 {
        let sum: f64 = open.iter().map(|&i| proportions[i]).sum();
        let quota = |i: usize| match sum > 0.0 {
            true => left as f64 * proportions[i] / sum,
            false => left as f64 / open.len() as f64,
        };
        // Whoever would get more than fits gets what fits; the others are asked again.
        let full: Vec<usize> = open.iter().copied().filter(|&i| quota(i) >= limits[i] as f64).collect();
        if full.is_empty() {
            let mut order: Vec<(usize, f64)> = open.iter().map(|&i| (i, quota(i))).collect();
            order.iter().for_each(|&(i, q)| counts[i] = q.floor() as usize);
            left -= order.iter().map(|&(i, _)| counts[i]).sum::<usize>();
            order.sort_by(|a, b| b.1.fract().total_cmp(&a.1.fract()).then(a.0.cmp(&b.0)));
            order.iter().take(left).for_each(|&(i, _)| counts[i] += 1);
            return counts;
        }
        for &i in &full {
            counts[i] = limits[i].min(left);
            left -= counts[i];
        }
        open.retain(|i| !full.contains(i));
    }
    counts
}

fn shuffled(rows: &[usize], key: u64) -> Vec<usize> {
    Stream::new(key).permutation(rows.len()).into_iter().map(|i| rows[i]).collect()
}

/// Lists of rows with names, as they are kept in a run directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// Rows of the data that the numbers count.
    pub rows: usize,
    /// Checksum of that data's file.
    pub source: String,
    /// The seed that the lists were drawn from.
    pub seed: u64,
    /// Rows that are exact duplicates of one before them, and in the same list.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub duplicates: usize,
    /// Row numbers, from 0, under names such as `public`, `private`, `shadow/00007`.
    pub lists: BTreeMap<String, Vec<usize>>,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl Split {
    /// Writes it as JSON, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_versioned(path, FORMAT, VERSION, self)
    }

    /// Reads it, and checks that every row number is one.
    pub fn read(path: &Path) -> Result<Self> {
        let split: Self = read_versioned(path, FORMAT, VERSION)?;
        for (name, list) in &split.lists {
            if let Some(row) = list.iter().find(|&&row| row >= split.rows) {
                let why = format!("list `{name}` has row {row}, the data has {} rows", split.rows);
                return Err(Error::file(path, why));
            }
        }
        Ok(split)
    }

    /// A list by its name.
    pub fn list(&self, name: &str) -> Result<&[usize]> {
        let found = self.lists.get(name).map(Vec::as_slice);
        found.ok_or_else(|| Error::invalid("split", format!("there is no list `{name}`")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(n: usize) -> Vec<usize> {
        (10..10 + n).collect()
    }

    #[test]
    fn parts_hold_every_row_once() {
        let (public, private) = two_parts(&all(101), 0.5, 3);
        assert_eq!((public.len(), private.len()), (51, 50));
        let mut together = [public.clone(), private].concat();
        together.sort_unstable();
        assert_eq!(together, all(101));
        assert!(public.is_sorted() && public != two_parts(&all(101), 0.5, 4).0);
        let (train, test) = two_parts(&all(20), 0.9, 3);
        assert_eq!((train.len(), test.len()), (18, 2));
        let clients = even_parts(&all(13), 5, 3);
        assert_eq!(clients.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 3, 2, 2]);
        let mut together = clients.concat();
        together.sort_unstable();
        assert_eq!(together, all(13));
    }

    #[test]
    fn gamma_numbers_have_their_mean_and_variance() {
        for shape in [0.3, 1.0, 2.5, 40.0] {
            let mut stream = Stream::new(derive(11, (shape * 10.0) as u64));
            let n = 40_000;
            let drawn: Vec<f64> = (0..n).map(|_| log_gamma_variate(&mut stream, shape).exp()).collect();
            let mean = drawn.iter().sum::<f64>() / n as f64;
            let variance = drawn.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
            // Five standard errors: of the mean √(k/n), of the variance k √((2 + 6/k)/n).
            let of_mean = 5.0 * (shape / n as f64).sqrt();
            let of_variance = 5.0 * shape * ((2.0 + 6.0 / shape) / n as f64).sqrt();
            assert!((mean - shape).abs() <= of_mean, "shape {shape}: mean {mean}");
            assert!((variance - shape).abs() <= of_variance, "shape {shape}: variance {variance}");
        }
    }

    #[test]
    fn proportions_sum_to_one_and_alpha_sets_their_spread() {
        let largest = |alpha: f64| {
            let mut stream = Stream::new(5);
            let one = |_| {
                let p = dirichlet(&mut stream, alpha, 6);
                assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-12 && p.iter().all(|x| *x >= 0.0), "{p:?}");
                p.into_iter().fold(0.0, f64::max)
            };
            (0..200).map(one).sum::<f64>() / 200.0
        };
        // One group has nearly all, or all have nearly the same.
        assert!(largest(1e-4) > 0.99 && largest(1e4) < 0.18);
        assert!(largest(0.1) > largest(1.0) && largest(1.0) > largest(10.0));
        let first = |key| dirichlet(&mut Stream::new(key), 0.5, 3);
        assert_eq!(first(7), first(7));
        assert_ne!(first(7), first(8));
    }

    #[test]
    fn counts_follow_proportions_up_to_what_there_is() {
        assert_eq!(apportion(&[0.5, 0.3, 0.2], 10, &[10, 10, 10]), [5, 3, 2]);
        assert_eq!(apportion(&[0.55, 0.25, 0.2], 3, &[10, 10, 10]), [2, 1, 0]);
        assert_eq!(apportion(&[0.9, 0.05, 0.05], 10, &[4, 10, 10]), [4, 3, 3]);
        assert_eq!(apportion(&[1.0, 0.0, 0.0], 10, &[4, 3, 3]), [4, 3, 3]);
        assert_eq!(apportion(&[1.0, 0.0, 0.0], 6, &[4, 0, 9]), [4, 0, 2]);
        assert_eq!(apportion(&[0.5, 0.5], 0, &[0, 0]), [0, 0]);
        let mut stream = Stream::new(9);
        for _ in 0..300 {
            let n = 1 + stream.below(6);
            let limits: Vec<usize> = (0..n).map(|_| stream.below(30)).collect();
            let total = stream.below(limits.iter().sum::<usize>() + 1);
            let counts = apportion(&dirichlet(&mut stream, 0.2, n), total, &limits);
            assert_eq!(counts.iter().sum::<usize>(), total, "{counts:?} of {limits:?}");
            assert!(counts.iter().zip(&limits).all(|(count, limit)| count <= limit));
        }
    }

    #[test]
    fn skewed_parts_hold_every_row_once() {
        let groups = [all(40), (100..130).collect(), (200..260).collect()];
        let parts = skewed_parts(&groups, 4, 0.5, 3);
        assert_eq!(parts, skewed_parts(&groups, 4, 0.5, 3));
        assert_ne!(parts, skewed_parts(&groups, 4, 0.5, 4));
        let mut together = parts.concat();
        together.sort_unstable();
        assert_eq!(together, groups.concat());

        let subset = mixed_subset(&groups, 50, 0.3, 7).unwrap();
        assert_eq!(subset, mixed_subset(&groups, 50, 0.3, 7).unwrap());
        assert_ne!(subset, mixed_subset(&groups, 50, 0.3, 8).unwrap());
        let mut rows = subset.clone();
        rows.sort_unstable();
        rows.dedup();
        assert_eq!(rows.len(), 50);
        assert_eq!(mixed_subset(&groups, 130, 0.3, 7).unwrap().len(), 130);
        assert!(mixed_subset(&groups, 131, 0.3, 7).unwrap_err().to_string().contains("131 rows"));
    }

    #[test]
    fn lists_are_written_down_and_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("split.json");
        let lists = [("public".to_owned(), vec![0, 2]), ("private".to_owned(), vec![1])].into();
        let mut split = Split { rows: 3, source: "ab".into(), seed: 7, duplicates: 0, lists };
        split.write(&path).unwrap();
        assert_eq!(Split::read(&path).unwrap(), split);
        assert_eq!(split.list("public").unwrap(), [0, 2]);
        assert!(split.list("test").is_err());
        split.rows = 2;
        split.write(&path).unwrap();
        assert!(Split::read(&path).unwrap_err().to_string().contains("row 2"));
        let text = std::fs::read_to_string(&path).unwrap().replace("\"version\": 1", "\"version\": 7");
        std::fs::write(&path, text).unwrap();
        assert!(Split::read(&path).unwrap_err().to_string().contains("version 7"));
    }
}
