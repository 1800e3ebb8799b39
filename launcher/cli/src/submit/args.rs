//! The options of `gradtx submit`, as typed.
//!
//! In: words. Out: [`JobOptions`] for all jobs and for each kind of job, and a [`Profile`] with what
//! the command line adds to it. `--nodes 8` is said of all jobs, `--nodes train=1` of one.

use crate::slurm::options::{JobKind, JobOptions, Origin};
use crate::slurm::profile::{self, Container, ContainerRuntime, Profile};
use crate::slurm::words;
use anyhow::Result;
use clap::ValueEnum;
use gradtx_plan::cost::Gpu;
use gradtx_run::config::RunArgs;
use gradtx_run::failure::unusable;
use gradtx_train::baselines::Method;
use std::path::PathBuf;
use std::str::FromStr;

/// A value for all jobs, or for one kind of job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scoped<T> {
    /// The job that it is for; `None` for all.
    pub kind: Option<JobKind>,
    /// The value.
    pub value: T,
}

impl<T: FromStr> FromStr for Scoped<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let scoped = JobKind::ALL
            .into_iter()
            .find_map(|kind| Some((kind, text.strip_prefix(kind.name())?.strip_prefix('=')?)));
        let (kind, rest) = scoped.map_or((None, text), |(kind, rest)| (Some(kind), rest));
        match rest.parse() {
            Ok(value) => Ok(Self { kind, value }),
            Err(_) => {
                Err("expected a number, or JOB=NUMBER with curate, train, evaluate, report or emulate".into())
            }
        }
    }
}

/// Jobs of an array, and how many of them at once: `32` or, as SLURM writes it, `32%8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArraySize {
    /// Jobs.
    pub jobs: u32,
    /// At once.
    pub limit: Option<u32>,
}

impl FromStr for ArraySize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().ok().filter(|n| (1..=1_000_000).contains(n));
        let found = match text.split_once('%') {
            None => number(text).map(|jobs| Self { jobs, limit: None }),
            Some((jobs, limit)) => {
                number(jobs).and_then(|jobs| number(limit).map(|limit| Self { jobs, limit: Some(limit) }))
            }
        };
        found.ok_or_else(|| "expected a number of jobs, or JOBS%AT_ONCE, e.g. 32%8".into())
    }
}

/// An environment variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    name: String,
    value: String,
}

impl FromStr for Variable {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
        Ok(Self { name: name.into(), value: value.into() })
    }
}

/// What to submit.
#[derive(Clone, Debug, clap::Args)]
pub struct Job {
    /// The run and its configuration.
    #[command(flatten)]
    pub run: RunArgs,
    /// Which part.
    #[arg(long, value_enum)]
    pub stage: Stage,
    /// With the stages evaluate and pipeline: directory of a client, with update.safetensors or
    /// train.jsonl, and test.jsonl if there is something to score; repeatable.
    #[arg(long, value_name = "DIR")]
    pub client: Vec<PathBuf>,
    /// What the jobs ask SLURM for.
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Print the scripts, the commands, and where each value is from; submit nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Submit although jobs of this run that do the same are still in the queue.
    #[arg(long)]
    pub again: bool,
}

/// What can be submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Stage {
    /// Collect the tuples.
    Curate,
    /// Train the translator.
    Train,
    /// Score clients, and write the report; without clients, the report alone.
    Evaluate,
    /// All of these, each when the one before it has succeeded.
    Pipeline,
    /// Make an emulator of the LLM (GradOT).
    Emulate,
}

/// What jobs ask SLURM for. `[JOB=]` before a value: `curate=`, `train=`, `evaluate=`, `report=` or
/// `emulate=` restricts it to one job.
#[derive(Clone, Debug, Default, PartialEq, clap::Args)]
#[command(
    next_help_heading = "Cluster (VALUE for all jobs, or JOB=VALUE with curate, train, evaluate, report, emulate)"
)]
pub struct ClusterArgs {
    /// Site profile: a file (TOML), the name of one in ~/.config/gradtx, or `none` (default:
    /// GRADTX_PROFILE, or `cluster` if there is one).
    #[arg(long, value_name = "NAME|FILE")]
    pub profile: Option<String>,
    /// Nodes of curation and training. For all jobs, at most so many: with --gpu, training takes
    /// fewer where `gradtx plan` finds that faster. With JOB=, exactly so many.
    #[arg(long, value_name = "[JOB=]N")]
    pub nodes: Vec<Scoped<u32>>,
    /// GPUs, and ranks, of a node; 0 for one rank on the CPU (default: 4, or 0 where the settings
    /// or this program compute on the CPU, and for the report).
    #[arg(long, value_name = "[JOB=]G")]
    pub gpus_per_node: Vec<Scoped<u32>>,
    /// The same with a type, as some sites want it: gpu:a100:4.
    #[arg(long, value_name = "[JOB=]gpu:TYPE:G")]
    pub gres: Vec<Scoped<String>>,
    /// What the GPUs are: nodes, and curate.jobs_per_batch where it is not set, are then chosen as
    /// `gradtx plan` recommends.
    #[arg(long, value_enum)]
    pub gpu: Option<Gpu>,
    /// CPU cores of a rank (default: 8; report: 2).
    #[arg(long, value_name = "[JOB=]N")]
    pub cpus_per_task: Vec<Scoped<u32>>,
    /// Memory of a node, e.g. 480G; 0 for all of it.
    #[arg(long, value_name = "[JOB=]SIZE")]
    pub mem: Vec<Scoped<String>>,
    /// Time limit of a job; one that reaches it is requeued and resumes (default: 12:00:00; report:
    /// 01:00:00).
    #[arg(long, value_name = "[JOB=]TIME")]
    pub time: Vec<Scoped<String>>,
    /// Curate by an array of this many jobs with a GPU each, at most LIMIT at once, instead of by ranks.
    #[arg(long, value_name = "N[%LIMIT]")]
    pub array: Option<ArraySize>,
    /// Most jobs of an array at once: of curation with --array, of evaluation one for each client.
    #[arg(long, value_name = "[JOB=]N")]
    pub array_limit: Vec<Scoped<u32>>,
    /// Partition.
    #[arg(long, value_name = "[JOB=]NAME")]
    pub partition: Vec<Scoped<String>>,
    /// Account.
    #[arg(long, value_name = "[JOB=]NAME")]
    pub account: Vec<Scoped<String>>,
    /// Quality of service.
    #[arg(long, value_name = "[JOB=]NAME")]
    pub qos: Vec<Scoped<String>>,
    /// Features that nodes must have, e.g. a100&nvlink.
    #[arg(long, value_name = "[JOB=]LIST")]
    pub constraint: Vec<Scoped<String>>,
    /// Reservation.
    #[arg(long, value_name = "[JOB=]NAME")]
    pub reservation: Vec<Scoped<String>>,
    /// Nodes that are not to be used, e.g. node[07-08].
    #[arg(long, value_name = "[JOB=]NODES")]
    pub exclude: Vec<Scoped<String>>,
    /// Whole nodes, shared with no other job.
    #[arg(long)]
    pub exclusive: bool,
    /// Lower priority by this much.
    #[arg(long, value_name = "[JOB=]N", allow_hyphen_values = true)]
    pub nice: Vec<Scoped<i64>>,
    /// Comment, one word.
    #[arg(long, value_name = "[JOB=]TEXT")]
    pub comment: Vec<Scoped<String>>,
    /// Address for mail.
    #[arg(long, value_name = "[JOB=]ADDRESS")]
    pub mail_user: Vec<Scoped<String>>,
    /// Events that mail is sent about, e.g. END,FAIL.
    #[arg(long, value_name = "[JOB=]TYPES")]
    pub mail_type: Vec<Scoped<String>>,
    /// Seconds before the time limit at which ranks are asked to write a checkpoint (default: 120).
    #[arg(long, value_name = "[JOB=]N")]
    pub signal_seconds: Vec<Scoped<u32>>,
    /// How srun starts MPI: pmix (Open MPI, the default), pmi2 (MPICH).
    #[arg(long, value_name = "[JOB=]NAME")]
    pub mpi: Vec<Scoped<String>>,
    /// One more option of sbatch, e.g. `--sbatch=--hint=nomultithread`, or for one job
    /// `--sbatch=train=--spread-job`; repeatable.
    #[arg(long, value_name = "[JOB=]OPTION", allow_hyphen_values = true)]
    pub sbatch: Vec<Scoped<String>>,
    /// One more option of srun, e.g. `--srun=--cpu-bind=cores`; repeatable.
    #[arg(long, value_name = "[JOB=]OPTION", allow_hyphen_values = true)]
    pub srun: Vec<Scoped<String>>,
    /// A line of bash that the jobs begin with, e.g. `module load openmpi`; repeatable.
    #[arg(long, value_name = "LINE")]
    pub setup: Vec<String>,
    /// Environment variable of the jobs; repeatable.
    #[arg(long, value_name = "NAME=VALUE")]
    pub env: Vec<Variable>,
    /// Run the program in a container: an image for apptainer, or what the profile names.
    #[arg(long, value_name = "IMAGE")]
    pub container: Option<String>,
    /// What starts the container.
    #[arg(long, value_enum, value_name = "RUNTIME")]
    pub container_runtime: Option<ContainerRuntime>,
    /// One more directory that is mounted in the container; repeatable.
    #[arg(long, value_name = "DIR")]
    pub mount: Vec<PathBuf>,
}

impl ClusterArgs {
    /// Has clients served by these translators.
    pub(crate) fn set_methods(&mut self, methods: &[Method]) {
        let names: Vec<&str> = methods.iter().map(|method| method.name()).collect();
        self.env.push(Variable { name: "METHODS".into(), value: names.join(" ") });
    }

    /// What was said of all jobs, or of one kind of job.
    fn options(&self, kind: Option<JobKind>) -> JobOptions {
        fn last<T: Clone>(all: &[Scoped<T>], kind: Option<JobKind>) -> Option<T> {
            all.iter().rev().find(|scoped| scoped.kind == kind).map(|scoped| scoped.value.clone())
        }
        fn every<T: Clone>(all: &[Scoped<T>], kind: Option<JobKind>) -> Vec<T> {
            all.iter().filter(|scoped| scoped.kind == kind).map(|scoped| scoped.value.clone()).collect()
        }
        let of_curation = kind == Some(JobKind::Curate);
        let limit = self.array.and_then(|array| array.limit).filter(|_| of_curation);
        JobOptions {
            nodes: last(&self.nodes, kind),
            gpus_per_node: last(&self.gpus_per_node, kind),
            gres: last(&self.gres, kind),
            cpus_per_task: last(&self.cpus_per_task, kind),
            time: last(&self.time, kind),
            mem: last(&self.mem, kind),
            account: last(&self.account, kind),
            partition: last(&self.partition, kind),
            qos: last(&self.qos, kind),
            constraint: last(&self.constraint, kind),
            reservation: last(&self.reservation, kind),
            exclude: last(&self.exclude, kind),
            exclusive: (kind.is_none() && self.exclusive).then_some(true),
            nice: last(&self.nice, kind),
            comment: last(&self.comment, kind),
            mail_user: last(&self.mail_user, kind),
            mail_type: last(&self.mail_type, kind),
            signal_seconds: last(&self.signal_seconds, kind),
            array_limit: limit.or_else(|| last(&self.array_limit, kind)),
            mpi: last(&self.mpi, kind),
            sbatch: every(&self.sbatch, kind),
            srun: every(&self.srun, kind),
        }
    }

    /// Checks every option.
    ///
    /// # Errors
    /// At the first that must not stand in a batch script.
    pub fn check(&self) -> Result<()> {
        let label = |key: &str| format!("--{}", key.replace('_', "-"));
        for kind in [None].into_iter().chain(JobKind::ALL.map(Some)) {
            self.options(kind).check(&label)?;
        }
        if let Some(line) = self.setup.iter().find(|line| line.chars().any(|c| c.is_control() && c != '\t')) {
            return Err(unusable(format!("--setup {}: expected one line of bash", line.escape_debug())));
        }
        self.env.iter().try_for_each(|var| profile::check_variable("--env", &var.name, &var.value))?;
        self.mount.iter().try_for_each(|dir| words::check_mount("--mount", dir))
    }

    /// Its options for a kind of job, with their origins: those for all jobs, then its own.
    pub fn layers(&self, kind: JobKind) -> [(Origin, JobOptions); 2] {
        [
            (Origin::CommandLine(false), self.options(None)),
            (Origin::CommandLine(true), self.options(Some(kind))),
        ]
    }

    /// The profile, with what the command line has in its place or adds to it.
    ///
    /// # Errors
    /// If there is no such profile, or something in it cannot be used.
    pub fn site(&self) -> Result<Profile> {
        let mut site = Profile::find(self.profile.as_deref())?;
        site.setup.extend(self.setup.iter().cloned());
        let variables = self.env.iter().map(|var| (var.name.clone(), var.value.clone()));
        site.environment.extend(variables);
        if let Some(image) = &self.container {
            let program = "gradtx".to_string();
            let container = site.container.get_or_insert(Container { program, ..Container::default() });
            container.image.clone_from(image);
        }
        match &mut site.container {
            Some(container) => {
                container.runtime = self.container_runtime.unwrap_or(container.runtime);
                container.mounts.extend(self.mount.iter().cloned());
                container.check("--container")?;
            }
            None if !self.mount.is_empty() || self.container_runtime.is_some() => {
                return Err(unusable(
                    "--mount and --container-runtime: expected a container (--container IMAGE)",
                ));
            }
            None => {}
        }
        Ok(site)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_for_all_jobs_or_for_one() {
        let parsed = |text: &str| text.parse::<Scoped<u32>>();
        assert_eq!(parsed("8").unwrap(), Scoped { kind: None, value: 8 });
        assert_eq!(parsed("train=1").unwrap(), Scoped { kind: Some(JobKind::Train), value: 1 });
        assert!(parsed("trian=1").unwrap_err().contains("curate, train"));
        let option: Scoped<String> = "evaluate=--gres=gpu:1".parse().unwrap();
        assert_eq!((option.kind, option.value.as_str()), (Some(JobKind::Evaluate), "--gres=gpu:1"));
        let option: Scoped<String> = "--comment=train=3".parse().unwrap();
        assert_eq!((option.kind, option.value.as_str()), (None, "--comment=train=3"));
    }

    #[test]
    fn arrays_are_written_as_slurm_writes_them() {
        assert_eq!("32".parse(), Ok(ArraySize { jobs: 32, limit: None }));
        assert_eq!("32%8".parse(), Ok(ArraySize { jobs: 32, limit: Some(8) }));
        for wrong in ["", "0", "3%", "%3", "0-3", "3%0", "3%x", "1000001"] {
            assert!(wrong.parse::<ArraySize>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_limit_of_an_array_is_that_of_curation() {
        let args = ClusterArgs { array: Some("32%8".parse().unwrap()), ..ClusterArgs::default() };
        let of = |kind| args.options(kind).array_limit;
        assert_eq!([of(None), of(Some(JobKind::Curate)), of(Some(JobKind::Evaluate))], [None, Some(8), None]);
    }
}
