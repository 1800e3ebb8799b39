//! `demo`: the whole job on a miniature world, by the same functions and files as the
//! single stages, ending with a table of scores and a report.
//!
//! In: a directory, a world and a seed. Out: `DIR/world`, `DIR/run` with `report.html`, and
//! the table, also as `DIR/run/table.json`; [`gradtx_report::table`] says what it means.

use crate::{TEST_FILE, World, offsite, stage};
use anyhow::Result;
use gradtx_pipeline::aggregate::{Aggregation, Allow};
use gradtx_pipeline::cross_validation;
use gradtx_pipeline::stages::{curate, evaluate, finetune, refine, train, translate};
use gradtx_pipeline::variant::Variant;
use gradtx_report::cross_validation::{SUMMARY_FILE, Summary, run as report_of};
use gradtx_report::stage as report;
use gradtx_report::table::{Entry, Table, collect};
use gradtx_run::cluster;
use gradtx_run::config::{Config, DeviceConfig, DeviceKind, DtypeKind, Preset, RunArgs};
use gradtx_run::context::Context;
use gradtx_run::device::take;
use gradtx_run::paths::{ADAPTER_DIR, RUN_FILE_OF_WORLD, UPDATE_FILE};
use gradtx_run::role::Role;
use gradtx_runtime::artifact::write_json;
use gradtx_train::baselines::Method;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The run in the demo's directory.
pub const RUN_DIR: &str = "run";

/// Models of the table.
fn entries() -> impl Iterator<Item = Entry> {
    [Entry::Base(Role::Tiny), Entry::Base(Role::Llm), Entry::Finetuned(Role::Tiny)]
        .into_iter()
        .chain(Method::standard().map(Entry::translated))
        .chain([Entry::Refined(Method::Products), Entry::RANDOM_STUDENT, Entry::Finetuned(Role::Llm)])
}

/// What world, and where.
pub struct Job {
    /// Directory for the world and the run.
    pub dir: PathBuf,
    /// Which tasks there are.
    pub world: World,
    /// Seed of the world and of the run.
    pub seed: u64,
    /// Settings to take from elsewhere.
    pub preset: Option<Preset>,
    /// Where to compute; the world's base models are always made in f32.
    pub device: DeviceKind,
    /// In what.
    pub dtype: DtypeKind,
    /// So many seeds, one after the other, each in a directory of its own.
    pub seeds: u64,
    /// Where tasks are held out: fewer shadows, one fold, and no Grad-Transformer. In world offsite: two emulators,
    /// and no attack.
    pub quick: bool,
}

/// Runs everything that is missing, and prints the table.
pub fn run(context: &Context, job: &Job) -> Result<()> {
    let Job { dir, world, seed, device, dtype, .. } = job;
    // Before the world is made: the run would refuse it only then.
    let place = DeviceConfig { kind: *device, dtype: *dtype, ..DeviceConfig::default() };
    Config { device: place.clone(), ..Config::default() }.check()?;
    let taken = take(&place, &context.place)?;
    taken.say(context);
    if world.holds_tasks_out() {
        return held_out(context, job, taken.settings.kind);
    }
    let dirs = seed_dirs(dir, *seed, job.seeds);
    if *world == World::Offsite {
        return offsite::run(context, job, &dirs);
    }
    dirs.iter().try_for_each(|(seed, dir)| one(context, job, *seed, dir, taken.settings.kind))
}

/// The directory of every seed: the job's own where there is one.
fn seed_dirs(dir: &Path, first: u64, count: u64) -> Vec<(u64, PathBuf)> {
    let own = |seed: u64| if count == 1 { dir.to_owned() } else { dir.join(format!("seed-{seed}")) };
    (first..first + count).map(|seed| (seed, own(seed))).collect()
}

/// The world and the tuples of one seed.
fn prepare(
    context: &Context,
    job: &Job,
    seed: u64,
    dir: &Path,
    kind: DeviceKind,
    set: Vec<String>,
    timed: &mut dyn FnMut(&'static str, Instant),
) -> Result<RunArgs> {
    let world_dir = dir.join("world");
    let at = Instant::now();
    stage::run(context, &world_dir, job.world, seed, kind)?;
    timed("world", at);
    let args = RunArgs {
        run: dir.join("run"),
        config: Some(world_dir.join(RUN_FILE_OF_WORLD)),
        preset: job.preset,
        device: Some(job.device),
        dtype: Some(job.dtype),
        tuples: None,
        translator: None,
        set,
    };
    let at = Instant::now();
    curate::run(context, &cluster::World::alone(), &curate::Job::of(args.clone()))?;
    timed("curate", at);
    Ok(args)
}

/// Every task held out in turn, for every seed; prints what all seeds give together.
fn held_out(context: &Context, job: &Job, kind: DeviceKind) -> Result<()> {
    let started = Instant::now();
    let mut homes = vec![];
    let translators = Method::standard().filter(|method| !job.quick || *method != Method::GradTransformer);
    let validation = cross_validation::Job {
        folds: 4,
        first: job.quick.then_some(1),
        methods: translators.collect(),
        refined: vec![Method::Products],
        examples: job.world.public_tests(),
        variants: vec![Variant::AsCurated],
        ..Default::default()
    };
    for (seed, dir) in seed_dirs(&job.dir, job.seed, job.seeds) {
        let subsets = job.world.quick_subsets();
        let set = if job.quick { vec![format!("curate.num_subsets={subsets}")] } else { vec![] };
        let args = prepare(context, job, seed, &dir, kind, set, &mut |_, _| ())?;
        let data = Some(dir.join("world").join(TEST_FILE));
        homes.push(report_of(context, &args, &cross_validation::Job { data, ..validation.clone() })?);
    }
    if homes.len() > 1 {
        let summary = Summary::of(&homes.iter().map(PathBuf::as_path).collect::<Vec<_>>())?;
        write_json(&job.dir.join(SUMMARY_FILE), &summary)?;
        context.ui.result(summary.text());
    }
    context.ui.result(format!("Time: {:.1} s in all.", started.elapsed().as_secs_f64()));
    Ok(())
}

/// All clients of the world, for one seed.
fn one(context: &Context, job: &Job, seed: u64, dir: &Path, kind: DeviceKind) -> Result<()> {
    let Job { world, .. } = job;
    let started = Instant::now();
    let (world_dir, run_dir) = (dir.join("world"), dir.join(RUN_DIR));
    let mut times: Vec<(&str, f64)> = vec![];
    let mut timed = |name, from: Instant| times.push((name, from.elapsed().as_secs_f64()));
    let args = prepare(context, job, seed, dir, kind, vec![], &mut timed)?;
    let alone = &cluster::World::alone();
    let at = Instant::now();
    train::run(context, alone, &args)?;
    timed("train", at);
    let clients = (1..=world.clients()).map(|client| Client::new(context, &args, &world_dir, client));
    let clients: Vec<Client<'_>> = clients.collect();
    let at = Instant::now();
    for client in &clients {
        client.finetune()?;
    }
    timed("finetune", at);
    let at = Instant::now();
    for client in &clients {
        client.translate()?;
    }
    timed("translate", at);
    let at = Instant::now();
    for client in &clients {
        client.refine()?;
    }
    timed("refine", at);
    let at = Instant::now();
    for (entry, client) in entries().flat_map(|entry| clients.iter().map(move |client| (entry, client))) {
        client.evaluate(entry)?;
    }
    timed("evaluate", at);

    // The page has times on it; the table alone is the same in every run.
    let (tables, _) = Table::of(&collect(&[&run_dir]).0);
    write_json(&run_dir.join("table.json"), &tables)?;
    report::run(context, &report::Job::of(run_dir))?;
    let times: Vec<String> = times.iter().map(|(name, seconds)| format!("{name} {seconds:.1} s")).collect();
    let total = started.elapsed().as_secs_f64();
    context.ui.result(format!("Time: {}; {total:.1} s in all.", times.join(", ")));
    Ok(())
}

struct Client<'a> {
    context: &'a Context,
    args: &'a RunArgs,
    data: PathBuf,
    out: PathBuf,
}

impl<'a> Client<'a> {
    fn new(context: &'a Context, args: &'a RunArgs, world_dir: &Path, client: usize) -> Self {
        let name = format!("client-{client}");
        let data = world_dir.join("private").join(&name);
        Self { context, args, data, out: args.run.join("clients").join(&name) }
    }

    fn finetuned(&self, role: Role) -> PathBuf {
        self.out.join("finetuned").join(role.name())
    }

    fn translated(&self, entry: Entry) -> PathBuf {
        self.out.join("translated").join(entry.slug())
    }

    fn finetune(&self) -> Result<()> {
        for role in [Role::Tiny, Role::Llm] {
            let job = finetune::Job {
                data: self.data.join("train.jsonl"),
                out: self.finetuned(role),
                role,
                peft: true,
                allow_refinement: role == Role::Tiny,
            };
            finetune::run(self.context, self.args, &job)?;
        }
        Ok(())
    }

    fn translate(&self) -> Result<()> {
        for entry in entries() {
            let Entry::Translated { method, random_student } = entry else { continue };
            let job = translate::Job {
                updates: vec![self.finetuned(Role::Tiny).join(UPDATE_FILE)],
                out: self.translated(entry),
                method,
                aggregation: Aggregation::default(),
                random_student,
                allow: Allow::default(),
                fold: None,
            };
            translate::run(self.context, self.args, &job)?;
        }
        Ok(())
    }

    fn refine(&self) -> Result<()> {
        for entry in entries() {
            let Entry::Refined(method) = entry else { continue };
            let job = refine::Job {
                updates: vec![self.finetuned(Role::Tiny).join(UPDATE_FILE)],
                translated: self.translated(Entry::translated(method)),
                out: self.translated(entry),
                fold: None,
            };
            refine::run(self.context, self.args, &job)?;
        }
        Ok(())
    }

    fn evaluate(&self, entry: Entry) -> Result<()> {
        let adapter = match entry {
            Entry::Finetuned(role) => Some(self.finetuned(role)),
            Entry::Translated { .. } | Entry::Refined(_) => Some(self.translated(entry)),
            _ => None,
        };
        let job = evaluate::Job {
            data: vec![self.data.join("test.jsonl")],
            out: self.out.join("evaluated").join(entry.slug()),
            role: entry.role(),
            base: None,
            adapter: adapter.map(|dir| dir.join(ADAPTER_DIR)),
            part: None,
        };
        evaluate::run(self.context, self.args, &job).map(drop)
    }
}
