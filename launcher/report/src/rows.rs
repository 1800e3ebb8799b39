//! Who has which rows: what the shadow subsets and the splits say, in counts.
//!
//! In: `subsets.json`, the public data's task column, `split.json` files. Out: [`Rows`].
//! Counts and checksums, and the names of the public data's tasks: no text of an example.

use super::source::{Source, last_part};
use gradtx_pipeline::records::CurateInputs;
use gradtx_run::config::GroupBy;
use gradtx_run::paths::SUBSETS_FILE;
use gradtx_runtime::artifact::read_json;
use gradtx_runtime::data::split::Split;
use gradtx_train::examples::{Data, Group};
use serde::Serialize;
use std::collections::BTreeMap;

/// Name of files that say who has which rows.
const SPLIT_FILE: &str = "split.json";
/// Letters of a task's name at most: a column may hold anything.
const MAX_NAME: usize = 40;

/// Who has which rows.
#[derive(Debug, Default, Serialize)]
pub struct Rows {
    /// The shadow subsets of the public data.
    pub shadow: Option<ShadowRows>,
    /// Splits that were written down.
    pub splits: Vec<SplitRows>,
    /// Task of every shadow subset, counted from 0 in the order of the public data.
    pub groups: Option<Vec<usize>>,
    /// Names of these tasks, in the public data's words.
    pub tasks: Vec<String>,
}

/// The shadow subsets of the public data.
#[derive(Debug, Serialize)]
pub struct ShadowRows {
    /// Name of the public data's file.
    pub data: Option<String>,
    /// Checksum of it.
    pub checksum: Option<String>,
    /// Column that subsets are grouped by, or `random`.
    pub group_by: Option<String>,
    /// Subsets.
    pub subsets: usize,
    /// Rows of the smallest subset.
    pub smallest: usize,
    /// Rows of the largest subset.
    pub largest: usize,
    /// Different rows in all subsets.
    pub rows: usize,
    /// Rows that are in more than one subset.
    pub shared: usize,
}

/// A split that was written down.
#[derive(Debug, Serialize)]
pub struct SplitRows {
    /// The file.
    pub name: String,
    /// Rows of the data.
    pub rows: usize,
    /// Checksum of the data.
    pub source: String,
    /// Seed that it was drawn from.
    pub seed: u64,
    /// Its lists; those that only differ in numbers (`shadow/00007`) together.
    pub lists: Vec<RowLists>,
}

/// Lists of rows of one kind.
#[derive(Debug, PartialEq, Serialize)]
pub struct RowLists {
    /// What they are, such as `public`, `shadow/*`, `private/*/train`.
    pub name: String,
    /// Number of lists.
    pub lists: usize,
    /// Rows of the smallest.
    pub smallest: usize,
    /// Rows of the largest.
    pub largest: usize,
}

impl Rows {
    /// What the files say.
    pub fn of(source: &mut Source) -> Self {
        let mut rows = Self::default();
        if let Some(subsets) = read_subsets(source) {
            if let Some((groups, names)) = tasks(source, &subsets) {
                (rows.groups, rows.tasks) = (Some(groups), names);
            }
            rows.shadow = Some(shadow_rows(source, &subsets));
        }
        let mut files = source.find(SPLIT_FILE);
        let public = source.config.iter().flat_map(|config| config.data.public.as_slice());
        for dir in public.filter_map(|path| path.parent()) {
            let beside = dir.join(SPLIT_FILE);
            if beside.is_file() && !files.contains(&beside) {
                files.push(beside);
            }
        }
        for path in files {
            match Split::read(&path) {
                Err(error) => source.note(&path, error.to_string()),
                Ok(split) => rows.splits.push(SplitRows {
                    name: source.name(&path),
                    lists: list_kinds(&split),
                    rows: split.rows,
                    source: split.source,
                    seed: split.seed,
                }),
            }
        }
        rows
    }
}

fn read_subsets(source: &mut Source) -> Option<Vec<Vec<usize>>> {
    let path = source.tuples.join(SUBSETS_FILE);
    if !path.is_file() {
        return None;
    }
    let read = match source.damage(&path) {
        None => read_json(&path).map_err(|e| e.to_string()),
        Some(why) => Err(why),
    };
    let parsed = read.and_then(|value| serde_json::from_value(value).map_err(|e| e.to_string()));
    parsed.map_err(|why| source.note(&path, why)).ok()
}

/// The task of every subset, and the names of the tasks. None for subsets of several tasks, or when the public data is
/// gone or has changed.
fn tasks(source: &mut Source, subsets: &[Vec<usize>]) -> Option<(Vec<usize>, Vec<String>)> {
    let config = source.config.as_ref()?;
    let GroupBy::Column(column) = config.curate.group_by.clone() else { return None };
    let data = config.data.clone();
    let wanted = source.inputs::<CurateInputs>().next().map(|(_, inputs)| inputs.data.data);
    let read = Data::read(data.public.as_slice(), &data, "data.public");
    let read = read.map_err(|e| format!("{e:#}")).and_then(|data| {
        if wanted.is_some_and(|sum| sum != data.checksum) {
            return Err("has changed since the tuples were made".into());
        }
        data.groups(&column).map_err(|e| format!("{e:#}"))
    });
    let groups = match read {
        Ok(groups) => groups,
        Err(why) => {
            source.note(&data.public.as_slice()[0], format!("no tasks to compare subsets by: {why}"));
            return None;
        }
    };
    let task_of: BTreeMap<usize, usize> = groups
        .iter()
        .enumerate()
        .flat_map(|(task, group)| group.rows.iter().map(move |&row| (row, task)))
        .collect();
    let task = |subset: &Vec<usize>| {
        let first = task_of.get(subset.first()?)?;
        subset.iter().all(|row| task_of.get(row) == Some(first)).then_some(*first)
    };
    let of_subsets = subsets.iter().map(task).collect::<Option<_>>()?;
    let name = |group: &Group| group.name.chars().take(MAX_NAME).collect();
    Some((of_subsets, groups.iter().map(name).collect()))
}

fn shadow_rows(source: &Source, subsets: &[Vec<usize>]) -> ShadowRows {
    let mut times: BTreeMap<usize, usize> = BTreeMap::new();
    subsets.iter().flatten().for_each(|&row| *times.entry(row).or_default() += 1);
    ShadowRows {
        data: source.config.as_ref().map(|config| {
            let names = config.data.public.as_slice().iter().map(|path| last_part(path));
            names.collect::<Vec<_>>().join(", ")
        }),
        checksum: source.inputs::<CurateInputs>().next().map(|(_, inputs)| inputs.data.data),
        group_by: source.config.as_ref().map(|config| config.curate.group_by.to_string()),
        subsets: subsets.len(),
        smallest: subsets.iter().map(Vec::len).min().unwrap_or(0),
        largest: subsets.iter().map(Vec::len).max().unwrap_or(0),
        rows: times.len(),
        shared: times.values().filter(|&&n| n > 1).count(),
    }
}

/// Lists by their names, with a star for every part that counts: `shadow/*`,
/// `private/*/train`.
fn list_kinds(split: &Split) -> Vec<RowLists> {
    let star =
        |part: &str| if part.contains(|c: char| c.is_ascii_digit()) { "*".into() } else { part.to_string() };
    let mut kinds: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (name, list) in &split.lists {
        let kind = name.split('/').map(star).collect::<Vec<_>>().join("/");
        kinds.entry(kind).or_default().push(list.len());
    }
    let row = |(name, sizes): (String, Vec<usize>)| RowLists {
        name,
        lists: sizes.len(),
        smallest: sizes.iter().copied().min().unwrap_or(0),
        largest: sizes.iter().copied().max().unwrap_or(0),
    };
    kinds.into_iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_a_kind_are_counted_together() {
        let lists = [("public", 3), ("private/client-1/test", 1), ("shadow/00000", 2), ("shadow/00001", 1)];
        let lists = lists.map(|(name, n)| (name.to_string(), (0..n).collect())).into();
        let kinds = list_kinds(&Split { rows: 9, source: "ab".into(), seed: 1, duplicates: 0, lists });
        assert_eq!(kinds[2], RowLists { name: "shadow/*".into(), lists: 2, smallest: 1, largest: 2 });
        assert_eq!((kinds.len(), kinds[0].name.as_str()), (3, "private/*/test"));
    }
}
