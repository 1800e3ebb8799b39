//! [`Collection`]: what is to be collected, and what of it is there.
//!
//! Everything here is the same on every rank: the models, the subsets, which jobs share a
//! packed stream, and where their files lie.

use anyhow::Result;
use gradtx_kernels::rng::{derive, derive_named};
use gradtx_run::config::{Config, CurateConfig, Recipe};
use gradtx_run::progress::host_name;
use gradtx_run::record::make_dir;
use gradtx_run::role::Role;
use gradtx_runtime::artifact::{ShardState, TuplePlan, check_shard, open_regular, write_atomic, write_shard};
use gradtx_runtime::comm::{Collectives, Comm};
use gradtx_runtime::data::Dataset;
use gradtx_runtime::metrics::{JsonLines, Rate};
use gradtx_runtime::tensorboard::EventFile;
use gradtx_train::examples::Data;
use gradtx_train::lora::checkpoint::JobCheckpoint;
use gradtx_train::lora::schedule::{self, JobGroup};
use gradtx_train::lora::trainer::{Job, JobResult, LoraTrainer, Snapshots};
use gradtx_train::model_spec::ModelSpec;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Directory of the event files of all groups.
const EVENTS: &str = "events";
/// Directory of groups that were stopped on their way.
pub const CHECKPOINTS: &str = "checkpoints";

/// All shadow jobs of both models.
pub struct Collection {
    /// The settings of the run.
    pub config: Config,
    /// Those of curation, with everything decided that they leave open.
    pub curate: CurateConfig,
    /// The tuple store.
    pub dir: PathBuf,
    /// What it will hold.
    pub plan: TuplePlan,
    /// TinyLM and LLM.
    pub sides: [ModelSpec; 2],
    /// What subsets are drawn from.
    pub public: Data,
    /// Rows of every shadow subset.
    pub subsets: Vec<Vec<usize>>,
    /// Which subsets are of one group of the public data.
    pub subset_groups: Vec<usize>,
    /// Tells these settings and inputs from others.
    pub identity: String,
}

/// A group of jobs that is trained, and not yet written.
pub struct Finished {
    /// Which group.
    pub work: JobGroup,
    /// What came of each job.
    pub jobs: Vec<JobResult>,
    /// What keeps other processes from doing the same, until this is written.
    pub claim: Option<File>,
}

impl Collection {
    /// One of the models.
    pub fn side(&self, role: Role) -> &ModelSpec {
        &self.sides[role as usize]
    }

    /// How its jobs are trained.
    pub fn recipe(&self, role: Role) -> &Recipe {
        match role {
            Role::Tiny => &self.curate.tiny,
            Role::Llm => &self.curate.llm,
        }
    }

    /// The same as [`gradtx_train::lora::trainer`] has it.
    pub fn training(&self, role: Role) -> LoraTrainer<'_> {
        LoraTrainer {
            side: self.side(role),
            recipe: self.recipe(role),
            snapshots: Snapshots { count: self.plan.steps, every: self.curate.snapshot_steps },
            stream_tokens: self.config.device.max_tokens_per_microbatch,
        }
    }

    /// The shadow jobs of every group; they are the same for both models.
    pub fn groups(&self) -> Vec<Range<usize>> {
        schedule::groups(self.subsets.len(), self.curate.jobs_per_batch)
    }

    /// The groups of both models of which something is missing in the store, the same on all
    /// ranks that call this together. They look at a part of the files each.
    pub fn missing(&self, comm: &dyn Comm) -> Result<Vec<(Role, usize)>> {
        let groups = self.groups();
        let all: Vec<(Role, usize)> = [Role::Tiny, Role::Llm]
            .into_iter()
            .flat_map(|side| (0..groups.len()).map(move |group| (side, group)))
            .collect();
        let ranks = comm.size();
        let done = |&(side, group): &(Role, usize)| self.is_done(&self.dir, side, &groups[group]);
        let mine = all.iter().skip(comm.rank()).step_by(ranks);
        let found = comm.all_gather_bytes(&mine.map(|group| done(group) as u8).collect::<Vec<u8>>())?;
        let is_done = |i: usize| found[i % ranks][i / ranks] == 1;
        Ok(all.into_iter().enumerate().filter(|(i, _)| !is_done(*i)).map(|(_, group)| group).collect())
    }

    /// The jobs of a group.
    pub fn jobs<'e>(&self, examples: &'e Dataset, group: &Range<usize>) -> Vec<Job<'e>> {
        let key = derive_named(self.config.seed, "shadow job");
        let job = |shadow: usize| Job {
            examples: self.subsets[shadow].iter().map(|&row| &examples.examples[row]).collect(),
            key: derive(key, shadow as u64),
        };
        group.clone().map(job).collect()
    }

    /// File of a group's losses, in a store or a directory that is formed like one.
    pub(crate) fn metrics_file(dir: &Path, role: Role, group: &Range<usize>) -> PathBuf {
        dir.join("metrics").join(format!("{}-{:05}.jsonl", role.name(), group.start))
    }

    /// Whether everything of a group is in a directory, and intact.
    pub(crate) fn is_done(&self, dir: &Path, role: Role, group: &Range<usize>) -> bool {
        let whole = |k| matches!(check_shard(dir, &self.plan, role.side(), k), ShardState::Intact(_));
        Self::metrics_file(dir, role, group).is_file() && group.clone().all(whole)
    }

    /// Where a group is checkpointed when it is stopped.
    pub fn checkpoint(&self, role: Role, group: &Range<usize>) -> JobCheckpoint {
        let minutes = self.curate.save_minutes;
        JobCheckpoint {
            path: self.dir.join(CHECKPOINTS).join(format!("{}-{:05}.safetensors", role.name(), group.start)),
            of: json!({ "model": role, "jobs": [group.start, group.end], "settings": self.identity }),
            every: Duration::try_from_secs_f64(60.0 * minutes).unwrap_or(Duration::MAX),
        }
    }

    /// Writes what came of a group: its losses first, for the shards say that it is done.
    pub fn write(&self, dir: &Path, finished: &Finished) -> Result<()> {
        let Finished { work, jobs, .. } = finished;
        let group = self.groups()[work.group].clone();
        let path = Self::metrics_file(dir, work.side, &group);
        make_dir(&dir.join("metrics"))?;
        write_atomic(&path, |out| {
            for (shadow, job) in group.clone().zip(jobs) {
                for step in 0..job.losses.len() {
                    let subset = ("subset".to_string(), json!(shadow));
                    let numbers = job.line(step, self.recipe(work.side), self.subsets[shadow].len());
                    let line: Map<String, Value> = std::iter::once(subset).chain(numbers).collect();
                    writeln!(out, "{}", json!(line))?;
                }
            }
            Ok(())
        })?;
        for (shadow, job) in group.zip(jobs) {
            write_shard(dir, &self.plan, work.side.side(), shadow, &job.updates)?;
        }
        Ok(())
    }

    /// Writes the means over a group's jobs for TensorBoard, which shows every group as a run.
    pub(crate) fn write_events(&self, finished: &Finished) -> Result<()> {
        let Finished { work, jobs, .. } = finished;
        let group = self.groups()[work.group].clone();
        let dir = self.dir.join(EVENTS).join(format!("{}-{:05}", work.side.name(), group.start));
        make_dir(&dir)?;
        let mut file = EventFile::resume(&dir, &host_name(), 0)?;
        let steps = jobs.first().map_or(0, |job| job.losses.len());
        for step in 0..steps {
            let lines = group
                .clone()
                .zip(jobs)
                .map(|(shadow, job)| job.line(step, self.recipe(work.side), self.subsets[shadow].len()));
            let lines: Vec<Map<String, Value>> = lines.collect();
            let mean = |name: &str| {
                lines.iter().filter_map(|line| line[name].as_f64()).sum::<f64>() / lines.len() as f64
            };
            let names = ["loss", "grad_norm", "learning_rate", "epoch", "tokens"];
            file.write(step as u64 + 1, &names.map(|name| (name, mean(name))))?;
        }
        Ok(())
    }

    /// Copies a group's files from one directory to another, and removes them there.
    pub fn gather(&self, from: &Path, to: &Path, work: &JobGroup) -> Result<()> {
        let group = self.groups()[work.group].clone();
        let metrics = Self::metrics_file(Path::new(""), work.side, &group);
        let shard = |k| gradtx_runtime::artifact::shard_path(Path::new(""), work.side.side(), k);
        let files: Vec<PathBuf> = std::iter::once(metrics).chain(group.map(shard)).collect();
        for name in &files {
            let path = from.join(name);
            let mut source = open_regular(&path)?;
            if let Some(above) = to.join(name).parent() {
                make_dir(above)?;
            }
            write_atomic(&to.join(name), |out| std::io::copy(&mut source, out).map(drop))?;
        }
        for name in &files {
            // What stays here is overwritten by the next group of this number.
            let _ = std::fs::remove_file(from.join(name));
        }
        Ok(())
    }
}

/// The throughput files, one of each model: a line for every group.
pub struct Throughput {
    /// What comes after the model's name in the files' names.
    end: String,
    /// Opened with the first line: opening waits for the disk, and a line does not.
    files: [Option<JsonLines>; 2],
}

impl Throughput {
    /// `throughput-ROLE` and this.
    pub fn new(end: impl Into<String>) -> Self {
        Self { end: end.into(), files: [None, None] }
    }

    /// A group of so many jobs is trained, by this rank.
    pub fn write(
        &mut self,
        collection: &Collection,
        work: &JobGroup,
        jobs: usize,
        rate: Rate,
        rank: usize,
    ) -> Result<()> {
        let file = &mut self.files[work.side as usize];
        if file.is_none() {
            let name = format!("throughput-{}{}", work.side.name(), self.end);
            *file = Some(JsonLines::resume(&collection.dir.join(name), u64::MAX)?);
        }
        let line = json!({
            "step": collection.recipe(work.side).max_steps,
            "group": work.group,
            "jobs": jobs,
            "tokens": rate.tokens,
            "seconds": rate.time.as_secs_f64(),
            "tokens_per_s": rate.per_second(),
            "rank": rank,
        });
        file.as_mut().map_or(Ok(()), |file| Ok(file.write(&line)?))
    }
}
