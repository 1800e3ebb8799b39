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

use anyhow::{Context as _, Result};
use gradtx_kernels::rng::{derive, derive_named};
use gradtx_run::config::{Config, DataConfig, ReadingInputs};
use gradtx_run::context::Context;
use gradtx_run::failure::{failed, unusable};
use gradtx_run::stage::{self, Inputs, Stage};
use gradtx_runtime::artifact::{checksum_files, write_atomic};
use gradtx_runtime::data::split::{Split, even_parts, skewed_parts, two_parts};
use gradtx_runtime::data::{Content, Loaded, Purpose, Record, Row, choose, load};
use gradtx_train::describe::Facts;
use gradtx_train::examples::{Group, groups};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What to split, and how.
#[derive(Clone, Debug, clap::Args, Serialize, Deserialize)]
pub struct Job {
    /// JSONL, JSON, CSV, TSV or Parquet files, or directories of them.
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
    #[arg(long, default_value_t = 0.5, value_name = "FRACTION")]
    pub public_fraction: f64,
    /// Clients that share the rest.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub clients: usize,
    /// The part of a client's rows that it trains on; the others test.
    #[arg(long, default_value_t = 0.9, value_name = "FRACTION")]
    pub train_fraction: f64,
    /// Divide each task's private rows among the clients by proportions drawn from
    /// Dirichlet(ALPHA): the smaller it is, the more the clients differ. Without it, all
    /// clients get the same mixture and equally many rows.
    #[arg(long, value_name = "ALPHA")]
    pub dirichlet: Option<f64>,
    /// Column that distinguishes tasks; "task" also stands for the kind of data set.
    #[arg(long, default_value = "task", value_name = "COLUMN")]
    pub group_by: String,
    /// Also keep rows with the same prompt and different answers in one place. Exact
    /// duplicates always are.
    #[arg(long)]
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub same_prompts: bool,
    /// Run file whose section `[data]` says how the files are read.
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Override one setting of `[data]`, e.g. `--set data.on_error=skip`; repeatable.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    #[serde(skip)]
    pub set: Vec<String>,
}

impl Job {
    fn check(&self) -> Result<()> {
        let wrong = if !(0.0..1.0).contains(&self.public_fraction) {
            "--public-fraction: expected 0 ≤ fraction < 1"
        } else if self.clients == 0 {
            "--clients: expected at least 1"
        } else if !(self.train_fraction > 0.0 && self.train_fraction < 1.0) {
            "--train-fraction: expected 0 < fraction < 1"
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
    stage::run(context, &Splitting::open(job)?).map(drop)
}

/// What a split depends on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SplitInputs {
    /// Checksum of the data set's files.
    pub data: String,
    /// How it is split.
    pub split: Job,
    /// How rows are read.
    #[serde(flatten)]
    pub reading: ReadingInputs,
}

impl Inputs for SplitInputs {
    const STAGE: &'static str = "split";
}

/// A split that is ready to be written.
pub struct Splitting<'a> {
    job: &'a Job,
    config: DataConfig,
    /// Checksum of the data set's files.
    source: String,
    loaded: Loaded,
    facts: Facts,
    tasks: Vec<Group>,
    alike: Alike,
    lists: BTreeMap<String, Vec<usize>>,
}

impl<'a> Splitting<'a> {
    /// Reads the data set and decides who gets what.
    pub fn open(job: &'a Job) -> Result<Self> {
        job.check()?;
        let config = Config::for_data(job.config.as_deref(), &job.set)?.data;
        let chosen = choose(&job.data, config.split, Purpose::Training)?;
        let source = checksum_files(&chosen.files)?;
        // Every row is read as an example too, so that what cannot be used is found now, and
        // before the directory is anyone's.
        let loaded = load(&chosen.files, &config.reading(), true)?;
        let facts = Facts::of(&chosen, &loaded, &config);
        let tasks = groups(&loaded.records, &job.group_by)?;
        let alike = Alike::of(&loaded.records, job.same_prompts);
        let lists = lists(job, &tasks, &alike)?;
        Ok(Self { job, config, source, loaded, facts, tasks, alike, lists })
    }
}

impl Stage for Splitting<'_> {
    type Inputs = SplitInputs;
    type Output = ();

    fn dir(&self) -> &Path {
        &self.job.out
    }

    fn inputs(&self) -> Result<SplitInputs> {
        let (data, split) = (self.source.clone(), self.job.clone());
        Ok(SplitInputs { data, split, reading: self.config.reading_inputs() })
    }

    fn assumed(&self) -> Vec<String> {
        vec![self.facts.line()]
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, ())> {
        let Self { job, loaded, alike, lists, .. } = self;
        let numbered = |list: &[usize]| list.iter().map(|&record| loaded.numbers[record]).collect();
        let mut written = vec!["split.json".to_string()];
        let mut split = Split {
            rows: loaded.total,
            source: self.source.clone(),
            seed: job.seed,
            duplicates: alike.duplicates,
            lists: BTreeMap::new(),
        };
        self.facts.left_out().for_each(|line| context.ui.line(line));
        for line in summary(lists, loaded.records.len(), &self.tasks) {
            context.ui.line(line);
        }
        if let Some(line) = alike.line(lists) {
            context.ui.line(line);
        }
        for (name, list) in lists {
            let file = format!("{name}.jsonl");
            write_rows(&job.out.join(&file), &loaded.rows, list)?;
            written.push(file);
            split.lists.insert(name.clone(), numbered(list));
        }
        split.write(&job.out.join("split.json"))?;
        Ok((written, ()))
    }

    /// The lines about its lists say everything.
    fn report(&self, _: &Context, (): &()) -> Result<()> {
        Ok(())
    }

    fn was_finished(&self, context: &Context) -> Result<()> {
        context.ui.line(format!("split: {} is finished", self.job.out.display()));
        Ok(())
    }
}

/// Records that are the same example, which must not stand on two sides of a split.
struct Alike {
    /// For every record the first that is the same.
    first: Vec<usize>,
    /// For every record the first with the same prompt.
    same_prompt: Vec<usize>,
    /// Records that are exact duplicates of one before them.
    duplicates: usize,
}

impl Alike {
    fn of(records: &[Record], by_prompt: bool) -> Self {
        let firsts = |digest: fn(&Content) -> u128| {
            let mut known = HashMap::new();
            records.iter().enumerate().map(|(i, r)| *known.entry(digest(&r.content)).or_insert(i)).collect()
        };
        let (same, same_prompt): (Vec<usize>, Vec<usize>) =
            (firsts(Content::digest), firsts(Content::prompt_digest));
        let duplicates = same.iter().enumerate().filter(|(i, first)| i != *first).count();
        Self { first: if by_prompt { same_prompt.clone() } else { same }, same_prompt, duplicates }
    }

    /// One record of all that are the same.
    fn representatives(&self) -> Vec<usize> {
        (0..self.first.len()).filter(|&i| self.first[i] == i).collect()
    }

    /// The records that these stand for, in order.
    fn all_of(&self, representatives: &[usize]) -> Vec<usize> {
        let chosen: HashSet<&usize> = representatives.iter().collect();
        (0..self.first.len()).filter(|i| chosen.contains(&self.first[*i])).collect()
    }

    /// What there is to say about duplicates, if there are any.
    fn line(&self, lists: &BTreeMap<String, Vec<usize>>) -> Option<String> {
        let mut side = vec![""; self.first.len()];
        for (name, list) in lists {
            list.iter().for_each(|&record| side[record] = name);
        }
        let apart = (0..side.len()).filter(|&i| side[i] != side[self.same_prompt[i]]).count();
        let mut parts = vec![];
        if self.duplicates > 0 {
            parts.push(format!(
                "{} rows are exact duplicates; each is in the file of the row before it",
                self.duplicates
            ));
        }
        if apart > 0 {
            parts.push(format!(
                "{apart} rows have the prompt of a row in another file, with another answer (--same-prompts keeps them together)"
            ));
        }
        (!parts.is_empty()).then(|| format!("split: {}", parts.join("; ")))
    }
}

/// Numbers of records by the names of the files that hold them, without their ending. Records
/// that are the same are drawn as one.
fn lists(job: &Job, tasks: &[Group], alike: &Alike) -> Result<BTreeMap<String, Vec<usize>>> {
    let key = derive_named(job.seed, "split");
    let all = alike.representatives();
    let (public, private) = two_parts(&all, job.public_fraction, derive_named(key, "public"));
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
        lists.insert("public".to_string(), alike.all_of(&public));
    }
    for (c, rows) in clients.iter().enumerate() {
        let (train, test) =
            two_parts(rows, job.train_fraction, derive(derive_named(key, "train and test"), c as u64));
        if train.is_empty() || test.is_empty() {
            let client = c + 1;
            let mut what = format!(
                "client {client} would have {} rows to train on and {} to test on",
                train.len(),
                test.len()
            );
            if all.len() < alike.first.len() {
                what +=
                    &format!("; the {} rows of the data are {} different ones", alike.first.len(), all.len());
            }
            return Err(failed(
                what,
                "take fewer clients, more data, a larger --dirichlet or another --seed",
            ));
        }
        let place = format!("private/client-{}", c + 1);
        lists.insert(format!("{place}/train"), alike.all_of(&train));
        lists.insert(format!("{place}/test"), alike.all_of(&test));
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

/// Tasks reported of one list; further ones are counted.
const TASKS_TOLD: usize = 8;

/// A line per list: how many rows of which task.
fn summary(lists: &BTreeMap<String, Vec<usize>>, rows: usize, tasks: &[Group]) -> Vec<String> {
    let mut task_of = vec![0; rows];
    for (t, task) in tasks.iter().enumerate() {
        task.rows.iter().for_each(|&row| task_of[row] = t);
    }
    let width = lists.keys().map(String::len).max().unwrap_or(0);
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
    lists.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(clients: usize, dirichlet: Option<f64>) -> Job {
        Job {
            data: vec![],
            out: PathBuf::new(),
            seed: 3,
            public_fraction: 0.5,
            clients,
            train_fraction: 0.9,
            dirichlet,
            group_by: "task".into(),
            same_prompts: false,
            config: None,
            set: vec![],
        }
    }

    /// Rows that all differ.
    fn different(rows: usize) -> Alike {
        Alike { first: (0..rows).collect(), same_prompt: (0..rows).collect(), duplicates: 0 }
    }

    fn tasks() -> Vec<Group> {
        let rows = |t: usize| (0..400).filter(|row| row % 4 == t).collect();
        (0..4).map(|t| Group { name: format!("t{t}"), rows: rows(t) }).collect()
    }

    #[test]
    fn every_row_is_in_one_list() {
        for dirichlet in [None, Some(0.7)] {
            let lists = lists(&job(3, dirichlet), &tasks(), &different(400)).unwrap();
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
            let lists = lists(&job(2, Some(alpha)), &tasks(), &different(400)).unwrap();
            let part = |t: usize| {
                let mine = lists["private/client-1/train"].iter().filter(|&&row| row % 4 == t).count();
                let other = lists["private/client-2/train"].iter().filter(|&&row| row % 4 == t).count();
                mine.max(other) as f64 / (mine + other) as f64
            };
            (0..4).map(part).sum::<f64>() / 4.0
        };
        let (skewed, even) = (share_of_the_largest(0.05), share_of_the_largest(1000.0));
        assert!(skewed > 0.85 && even < 0.65, "{skewed} and {even}");
        let message = lists(&job(150, None), &tasks(), &different(400)).unwrap_err().to_string();
        assert!(message.contains("client 1 would have"), "{message}");
    }

    #[test]
    fn the_summary_counts_rows_of_every_task() {
        let lists = [("public".to_string(), vec![0, 1, 4, 5, 8]), ("x".to_string(), vec![2])].into();
        let lines = summary(&lists, 400, &tasks());
        assert_eq!(lines[0], "split: public        5 rows: t0 3, t1 2");
        assert_eq!(lines[1], "split: x             1 rows: t2 1");
    }

    #[test]
    fn equal_rows_stay_together_others_as_before() {
        // 100 examples, of which the first ten are there three times.
        let first: Vec<usize> = (0..120).map(|i| if i < 100 { i } else { i % 10 }).collect();
        let alike = Alike { same_prompt: first.clone(), first, duplicates: 20 };
        let tasks = [Group { name: "t".into(), rows: (0..120).collect() }];
        for dirichlet in [None, Some(5.0)] {
            let found = lists(&job(2, dirichlet), &tasks, &alike).unwrap();
            let mut all: Vec<usize> = found.values().flatten().copied().collect();
            all.sort_unstable();
            assert_eq!(all, (0..120).collect::<Vec<_>>());
            for list in found.values() {
                for i in 0..10 {
                    let copies = [i, 100 + i, 110 + i].map(|row| list.contains(&row));
                    assert!(copies.iter().all(|&c| c == copies[0]), "row {i}: {copies:?}");
                }
            }
            let without = [Group { name: "t".into(), rows: (0..100).collect() }];
            let before = lists(&job(2, dirichlet), &without, &different(100)).unwrap();
            for (name, list) in before {
                let kept: Vec<usize> = found[&name].iter().copied().filter(|&row| row < 100).collect();
                assert_eq!(kept, list, "{name}");
            }
            assert!(alike.line(&found).unwrap().contains("20 rows are exact duplicates"));
        }
        let one = Alike { first: vec![0; 10], same_prompt: vec![0; 10], duplicates: 9 };
        let tasks = [Group { name: "t".into(), rows: (0..10).collect() }];
        let message = lists(&job(1, None), &tasks, &one).unwrap_err().to_string();
        assert!(message.contains("the 10 rows of the data are 1 different ones"), "{message}");
    }
}
