//! The jobs of a submission: what each asks for, and what it waits for.
//!
//! In: which part of the pipeline of which run, options and profile. Out: [`Batch`]es in the order
//! in which they follow each other. Nothing is read or written here but for the options' sake.

use super::args::{ClusterArgs, Stage};
use super::check;
use crate::slurm::options::{JobKind, JobOptions, Origin, Resolved};
use crate::slurm::{Batch, Dependency, Prelude, Profile, Script, words};
use anyhow::Result;
use gradtx_run::config::{Config, DeviceKind};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// GPUs of a node where nothing is said about them.
const GPUS_PER_NODE: u32 = 4;

/// What is to be submitted.
#[derive(Clone, Debug)]
pub struct Chain {
    /// Run directory, absolute.
    pub run: PathBuf,
    /// The program, absolute.
    pub program: PathBuf,
    /// Which part of the pipeline.
    pub stage: Stage,
    /// Jobs of curation, if it runs as an array.
    pub array: Option<u32>,
    /// Clients' directories, absolute.
    pub clients: Vec<String>,
    /// Directories beside the run's that the jobs read: see `directories`.
    pub needed: Vec<PathBuf>,
    /// Jobs that the pipeline does without, since their results are another run's.
    pub reused: Vec<JobKind>,
}

/// The jobs whose results a run takes from another one.
pub fn reused(config: &Config) -> Vec<JobKind> {
    let set = |dir: &Path| !dir.as_os_str().is_empty();
    let (tuples, translator) = (set(&config.reuse.tuples), set(&config.reuse.translator));
    let curate = (tuples || translator).then_some(JobKind::Curate);
    curate.into_iter().chain(translator.then_some(JobKind::Train)).collect()
}

/// What each kind of job asks for.
#[derive(Clone, Debug)]
pub struct Asked {
    kinds: BTreeMap<JobKind, Resolved>,
}

impl Asked {
    /// Joins defaults, profile and command line for every job of the chain.
    ///
    /// # Errors
    /// If options do not go together, or ask for GPUs that would stay idle.
    pub fn resolve(chain: &Chain, args: &ClusterArgs, site: &Profile, config: &Config) -> Result<Self> {
        let can_use = check::computes_on_gpus(site.container.is_some());
        let device = config.device.kind;
        let usual = if device != DeviceKind::Cpu && can_use { GPUS_PER_NODE } else { 0 };
        let mut kinds = BTreeMap::new();
        for (kind, script) in chain.jobs() {
            let places: Vec<(Origin, JobOptions)> = [(Origin::Default, defaults(kind, usual))]
                .into_iter()
                .chain(site.layers(kind))
                .chain(args.layers(kind))
                .collect();
            let found = Resolved::new(kind, script.has_ranks(), &places)?;
            if kind != JobKind::Report {
                check::check_gpus(kind, &found, device, can_use)?;
            }
            kinds.insert(kind, found);
        }
        Ok(Self { kinds })
    }

    /// What a kind of job asks for, if the chain has such jobs.
    pub fn of(&self, kind: JobKind) -> Option<&Resolved> {
        self.kinds.get(&kind)
    }

    /// The same, to be changed.
    pub(crate) fn of_mut(&mut self, kind: JobKind) -> Option<&mut Resolved> {
        self.kinds.get_mut(&kind)
    }
}

/// What a job asks for where nothing is said.
fn defaults(kind: JobKind, gpus_per_node: u32) -> JobOptions {
    let report = kind == JobKind::Report;
    JobOptions {
        nodes: Some(1),
        gpus_per_node: Some(if report { 0 } else { gpus_per_node }),
        cpus_per_task: Some(if report { 2 } else { 8 }),
        time: Some(if report { "01:00:00" } else { "12:00:00" }.into()),
        signal_seconds: Some(120),
        ..JobOptions::default()
    }
}

/// Directories that the settings name: of models and data, and of adapters to start from.
pub fn directories(config: &Config) -> Vec<PathBuf> {
    let files = config.data.public.as_slice().iter().map(|path| match path.is_dir() {
        true => path.clone(),
        false => path.parent().unwrap_or(Path::new("/")).to_owned(),
    });
    let dirs = [
        &config.models.tiny,
        &config.models.llm,
        &config.lora.init_adapter_tiny,
        &config.lora.init_adapter_llm,
        &config.translator.pretrained_path,
        &config.reuse.tuples,
        &config.reuse.translator,
    ];
    let dirs = dirs.into_iter().filter(|dir| !dir.as_os_str().is_empty()).cloned();
    files.chain(dirs).collect::<BTreeSet<PathBuf>>().into_iter().collect()
}

impl Chain {
    /// The jobs, in the order in which they follow each other.
    fn jobs(&self) -> Vec<(JobKind, Script)> {
        let curate = if self.array.is_some() { Script::CurateArray } else { Script::Curate };
        let curate = (JobKind::Curate, curate);
        let train = (JobKind::Train, Script::Train);
        let evaluate = (!self.clients.is_empty()).then_some((JobKind::Evaluate, Script::Evaluate));
        let scores = evaluate.into_iter().chain([(JobKind::Report, Script::Report)]);
        match self.stage {
            Stage::Curate => vec![curate],
            Stage::Train => vec![train],
            Stage::Emulate => vec![(JobKind::Emulate, Script::Emulate)],
            Stage::Evaluate => scores.collect(),
            Stage::Pipeline => {
                let made = [curate, train].into_iter().filter(|(kind, _)| !self.reused.contains(kind));
                made.chain(scores).collect()
            }
        }
    }

    /// The jobs with what they ask for, and what each waits for.
    ///
    /// # Errors
    /// If a container could not see a directory that they need.
    pub fn batches(&self, asked: &Asked, site: &Profile) -> Result<Vec<Batch>> {
        let jobs = self.jobs();
        let prelude = Prelude {
            setup: site.setup.clone(),
            environment: site.environment.clone(),
            container: site.container.clone(),
            needed: self.needed_in_container(site)?,
        };
        let place = |kind| jobs.iter().position(|job| job.0 == kind);
        let after = |kind: JobKind| -> Vec<Dependency> {
            let ok = |kind| place(kind).map(Dependency::ok);
            match kind {
                JobKind::Curate | JobKind::Emulate => vec![],
                JobKind::Train => ok(JobKind::Curate).into_iter().collect(),
                JobKind::Evaluate => ok(JobKind::Train).into_iter().collect(),
                // One client that fails does not cost the page about the others.
                JobKind::Report => {
                    let clients = place(JobKind::Evaluate).map(Dependency::any);
                    ok(JobKind::Train).into_iter().chain(clients).collect()
                }
            }
        };
        let batch = |&(kind, script): &(JobKind, Script)| Batch {
            run: self.run.clone(),
            program: self.program.clone(),
            kind,
            script,
            array: match kind {
                JobKind::Curate => self.array.map(|jobs| jobs as usize),
                JobKind::Evaluate => Some(self.clients.len()),
                JobKind::Train | JobKind::Report | JobKind::Emulate => None,
            },
            arguments: if kind == JobKind::Evaluate { self.clients.clone() } else { vec![] },
            options: asked.of(kind).cloned().unwrap_or_default(),
            prelude: prelude.clone(),
            after: after(kind),
        };
        Ok(jobs.iter().map(batch).collect())
    }

    /// Directories that a container must mount, if there is one.
    fn needed_in_container(&self, site: &Profile) -> Result<Vec<PathBuf>> {
        if site.container.is_none() {
            return Ok(vec![]);
        }
        let clients = self.clients.iter().map(PathBuf::from);
        let needed: Vec<PathBuf> =
            [self.run.clone()].into_iter().chain(self.needed.iter().cloned()).chain(clients).collect();
        for dir in &needed {
            words::check_mount("the container needs", dir)?;
        }
        Ok(needed)
    }
}
