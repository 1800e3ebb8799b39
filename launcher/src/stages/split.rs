//! `split`: who gets which rows of a data set.
//!
//! In: files of examples, and a seed. Out, in the directory:
//!
//! ```text
//! public.jsonl                         the provider's part
//! private/client-N/{train,test}.jsonl  the clients' parts
//! split.json                           the row numbers of every list (see `data::split::Split`)
//! ```
//!
//! Rows keep their columns, so the files are read as the data set itself is. Row numbers
//! count from 0 over all files of the data, in their order.

use crate::failure::{failed, unusable};
use crate::record::{self, State};
use crate::stages::Context;
use crate::stages::examples::{Group, groups};
use anyhow::{Context as _, Result};
use gradtx_kernels::rng::{derive, derive_named};
use gradtx_runtime::artifact::{checksum_files, write_atomic};
use gradtx_runtime::data::split::{Split, even_parts, skewed_parts, two_parts};
use gradtx_runtime::data::{Reading, Row, data_files, read_rows};
use serde::Serialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// What to split, and how.
#[derive(Clone, Debug, clap::Args, Serialize)]
pub struct Job {
    /// JSONL, JSON or Parquet files, or directories of them.
    #[arg(long, required = true, num_args = 1.., value_name = "PATH")]
    #[serde(skip)]
    pub data: Vec<PathBuf>,
    /// Directory for public.jsonl, private/ and split.json.
    #[arg(long, value_name = "DIR")]
    #[serde(skip)]
    pub out: PathBuf,
    /// Seed of every random choice.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The provider's part of the rows; 0 for none.
    #[arg(long, default_value_t = 0.5, value_name = "PART")]
    pub public: f64,
    /// Clients that share the rest.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub clients: usize,
    /// The part of a client's rows that it trains on; the others test.
    #[arg(long, default_value_t = 0.9, value_name = "PART")]
    pub train: f64,
    /// Divide each task's private rows among the clients by proportions drawn from
    /// Dirichlet(ALPHA): the smaller it is, the more the clients differ. Without it, all
    /// clients get the same mixture and equally many rows.
    #[arg(long, value_name = "ALPHA")]
    pub dirichlet: Option<f64>,
    /// Column that tells tasks apart; "task" also stands for the kind of data set.
    #[arg(long, default_value = "task", value_name = "COLUMN")]
    pub group_by: String,
}

impl Job {
    fn check(&self) -> Result<()> {
        let wrong = if !(0.0..1.0).contains(&self.public) {
            "--public: expected 0 ≤ part < 1"
        } else if self.clients == 0 {
            "--clients: expected at least 1"
        } else if !(self.train > 0.0 && self.train < 1.0) {
            "--train: expected 0 < part < 1"
        } else if self.dirichlet.is_some_and(|alpha| !(alpha > 0.0 && alpha.is_finite())) {
            "--dirichlet: expected a positive number"
        } else {
            return Ok(());
        };
        Err(unusable(wrong))
    }
}

/// Splits, unless that is done.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    job.check()?;
    let files = data_files(&job.data)?;
    let source = checksum_files(&files)?;
    let mut rows = vec![];
    for file in &files {
        rows.extend(read_rows(file)?);
    }
    // Every row is read as an example too, so that what cannot be used is told now, and
    // before the directory is anyone's.
    let records = rows.iter().map(|row| Reading::default().record(row.clone()));
    let tasks = groups(&records.collect::<gradtx_runtime::Result<Vec<_>>>()?, &job.group_by)?;
    let lists = lists(job, rows.len(), &tasks)?;
    let settings = json!({ "data": source, "split": job });
    let State::Open(output) = record::open(&job.out, "split", settings)? else {
        context.ui.line(format!("split: {} is finished", job.out.display()));
        return Ok(());
    };
    let split = Split { rows: rows.len(), source, seed: job.seed, lists };
    let mut written = vec!["split.json".to_string()];
    for (name, list) in &split.lists {
        let name = format!("{name}.jsonl");
        write_rows(&job.out.join(&name), &rows, list)?;
        written.push(name);
    }
    split.write(&job.out.join("split.json"))?;
    output.finish(&written)?;
    for line in summary(&split, &tasks) {
        context.ui.line(line);
    }
    Ok(())
}

/// Row numbers by the names of the files that hold the rows, without their ending.
fn lists(job: &Job, rows: usize, tasks: &[Group]) -> Result<BTreeMap<String, Vec<usize>>> {
    let key = derive_named(job.seed, "split");
    let all: Vec<usize> = (0..rows).collect();
    let (public, private) = two_parts(&all, job.public, derive_named(key, "public"));
    let key_of_clients = derive_named(key, "clients");
    let clients = match job.dirichlet {
        None => even_parts(&private, job.clients, key_of_clients),
        Some(alpha) => {
            let kept =
                |g: &Group| g.rows.iter().copied().filter(|row| private.binary_search(row).is_ok()).collect();
            let groups: Vec<Vec<usize>> = tasks.iter().map(kept).collect();
            skewed_parts(&groups, job.clients, alpha, key_of_clients)
        }
    };
    let mut lists = BTreeMap::new();
    if !public.is_empty() {
        lists.insert("public".to_string(), public);
    }
    for (c, rows) in clients.iter().enumerate() {
        let (train, test) = two_parts(rows, job.train, derive(derive_named(key, "train and test"), c as u64));
        if train.is_empty() || test.is_empty() {
            let client = c + 1;
            let what = format!(
                "client {client} would have {} rows to train on and {} to test on",
                train.len(),
                test.len()
            );
            return Err(failed(
                what,
                "take fewer clients, more data, a larger --dirichlet or another --seed",
            ));
        }
        let place = format!("private/client-{}", c + 1);
        lists.insert(format!("{place}/train"), train);
        lists.insert(format!("{place}/test"), test);
    }
    Ok(lists)
}

fn write_rows(path: &Path, rows: &[Row], list: &[usize]) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir).with_context(|| format!("{}: cannot make", dir.display()))?;
    write_atomic(path, |out| {
        list.iter().try_for_each(|&row| {
            serde_json::to_writer(&mut *out, &rows[row].columns)?;
            writeln!(out)
        })
    })?;
    Ok(())
}

/// Tasks told of one list; further ones are counted.
const TASKS_TOLD: usize = 8;

/// A line per list: how many rows of which task.
fn summary(split: &Split, tasks: &[Group]) -> Vec<String> {
    let mut task_of = vec![0; split.rows];
    for (t, task) in tasks.iter().enumerate() {
        task.rows.iter().for_each(|&row| task_of[row] = t);
    }
    let width = split.lists.keys().map(String::len).max().unwrap_or(0);
    let line = |(name, list): (&String, &Vec<usize>)| {
        let mut counts = vec![0usize; tasks.len()];
        list.iter().for_each(|&row| counts[task_of[row]] += 1);
        let mut order: Vec<usize> = (0..tasks.len()).filter(|&t| counts[t] > 0).collect();
        order.sort_by_key(|&t| std::cmp::Reverse(counts[t]));
        let mut parts: Vec<String> =
            order.iter().take(TASKS_TOLD).map(|&t| format!("{} {}", tasks[t].name, counts[t])).collect();
        if order.len() > TASKS_TOLD {
            let rest: usize = order[TASKS_TOLD..].iter().map(|&t| counts[t]).sum();
            parts.push(format!("{} more tasks {rest}", order.len() - TASKS_TOLD));
        }
        format!("split: {name:width$}  {:>7} rows: {}", list.len(), parts.join(", "))
    };
    split.lists.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(clients: usize, dirichlet: Option<f64>) -> Job {
        Job {
            data: vec![],
            out: PathBuf::new(),
            seed: 3,
            public: 0.5,
            clients,
            train: 0.9,
            dirichlet,
            group_by: "task".into(),
        }
    }

    fn tasks() -> Vec<Group> {
        let rows = |t: usize| (0..400).filter(|row| row % 4 == t).collect();
        (0..4).map(|t| Group { name: format!("t{t}"), rows: rows(t) }).collect()
    }

    #[test]
    fn every_row_is_in_one_list() {
        for dirichlet in [None, Some(0.7)] {
            let lists = lists(&job(3, dirichlet), 400, &tasks()).unwrap();
            assert_eq!(lists.len(), 7);
            assert_eq!(lists["public"].len(), 200);
            let mut all: Vec<usize> = lists.values().flatten().copied().collect();
            all.sort_unstable();
            assert_eq!(all, (0..400).collect::<Vec<_>>());
            for c in 1..=3 {
                let train = lists[&format!("private/client-{c}/train")].len() as f64;
                let test = lists[&format!("private/client-{c}/test")].len() as f64;
                assert!((train - 0.9 * (train + test)).abs() <= 0.5, "{train} and {test}");
            }
        }
    }

    #[test]
    fn a_small_alpha_makes_clients_of_few_tasks() {
        let share_of_the_largest = |alpha| {
            let lists = lists(&job(2, Some(alpha)), 400, &tasks()).unwrap();
            let part = |t: usize| {
                let mine = lists["private/client-1/train"].iter().filter(|&&row| row % 4 == t).count();
                let other = lists["private/client-2/train"].iter().filter(|&&row| row % 4 == t).count();
                mine.max(other) as f64 / (mine + other) as f64
            };
            (0..4).map(part).sum::<f64>() / 4.0
        };
        let (skewed, even) = (share_of_the_largest(0.05), share_of_the_largest(1000.0));
        assert!(skewed > 0.85 && even < 0.65, "{skewed} and {even}");
        let message = lists(&job(150, None), 400, &tasks()).unwrap_err().to_string();
        assert!(message.contains("client 1 would have"), "{message}");
    }

    #[test]
    fn the_summary_counts_rows_of_every_task() {
        let lists = [("public".to_string(), vec![0, 1, 4, 5, 8]), ("x".to_string(), vec![2])].into();
        let split = Split { rows: 400, source: String::new(), seed: 1, lists };
        let lines = summary(&split, &tasks());
        assert_eq!(lines[0], "split: public        5 rows: t0 3, t1 2");
        assert_eq!(lines[1], "split: x             1 rows: t2 1");
    }
}
