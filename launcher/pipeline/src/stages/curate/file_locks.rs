//! [`FileLocks`]: work among processes that know of each other only through the run directory.
//!
//! In: the groups that are missing. Out: groups that nobody else works at, one after the
//! other. A process takes a group by locking its file in `file_locks/`; the lock goes with the
//! process, so what a killed one had is free at once. Every process begins at another place
//! of the list, so that they meet late, and where a file system has no locks each does its
//! own share first. Should two do the same there, they write the same bytes.

use super::collection::{Collection, Finished, Throughput};
use super::job_source::{JobProgress, JobSource, Task, TimeBreakdown};
use super::shard_writer::ShardWriter;
use anyhow::{Context as _, Result};
use gradtx_run::interrupt;
use gradtx_run::record::make_dir;
use gradtx_run::role::Role;
use gradtx_run::ui::Progress;
use gradtx_train::lora::schedule::JobGroup;
use std::collections::VecDeque;
use std::fs::{File, OpenOptions, TryLockError};
use std::path::PathBuf;

/// Directory of the lock files.
pub(crate) const CLAIMS: &str = "file_locks";

/// Which of how many processes this one is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// From 0.
    pub index: usize,
    /// Of so many.
    pub count: usize,
    /// Tells it from the others, in names of files.
    pub name: String,
}

impl Position {
    /// From SLURM's variables of a job array, and of several tasks in one step; the only one
    /// where there are none.
    pub fn find() -> Self {
        Self::read(|name| std::env::var(name).ok(), std::process::id())
    }

    fn read(get: impl Fn(&str) -> Option<String>, pid: u32) -> Self {
        let number = |name: &str| get(name).and_then(|text| text.trim().parse::<usize>().ok());
        let id = number("SLURM_ARRAY_TASK_ID");
        let (from, step) =
            (number("SLURM_ARRAY_TASK_MIN").unwrap_or(0), number("SLURM_ARRAY_TASK_STEP").unwrap_or(1));
        let tasks = number("SLURM_STEP_NUM_TASKS").filter(|_| get("SLURM_STEP_ID").is_some()).unwrap_or(1);
        let task = number("SLURM_PROCID").filter(|_| tasks > 1).unwrap_or(0);
        let array = id.map_or(0, |id| id.saturating_sub(from) / step.max(1));
        let count = number("SLURM_ARRAY_TASK_COUNT").filter(|_| id.is_some()).unwrap_or(1).max(1) * tasks;
        let host = gradtx_run::progress::host_name();
        let name = match id {
            Some(id) if tasks > 1 => format!("{id}-{task}"),
            Some(id) => format!("{id}"),
            None => format!("{host}-{pid}"),
        };
        Self { index: (array * tasks + task) % count, count, name }
    }
}

/// The groups in the order in which a process looks at them: its own share first.
pub fn order(mut work: Vec<JobGroup>, position: &Position) -> VecDeque<JobGroup> {
    work.sort_by(|a, b| {
        b.cost.total_cmp(&a.cost).then((a.side as usize, a.group).cmp(&(b.side as usize, b.group)))
    });
    let own = |i: &usize| i % position.count == position.index;
    let (own, other): (Vec<usize>, Vec<usize>) = (0..work.len()).partition(own);
    own.into_iter().chain(other).map(|i| work[i]).collect()
}

/// One of several processes.
pub struct FileLocks<'a> {
    collection: &'a Collection,
    shard_writer: ShardWriter,
    /// Files of its own, since several processes do not write in turn.
    throughput: Throughput,
    position: usize,
    waiting: VecDeque<JobGroup>,
    progress: Progress,
    /// Steps of the groups that this process finished.
    steps: u64,
}

impl<'a> FileLocks<'a> {
    /// With these groups missing when it began.
    pub fn new(
        collection: &'a Collection,
        shard_writer: ShardWriter,
        position: &Position,
        work: Vec<JobGroup>,
        progress: Progress,
    ) -> Result<Self> {
        make_dir(&collection.dir.join(CLAIMS))?;
        let waiting = order(work, position);
        let throughput = Throughput::new(format!(".{}.jsonl", position.name));
        Ok(Self {
            collection,
            shard_writer,
            throughput,
            position: position.index,
            waiting,
            progress,
            steps: 0,
        })
    }

    /// Tries to take a group; the lock on success.
    fn claim(&self, work: &JobGroup) -> Result<Option<Task>> {
        let name = format!("{}-{:05}.lock", work.side.name(), work.group);
        let path: PathBuf = self.collection.dir.join(CLAIMS).join(name);
        let opened = OpenOptions::new().create(true).read(true).write(true).truncate(false).open(&path);
        let file: File = opened.with_context(|| format!("{}: cannot write here", path.display()))?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Ok(None);
        }
        // Somebody may have finished it since this process looked.
        let group = &self.collection.groups()[work.group];
        if self.collection.is_done(&self.collection.dir, work.side, group) {
            return Ok(None);
        }
        Ok(Some(Task { work: *work, claim: Some(file) }))
    }
}

impl JobSource for FileLocks<'_> {
    fn next(&mut self, resident: Option<Role>) -> Result<Option<Task>> {
        // First what needs no other model.
        let (same, other): (VecDeque<JobGroup>, VecDeque<JobGroup>) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|work| resident.is_none_or(|side| side == work.side));
        let mut waiting: VecDeque<JobGroup> = same.into_iter().chain(other).collect();
        let mut found = None;
        while found.is_none() && interrupt::stop_requested().is_none() {
            let Some(work) = waiting.pop_front() else { break };
            found = self.claim(&work)?;
        }
        self.waiting = waiting;
        Ok(found)
    }

    fn between(&mut self) -> Result<()> {
        Ok(())
    }

    fn step(&mut self, now: &JobProgress) -> Result<bool> {
        let message = format!(
            "{} group {}, step {} of {}, {}{:.0} tokens/s",
            now.work.side.name(),
            now.work.group,
            now.done,
            now.steps,
            now.loss.map_or(String::new(), |loss| format!("loss {loss:.4}, ")),
            now.rate.per_second()
        );
        self.progress.set(self.steps + now.done as u64, message);
        Ok(interrupt::stop_requested().is_none())
    }

    fn deliver(&mut self, finished: Finished, now: &JobProgress) -> Result<()> {
        self.steps += now.steps as u64;
        self.throughput.write(self.collection, &now.work, now.jobs, now.rate, self.position)?;
        self.shard_writer.give(finished)
    }

    fn end(self: Box<Self>, unfinished: bool, _: TimeBreakdown) -> Result<Option<u8>> {
        let left = unfinished || !self.waiting.is_empty();
        self.shard_writer.end()?;
        Ok(interrupt::stop_requested().filter(|_| left))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(variables: &[(&str, &str)]) -> (usize, usize, String) {
        let get = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
        let Position { index, count, name } = Position::read(get, 77);
        (index, count, name)
    }

    #[test]
    fn a_process_knows_its_place_in_an_array() {
        let array = |id: &'static str| {
            vec![
                ("SLURM_ARRAY_TASK_ID", id),
                ("SLURM_ARRAY_TASK_MIN", "3"),
                ("SLURM_ARRAY_TASK_COUNT", "4"),
                ("SLURM_ARRAY_TASK_STEP", "2"),
            ]
        };
        assert_eq!(position(&array("3")), (0, 4, "3".into()));
        assert_eq!(position(&array("9")), (3, 4, "9".into()));
        let mut tasks = array("5");
        tasks.extend([("SLURM_STEP_ID", "0"), ("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_PROCID", "1")]);
        assert_eq!(position(&tasks), (3, 8, "5-1".into()));
        let (index, count, name) = position(&[]);
        assert_eq!((index, count), (0, 1));
        assert!(name.ends_with("-77"), "{name}");
    }

    #[test]
    fn everybody_looks_at_everything_and_begins_elsewhere() {
        let work: Vec<JobGroup> =
            (0..7).map(|group| JobGroup { side: Role::Llm, group, cost: 10.0 - group as f64 }).collect();
        let mut first = vec![];
        for index in 0..3 {
            let position = Position { index, count: 3, name: String::new() };
            let order = order(work.clone(), &position);
            first.push(order[0].group);
            let mut all: Vec<usize> = order.iter().map(|w| w.group).collect();
            assert!(all[..2].is_sorted(), "longest first");
            all.sort_unstable();
            assert_eq!(all, [0, 1, 2, 3, 4, 5, 6]);
        }
        assert_eq!(first, [0, 1, 2]);
    }
}
