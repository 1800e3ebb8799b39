//! `curate`: from public data to tuples.
//!
//! In: the public data and both base models. Out, in `RUN/shadow`: a tuple store (see
//! [`gradtx_runtime::artifact::TupleStore`]), `subsets.json` (which rows each shadow
//! subset has), `groups.json` (which subsets are of one group), `metrics/ROLE-NNNNN.jsonl` (the
//! losses of a group of jobs), and `throughput-*.jsonl` (tokens per second of every group, and
//! what ranks did with their time).
//!
//! Jobs run in groups that the configuration fixes: a group shares one packed stream per
//! step. A group whose files are all there and intact is not run again; otherwise all of
//! it is, so that its bytes are the same whatever was left to do, and on however many ranks.
//!
//! | module | what |
//! |---|---|
//! | [`subsets`] | which rows every shadow subset has |
//! | [`collection`] | what is to be collected, and what of it is there |
//! | `concurrency` | how many jobs share a stream |
//! | [`runner`] | what one process does: group after group |
//! | [`job_source`] | where it gets groups from: among ranks [`coordinator`] and [`worker`], without MPI `array` and [`file_locks`] |
//! | [`shard_writer`] | writes what is finished, meanwhile |

mod array;
pub mod collection;
mod concurrency;
pub mod coordinator;
pub mod file_locks;
pub mod job_source;
pub mod messages;
pub mod runner;
pub mod shard_writer;
pub mod subsets;
pub mod worker;

use crate::artifacts::open_pair;
use crate::records::CurateInputs;
use anyhow::{Context as _, Result};
use collection::{CHECKPOINTS, Collection};
use concurrency::decided;
use coordinator::Coordinator;
use file_locks::CLAIMS;
use gradtx_kernels::cpu::Cpu;
use gradtx_models::decoder::Decoder;
use gradtx_run::cluster::World;
use gradtx_run::config::{RunArgs, RunSettings, is_reused};
use gradtx_run::context::Context;
use gradtx_run::dispatch::dispatch;
use gradtx_run::failure::{failed, stopped};
use gradtx_run::interrupt::ShutdownGuard;
use gradtx_run::paths::{GROUPS_FILE, SHADOW_DIR, SUBSETS_FILE};
use gradtx_run::progress;
use gradtx_run::record::make_dir;
use gradtx_run::role::Role;
use gradtx_run::stage::{self, Inputs, Stage};
use gradtx_run::text::quoted;
use gradtx_runtime::artifact::{
    MANIFEST, StoreType, TupleManifest, TuplePlan, assemble, checksum, init_path, shard_path,
    sweep_temporary, write_init, write_json,
};
use gradtx_runtime::data::Dataset;
use gradtx_runtime::metrics::JsonLines;
use gradtx_train::examples::Data;
use gradtx_train::lora::schedule::JobGroup;
use gradtx_train::model_spec::ModelSpec;
use job_source::JobSource;
use runner::GroupRunner;
use serde_json::json;
use shard_writer::{ShardWriter, gather_left, scratch_dir};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use worker::Worker;

/// Directories within a tuple store.
const PARTS: [&str; 3] = ["init", "metrics", "shards"];

/// What is to be collected, and by whom.
#[derive(Debug, Clone, clap::Args)]
pub struct Job {
    /// The run and its configuration.
    #[command(flatten)]
    pub run: RunArgs,
    /// Be one of several processes without MPI, such as the tasks of a SLURM job array, that
    /// share the run directory: do what none of the others does.
    #[arg(long)]
    pub array: bool,
    /// Write shards to this directory of the node's own disk first, then copy them.
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
}

impl Job {
    /// All of a run, in the ordinary way.
    pub fn of(run: RunArgs) -> Self {
        Self { run, array: false, scratch: None }
    }
}

/// Collects what is missing of the tuples.
pub fn run(context: &Context, world: &World, job: &Job) -> Result<()> {
    let _patience = ShutdownGuard::begin();
    let stage = Curation::open(context, world, job)?;
    match job.array {
        true => stage.run_in_array(context),
        false => stage::run_on_ranks(context, world.comm(), &stage).map(drop),
    }
}

/// A curation that is ready to begin, or to continue, in one of the processes that share it.
pub struct Curation<'a> {
    world: &'a World,
    job: &'a Job,
    settings: RunSettings,
    collection: Arc<Collection>,
    inputs: CurateInputs,
    assumed: Vec<String>,
}

impl<'a> Curation<'a> {
    /// Opens what a run needs.
    pub fn open(context: &Context, world: &'a World, job: &'a Job) -> Result<Self> {
        let dir = job.run.run.join(SHADOW_DIR);
        let settings = RunSettings::open_on_ranks(&job.run, world)?;
        let other = &settings.config().reuse.tuples;
        if !other.as_os_str().is_empty() {
            return Err(is_reused(&job.run.run, other, "tuples", Self::NAME));
        }
        let config = settings.config().clone().on_device_of_ranks(context, world, &dir)?;
        let [tiny, llm] = open_pair(&config, context.threads)?;
        let public = Data::read(config.data.public.as_slice(), &config.data, "data.public")?;
        let prompts = [public.prompts(&config, &tiny)?, public.prompts(&config, &llm)?];
        let assumed = public.assumed(&[(Role::Tiny, &prompts[0]), (Role::Llm, &prompts[1])]);
        let curate = decided(&config, &dir, world, job.array, &[&tiny, &llm])?;
        let inputs = CurateInputs {
            seed: config.seed,
            data: public.inputs(&config.data, &prompts.each_ref()),
            max_length: config.data.max_length,
            adapter: ModelSpec::adapter_inputs(&config.lora, &[&tiny, &llm]),
            curate: curate.clone(),
            device: config.device.clone(),
            tiny: tiny.space.base_model.clone(),
            llm: llm.space.base_model.clone(),
            reading: config.data.reading_inputs(),
        };
        let plan = TuplePlan {
            shadows: curate.num_subsets,
            steps: curate.num_snapshots,
            dtype: StoreType::F32,
            student: tiny.space.clone(),
            teacher: llm.space.clone(),
        };
        let collection = Arc::new(Collection {
            subsets: subsets::choose_subsets(&config, &public)?,
            subset_groups: subsets::groups_of_subsets(&config, &public)?,
            identity: checksum(inputs.value()?.to_string().as_bytes()),
            config,
            curate,
            dir,
            plan,
            sides: [tiny, llm],
            public,
        });
        Ok(Self { world, job, settings, collection, inputs, assumed })
    }
}

impl Stage for Curation<'_> {
    type Inputs = CurateInputs;
    /// In the process that ends the work for all.
    type Output = Option<TupleManifest>;
    const HAS_RANKS: bool = true;
    const RESUMES: bool = true;

    fn dir(&self) -> &Path {
        &self.collection.dir
    }

    fn settings(&self) -> Option<&RunSettings> {
        Some(&self.settings)
    }

    fn advice(&self) -> String {
        let dir = quoted(&self.dir().to_string_lossy());
        format!("to keep it, begin another run with the other settings; or remove {dir} to curate again")
    }

    fn inputs(&self) -> Result<CurateInputs> {
        Ok(self.inputs.clone())
    }

    fn assumed(&self) -> Vec<String> {
        self.assumed.clone()
    }

    /// By the ranks of a world, or one process alone.
    fn make(&self, context: &Context) -> Result<(Vec<String>, Self::Output)> {
        let (comm, collection) = (self.world.comm(), &self.collection);
        if comm.rank() == 0 {
            prepare(collection)?;
            for role in [Role::Tiny, Role::Llm] {
                let steps = collection.recipe(role).epochs_as_steps(collection.curate.examples_per_subset);
                steps.into_iter().for_each(|s| context.ui.line(format!("curate {}: {s}", role.name())));
            }
        }
        comm.barrier()?;
        let scratch = match &self.job.scratch {
            Some(scratch) => {
                let own = scratch_dir(scratch, collection, &comm.place().local_rank.to_string());
                gather_left(collection, &own)?;
                make_dir(&own)?;
                Some(own)
            }
            None => None,
        };
        // What was gathered is there for everybody who looks from here on.
        comm.barrier()?;
        if let Some(code) = self.work_among_ranks(context, scratch.as_deref())? {
            return Err(stopped(code));
        }
        if comm.rank() != 0 {
            return Ok((vec![], None));
        }
        let manifest = whole(context, collection, &self.inputs)?;
        Ok((result_files(collection), Some(manifest)))
    }

    fn report(&self, context: &Context, manifest: &Self::Output) -> Result<()> {
        let dir = self.dir();
        let (numbers, text) = match manifest {
            Some(manifest) => {
                let (pairs, steps) = (manifest.shards.len(), manifest.plan.steps);
                let text = format!("curate: {pairs} shadow pairs of {steps} tuples, {}", dir.display());
                (json!({ "pairs": pairs, "tuples": pairs * steps }), text)
            }
            None => {
                let text = "curate: this process has nothing left to do; others are still working";
                (json!({}), text.into())
            }
        };
        context.ui.done("curate", dir, numbers, text);
        Ok(())
    }
}

fn parameters(side: &ModelSpec) -> u64 {
    Decoder::<Cpu, f32>::layout_of(&side.model).total() as u64
}

impl Curation<'_> {
    /// This rank's part of the groups; the exit code, if it was asked to stop before the end.
    fn work_among_ranks(&self, context: &Context, scratch: Option<&Path>) -> Result<Option<u8>> {
        let Self { world, collection, .. } = self;
        let comm = world.comm();
        let missing = collection.missing(comm)?;
        let (examples, work) = work_of(context, collection, &missing)?;
        let shard_writer = ShardWriter::start(collection.clone(), scratch.map(Path::to_owned))?;
        let source: Box<dyn JobSource + '_> = if comm.rank() == 0 {
            Box::new(Coordinator::new(comm, collection, shard_writer, &work, &context.ui)?)
        } else {
            Box::new(Worker::new(comm, shard_writer)?)
        };
        let runner = GroupRunner { context, collection, examples: &examples, source };
        let asked = dispatch(&collection.config.device, context, runner)?;
        forget(scratch);
        Ok(asked)
    }
}

/// Brings the directory into the state that work begins from. By one process that is alone there.
fn prepare(collection: &Collection) -> Result<()> {
    progress::forget_shared(&collection.dir);
    write_start(collection)?;
    for part in PARTS.iter().chain(&[CHECKPOINTS]) {
        sweep_temporary(&collection.dir.join(part))?;
    }
    Ok(())
}

/// Writes what every process would write alike.
fn write_start(collection: &Collection) -> Result<()> {
    let dir = &collection.dir;
    for part in PARTS.iter().chain(&[CHECKPOINTS]) {
        make_dir(&dir.join(part))?;
    }
    write_json(&dir.join(SUBSETS_FILE), &collection.subsets)?;
    write_json(&dir.join(GROUPS_FILE), &collection.subset_groups)?;
    for side in &collection.sides {
        write_init(dir, side.role.side(), &side.space, &side.init)?;
    }
    Ok(())
}

/// The examples of the models that have work, and the work with what it costs: its tokens
/// times the parameters that each goes through.
fn work_of(
    context: &Context,
    collection: &Collection,
    missing: &[(Role, usize)],
) -> Result<([Option<Dataset>; 2], Vec<JobGroup>)> {
    collection.public.announce_left_out(context);
    let mut examples = [None, None];
    for side in &collection.sides {
        if missing.iter().any(|(role, _)| *role == side.role) {
            let prompts = collection.public.prompts(&collection.config, side)?;
            let found = collection.public.examples(&prompts, side, context, "curate")?;
            examples[side.role as usize] = Some(found);
        }
    }
    let groups = collection.groups();
    let mut work = vec![];
    for &(side, group) in missing {
        let examples = examples[side as usize].as_ref().expect("just read");
        let tokens = collection.training(side).tokens(&collection.jobs(examples, &groups[group]))?;
        let cost = tokens as f64 * parameters(collection.side(side)) as f64;
        work.push(JobGroup { side, group, cost });
    }
    Ok((examples, work))
}

/// A scratch directory is empty at the end; it stays only if something could not be gathered.
fn forget(scratch: Option<&Path>) {
    let Some(scratch) = scratch else { return };
    for dir in ["shards", "metrics", ""] {
        let _ = std::fs::remove_dir(scratch.join(dir));
    }
}

/// Writes the manifest from what is really there; an error unless that is everything.
fn whole(context: &Context, collection: &Collection, inputs: &CurateInputs) -> Result<TupleManifest> {
    let found = assemble(&collection.dir, &collection.plan, inputs.value()?)?;
    let damaged = found.damaged.first().map(|(shadow, role, why)| format!("shadow {shadow}, {role}: {why}"));
    let missing =
        || found.missing.first().map(|(shadow, role)| format!("shadow {shadow}, {role}: there is no shard"));
    if let Some(problem) = damaged.or_else(missing) {
        return Err(failed(problem, "run `gradtx curate` again: it does what is missing"));
    }
    for name in [CHECKPOINTS, CLAIMS] {
        match std::fs::remove_dir_all(collection.dir.join(name)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(e)
                    .with_context(|| format!("{}: cannot remove", collection.dir.join(name).display()));
            }
            _ => {}
        }
    }
    for side in &collection.sides {
        let (jobs, mean) = last_losses(collection, side.role)?;
        let name = side.role.name();
        context.ui.line(format!("curate {name}: {jobs} jobs, mean loss of the last step {mean:.4}"));
    }
    Ok(found.manifest)
}

/// The jobs of a model, and the mean of their last losses.
fn last_losses(collection: &Collection, role: Role) -> Result<(usize, f64)> {
    let mut last = vec![];
    for group in collection.groups() {
        let lines = JsonLines::read(&Collection::metrics_file(&collection.dir, role, &group))?;
        let steps = collection.recipe(role).max_steps;
        last.extend(lines.iter().filter(|l| l["step"] == steps).filter_map(|l| l["loss"].as_f64()));
    }
    Ok((last.len(), last.iter().sum::<f64>() / last.len().max(1) as f64))
}

/// Every file of a finished store, relative to it: what was written by name, whatever else lies
/// there.
fn result_files(collection: &Collection) -> Vec<String> {
    let none = Path::new("");
    let mut files = vec![PathBuf::from(MANIFEST), SUBSETS_FILE.into(), GROUPS_FILE.into()];
    for side in [Role::Tiny, Role::Llm] {
        files.push(init_path(none, side.side()));
        files.extend((0..collection.plan.shadows).map(|shadow| shard_path(none, side.side(), shadow)));
        files.extend(collection.groups().iter().map(|group| Collection::metrics_file(none, side, group)));
    }
    files.sort();
    files.iter().map(|path| path.to_string_lossy().into_owned()).collect()
}
