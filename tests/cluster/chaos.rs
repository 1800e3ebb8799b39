//! Chaos: a curation and a training whose ranks are killed again and again, with SIGKILL, at
//! random moments; in the end the files are those of an undisturbed run.
//!
//! `make chaos` runs it, with `CHAOS_SEED` (default 1) and `CHAOS_COUNT` (default 25 kills).
//! Prints every kill, and at the end: kills, restarts, work that was repeated, files that
//! differ, temporary files that were left. Fails unless the last two are none, and unless
//! everything that was finished before a kill is still the same file at the end.
//!
//! Kinds of kills: one rank that is not the first, rank 0, all ranks and `mpirun` with them,
//! and all of them at the moment when a temporary file is there.

#![allow(clippy::unwrap_used)]

use gradtx_kernels::rng::Stream;
use gradtx_tests::miniature::{self, checksums};
use gradtx_tests::ranks::{End, children, end_of, mpirun, signal};
use serde_json::Value;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_gradtx-under-test");
/// Ranks of every training: with another number, sums are rounded in another way.
const TRAINING_RANKS: usize = 2;
/// Long enough to be killed a dozen times, and short enough to come to an end in between.
const SETTINGS: [&str; 9] = [
    "curate.num_subsets=12",
    "curate.tiny.max_steps=3000",
    "curate.llm.max_steps=2000",
    "curate.save_minutes=0.005",
    "train.max_steps=30000",
    "train.global_batch_size=8",
    "train.per_device_train_batch_size=4",
    "train.eval_steps=2500",
    "train.save_minutes=0.005",
];

fn main() {
    let number = |name: &str, default: u64| {
        std::env::var(name).ok().map_or(default, |text| text.parse().expect("a whole number"))
    };
    let (seed, count) = (number("CHAOS_SEED", 1), number("CHAOS_COUNT", 25));
    println!("chaos: seed {seed}, {count} kills");
    let home = tempfile::tempdir().unwrap();
    miniature::write(home.path());
    for (stage, ranks) in [("curate", 1), ("train", TRAINING_RANKS)] {
        end_of(command(home.path(), stage, "calm", ranks)).well();
    }
    let mut chaos = Chaos { home: home.path(), random: Stream::new(seed), told: Told::default() };
    chaos.disturb("curate", count.div_ceil(2));
    chaos.disturb("train", count - chaos.told.kills);
    chaos.compare();
    // A stage may have come to its end before its share of the kills, on a fast machine above
    // all. The rest of them meet other trainings.
    while chaos.told.kills < count {
        let before = chaos.told.kills;
        std::fs::remove_dir_all(home.path().join("run/translator")).unwrap();
        chaos.disturb("train", count - before);
        chaos.compare();
        assert!(chaos.told.kills > before, "a training ended before it could be killed once");
    }
    let told = chaos.told;
    println!("kills {}, attempts after them {}", told.kills, told.restarts);
    println!(
        "groups that rank 0 heard of as trained {}, of which again, since they were killed before they were written, {}",
        told.groups, told.groups_again
    );
    println!("training steps done again after kills {}", told.steps_again);
    println!("finished files made again {}", told.made_again.len());
    println!("differing files {}, temporary files {}", told.differing.len(), told.temporary.len());
    assert!(told.made_again.is_empty(), "made again: {:?}", told.made_again);
    assert!(told.differing.is_empty(), "differ: {:?}", told.differing);
    assert!(told.temporary.is_empty(), "left: {:?}", told.temporary);
    // The comparison sees a difference where there is one.
    std::fs::write(home.path().join("run/shadow/subsets.json"), "[]").unwrap();
    assert_eq!(differing(home.path()).len(), 1);
    println!("chaos: ok");
}

#[derive(Default)]
struct Told {
    kills: u64,
    restarts: u64,
    groups: usize,
    groups_again: usize,
    steps_again: u64,
    made_again: Vec<PathBuf>,
    differing: Vec<PathBuf>,
    temporary: Vec<PathBuf>,
}

struct Chaos<'a> {
    home: &'a Path,
    random: Stream,
    told: Told,
}

/// Whom a kill meets, and when.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kill {
    Rank,
    RankZero,
    All,
    MidWrite,
}

impl Chaos<'_> {
    /// Runs a stage to its end, with so many kills on the way, or fewer if it ends before.
    fn disturb(&mut self, stage: &str, kills: u64) {
        let mut finished: BTreeMap<PathBuf, u64> = BTreeMap::new();
        let mut done = 0;
        loop {
            let ranks = match stage {
                "train" => TRAINING_RANKS,
                _ => 1 + self.random.below(4),
            };
            let mut child = command(self.home, stage, "run", ranks)
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let kind = [Kill::Rank, Kill::RankZero, Kill::All, Kill::MidWrite][self.random.below(4)];
            if done < kills && self.strike(&mut child, kind) {
                done += 1;
                wait_for_all_to_go(&mut child);
                println!("kill {}: {stage} on {ranks} ranks, {kind:?}", self.told.kills + 1);
                self.told.kills += 1;
                self.told.restarts += 1;
                if stage == "train" {
                    self.told.steps_again += steps_told(self.home).saturating_sub(checkpointed(self.home));
                }
                self.remember(&mut finished);
                continue;
            }
            let began = Instant::now();
            End::of(child.wait_with_output().unwrap(), began).well();
            println!("{stage} ended after {done} of {kills} kills");
            break;
        }
        self.remember(&mut finished);
        if stage == "curate" {
            self.count_groups();
        }
    }

    /// Notes what differs from the undisturbed run, and what is left of processes at work.
    fn compare(&mut self) {
        self.told.differing.extend(differing(self.home));
        self.told.temporary.extend(temporary(&self.home.join("run")));
    }

    /// Kills, after some time; false if the stage ended before.
    fn strike(&mut self, child: &mut Child, kind: Kill) -> bool {
        let wait = Duration::from_millis(300 + self.random.below(2500) as u64);
        let began = Instant::now();
        while began.elapsed() < wait {
            if child.try_wait().unwrap().is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        if kind == Kill::MidWrite {
            let limit = Instant::now() + Duration::from_secs(5);
            while temporary(&self.home.join("run")).is_empty() && Instant::now() < limit {
                if child.try_wait().unwrap().is_some() {
                    return false;
                }
            }
        }
        let mut ranks = children(child);
        if ranks.is_empty() {
            return false;
        }
        // Process numbers are given in the order of ranks.
        ranks.sort_unstable();
        match kind {
            Kill::RankZero => signal(ranks[0], "KILL"),
            Kill::Rank => signal(ranks[ranks.len() - 1], "KILL"),
            Kill::All | Kill::MidWrite => {
                ranks.iter().for_each(|&pid| signal(pid, "KILL"));
                signal(child.id(), "KILL");
            }
        }
        true
    }

    /// Notes the shards that are there, and which of those of finished groups are others now.
    fn remember(&mut self, before: &mut BTreeMap<PathBuf, u64>) {
        let entries = std::fs::read_dir(self.home.join("run/shadow/shards")).into_iter().flatten().flatten();
        let now: BTreeMap<PathBuf, u64> = entries
            .filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'))
            .map(|entry| (entry.path(), entry.metadata().unwrap().ino()))
            .collect();
        for (path, file) in before.iter() {
            if now.get(path) != Some(file) && group_is_whole(before, path) {
                self.told.made_again.push(path.clone());
            }
        }
        *before = now;
    }

    fn count_groups(&mut self) {
        for side in ["tiny", "llm"] {
            let path = self.home.join(format!("run/shadow/throughput-{side}.jsonl"));
            let text = std::fs::read_to_string(path).unwrap_or_default();
            let mut groups: Vec<u64> = text
                .lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok()?["group"].as_u64())
                .collect();
            self.told.groups += groups.len();
            groups.sort_unstable();
            let all = groups.len();
            groups.dedup();
            self.told.groups_again += all - groups.len();
        }
    }
}

/// Whether the shards of both jobs of a group are there. One that was killed while it was
/// written is not finished, and is written again.
fn group_is_whole(known: &BTreeMap<PathBuf, u64>, shard: &Path) -> bool {
    let name = shard.file_name().unwrap().to_string_lossy().into_owned();
    let (number, side) = name.split_once('.').unwrap();
    let first = number.parse::<usize>().unwrap() / 2 * 2;
    (first..first + 2).all(|k| known.contains_key(&shard.with_file_name(format!("{k:05}.{side}"))))
}

fn command(home: &Path, stage: &str, run: &str, ranks: usize) -> std::process::Command {
    let mut words = vec![PROGRAM, stage, "--run", run, "--config", "settings.toml", "--threads", "1"];
    words.extend(SETTINGS.iter().flat_map(|set| ["--set", set]));
    mpirun(home, &[(ranks, &words)])
}

/// Waits until `mpirun` and all its processes have gone.
fn wait_for_all_to_go(child: &mut Child) {
    let ranks = children(child);
    child.wait().unwrap();
    for pid in ranks {
        while Path::new(&format!("/proc/{pid}")).exists() {
            signal(pid, "KILL");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The step of the newest checkpoint of the translator.
fn checkpointed(home: &Path) -> u64 {
    let entries = std::fs::read_dir(home.join("run/translator/checkpoints")).into_iter().flatten().flatten();
    let step = |entry: std::fs::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.strip_prefix("step-")?.split('.').next()?.parse().ok()
    };
    entries.filter_map(step).max().unwrap_or(0)
}

/// The last step that the metrics report of.
fn steps_told(home: &Path) -> u64 {
    let text = std::fs::read_to_string(home.join("run/translator/metrics.jsonl")).unwrap_or_default();
    let steps = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()?["step"].as_u64());
    steps.max().unwrap_or(0)
}

/// Files of the disturbed run that are not as in the calm one, and those that one of them lacks.
fn differing(home: &Path) -> Vec<PathBuf> {
    let of = |run: &str| -> BTreeMap<PathBuf, String> {
        let dir = home.join(run);
        let files = checksums(&dir).into_iter();
        files.map(|(path, sum)| (path.strip_prefix(&dir).unwrap().to_owned(), sum)).collect()
    };
    let (calm, run) = (of("calm"), of("run"));
    assert!(calm.len() > 40, "{calm:?}");
    let all = calm.keys().chain(run.keys()).filter(|path| calm.get(*path) != run.get(*path));
    let mut all: Vec<PathBuf> = all.cloned().collect();
    all.sort();
    all.dedup();
    all
}

/// Files that only a process at work may have.
fn temporary(dir: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() {
            found.extend(temporary(&path));
        } else if name.ends_with(".tmp") {
            found.push(path);
        }
    }
    found
}
