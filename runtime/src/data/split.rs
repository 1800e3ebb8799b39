//! Who gets which rows: public and private halves, shadow subsets, clients, test sets.
//!
//! Everything is a list of row numbers drawn from a key, and written down
//! ([`Split`]), so that anyone can see afterwards which example went where.

use crate::artifact::{read_versioned, write_versioned};
use crate::{Error, Result};
use gradtx_kernels::rng::{Stream, derive};
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

/// `count` random subsets of `size` rows each, without repetition within a subset;
/// subsets overlap. Subset i depends on the key and on i, not on `count`.
pub fn random_subsets(rows: &[usize], count: usize, size: usize, key: u64) -> Result<Vec<Vec<usize>>> {
    if size > rows.len() || size == 0 {
        let why = format!("subsets of {size} rows cannot be drawn from {} rows", rows.len());
        return Err(Error::invalid("shadow subsets", why));
    }
    let subset = |i: usize| {
        let mut drawn = shuffled(rows, derive(key, i as u64));
        drawn.truncate(size);
        drawn.sort_unstable();
        drawn
    };
    Ok((0..count).map(subset).collect())
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
    /// Row numbers, from 0, under names such as `public`, `private`, `shadow/00007`.
    pub lists: BTreeMap<String, Vec<usize>>,
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
    fn subsets_are_distinct_and_do_not_depend_on_their_number() {
        let few = random_subsets(&all(50), 3, 20, 7).unwrap();
        let many = random_subsets(&all(50), 9, 20, 7).unwrap();
        assert_eq!(few, many[..3]);
        for (i, subset) in many.iter().enumerate() {
            assert!(subset.len() == 20 && subset.windows(2).all(|w| w[0] < w[1]));
            assert!(many[..i].iter().all(|other| other != subset));
        }
        assert!(random_subsets(&all(5), 1, 6, 7).unwrap_err().to_string().contains("6 rows"));
        assert!(random_subsets(&all(5), 1, 0, 7).is_err());
    }

    #[test]
    fn lists_are_written_down_and_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("split.json");
        let lists = [("public".to_owned(), vec![0, 2]), ("private".to_owned(), vec![1])].into();
        let mut split = Split { rows: 3, source: "ab".into(), seed: 7, lists };
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
