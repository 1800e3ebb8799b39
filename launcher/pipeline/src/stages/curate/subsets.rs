//! Which rows of the public data every shadow subset has.

use anyhow::Result;
use gradtx_kernels::rng::{Stream, derive, derive_named};
use gradtx_run::config::{Config, GroupBy};
use gradtx_run::failure::{unusable, unusable_with};
use gradtx_runtime::data::split::mixed_subset;
use gradtx_train::examples::Data;

/// Rows of every shadow subset. Subsets may overlap. Without a mixture, each has rows of
/// one group, the groups in turn; with one, each has its own proportions of all groups.
pub(crate) fn choose_subsets(config: &Config, public: &Data) -> Result<Vec<Vec<usize>>> {
    let curate = &config.curate;
    let groups = rows_by_group(config, public)?;
    let mixed = curate.dirichlet_alpha > 0.0;
    let sizes = groups.iter().map(Vec::len);
    let available = if mixed { sizes.sum() } else { sizes.min().unwrap_or(0) };
    if available < curate.examples_per_subset {
        return Err(unusable(format!(
            "curate.examples_per_subset: {} examples of one subset, but {} has only {available} to choose from",
            curate.examples_per_subset, config.data.public
        )));
    }
    let key = derive_named(config.seed, "shadow subsets");
    let subset = |k: usize| {
        let key = derive(key, k as u64);
        if mixed {
            return Ok(mixed_subset(&groups, curate.examples_per_subset, curate.dirichlet_alpha, key)?);
        }
        let group = &groups[k % groups.len()];
        let order = Stream::new(key).permutation(group.len());
        Ok(order[..curate.examples_per_subset].iter().map(|&i| group[i]).collect())
    };
    (0..curate.num_subsets).map(subset).collect()
}

/// Which subsets are of one group: a number for each. Where subsets are mixtures, or drawn from all
/// rows, each is a group of its own.
pub(crate) fn groups_of_subsets(config: &Config, public: &Data) -> Result<Vec<usize>> {
    let curate = &config.curate;
    let groups = match curate.dirichlet_alpha > 0.0 || curate.group_by == GroupBy::Random {
        true => curate.num_subsets,
        false => rows_by_group(config, public)?.len(),
    };
    Ok((0..curate.num_subsets).map(|k| k % groups).collect())
}

/// The rows that one subset may hold, by group.
fn rows_by_group(config: &Config, public: &Data) -> Result<Vec<Vec<usize>>> {
    match &config.curate.group_by {
        GroupBy::Random => Ok(vec![(0..public.records.len()).collect()]),
        GroupBy::Column(column) => {
            let groups = public.groups(column).map_err(|error| {
                let columns = public.records.first().map(|r| r.extra.keys().cloned().collect::<Vec<_>>());
                let hint = match columns.filter(|columns| !columns.is_empty()) {
                    Some(columns) => format!("columns to group by: {}; or \"random\"", columns.join(", ")),
                    None => "there is no column to group by; set it to \"random\"".into(),
                };
                unusable_with(format!("curate.group_by: {error:#}"), Some(hint))
            })?;
            Ok(groups.into_iter().map(|group| group.rows).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// How many rows of each of three tasks every subset has.
    fn counts(mixture: f64) -> Vec<[usize; 3]> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("public.jsonl");
        let row = |i: usize| json!({ "prompt": "p", "response": "r", "task": i % 3 }).to_string() + "\n";
        std::fs::write(&path, (0..90).map(row).collect::<String>()).unwrap();
        let mut config = Config::default();
        config.curate.num_subsets = 12;
        config.curate.examples_per_subset = 24;
        config.curate.group_by = GroupBy::Column("task".into());
        config.curate.dirichlet_alpha = mixture;
        let public = Data::read(&[path], &config.data, "data.public").unwrap();
        let subsets = choose_subsets(&config, &public).unwrap();
        assert_eq!(subsets, choose_subsets(&config, &public).unwrap());
        let groups = groups_of_subsets(&config, &public).unwrap();
        assert!((0..12).all(|k| groups[k] == if mixture > 0.0 { k } else { k % 3 }));
        let count = |subset: &Vec<usize>| {
            let mut rows = subset.clone();
            rows.sort_unstable();
            rows.dedup();
            assert_eq!(rows.len(), 24, "no row twice");
            [0, 1, 2].map(|task| rows.iter().filter(|&&row| row % 3 == task).count())
        };
        subsets.iter().map(count).collect()
    }

    #[test]
    fn a_subset_has_one_task_or_its_own_mixture() {
        for (k, count) in counts(0.0).into_iter().enumerate() {
            let mut wanted = [0; 3];
            wanted[k % 3] = 24;
            assert_eq!(count, wanted);
        }
        let mixed = counts(1.0);
        assert!(mixed.iter().any(|count| count.iter().all(|&n| n > 0)), "{mixed:?}");
        assert!(mixed.windows(2).any(|pair| pair[0] != pair[1]), "{mixed:?}");
        let even = counts(1e6);
        assert!(even.iter().all(|count| *count == [8, 8, 8]), "{even:?}");
    }
}
