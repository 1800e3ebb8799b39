//! `train`: from tuples to a translator.
//!
//! In: the tuple store of `RUN/shadow`. Out, in `RUN/translator`: the Grad-Transformer
//! that had the smallest validation error, its normalisation, `metrics.jsonl` (every
//! step's loss, written as it goes), `throughput.jsonl` (tuples per second), and
//! `validation.json` (what was held out, and what it measured).
//!
//! Ranks share every step: each reads and computes a part of its tuples, and updates a part
//! of the parameters. [`tuples`] tells which tuples a step has, [`prepare`] makes their values,
//! [`feed`] has that done ahead, [`steps`] goes through the steps, [`parallel`] adds up over
//! ranks, [`mod@validate`] measures generated updates, and [`resume`] keeps checkpoints. Only
//! rank 0 writes files, except for checkpoints, of which every rank writes its part.
//!
//! Validation splits by shadow subset unless told otherwise: the tuples of one subset are
//! near duplicates. Its error is relative: 1 is what the mean of the teachers reaches.

pub mod feed;
pub mod parallel;
pub mod prepare;
pub mod resume;
pub mod steps;
pub mod tuples;
pub mod validate;

use crate::aggregate::Norms;
use crate::args::RunArgs;
use crate::artifacts::{Tuples, open_tuples, spaces_at_hand};
use crate::cluster::World;
use crate::config::{Config, TranslatorConfig};
use crate::dispatch::{Work, dispatch, memory_for};
use crate::failure::unusable;
use crate::interrupt::Patience;
use crate::record::{self, SharedState};
use crate::stages::{Context, TRANSLATOR_DIR, totals};
use anyhow::Result;
use gradtx_kernels::rng::derive_named;
use gradtx_kernels::{Backend, Collective, Real};
use gradtx_models::grad_transformer::{
    Generator, GradTransformer, GradTransformerConfig, Normalization, NormalizationMode, StartToken, Trainer,
};
use gradtx_models::t5::T5Config;
use gradtx_runtime::artifact::{Role, TupleStore, UpdateSpace, fingerprint, write_json};
use gradtx_runtime::comm::Comm;
use gradtx_runtime::parallel::BUCKET_BYTES;
use parallel::Ranks;
use prepare::Threads;
use resume::{Best, Checkpoints};
use serde_json::json;
use std::path::{Path, PathBuf};
use steps::Run;
use tuples::{Split, mean_teacher};
use validate::Validation;

/// Trains the translator, unless that is done.
pub fn run(context: &Context, world: &World, args: &RunArgs) -> Result<()> {
    run_in_buckets(context, world, args, BUCKET_BYTES / size_of::<f32>())
}

/// [`run`], with gradients summed in buckets of at least so many elements.
pub fn run_in_buckets(context: &Context, world: &World, args: &RunArgs, bucket: usize) -> Result<()> {
    let dir = args.run.join(TRANSLATOR_DIR);
    let config = Config::of_ranks(args, world)?.on_device_of_ranks(context, world, &dir)?;
    let comm = world.comm();
    let (ranks, batch) = (comm.size(), config.train.batch);
    if ranks > batch {
        return Err(unusable(format!(
            "train.batch is {batch}: so many ranks at most can share a step, but {ranks} were started"
        )));
    }
    // Rank 0 compares and verifies for all.
    let mut expected = [None, None];
    if comm.rank() == 0 {
        expected =
            spaces_at_hand(&config, context.threads, |text| context.ui.line(format!("train: {text}")))?;
    }
    let tuples = open_tuples(&args.run, expected.each_ref().map(Option::as_ref))?;
    let store = &tuples.store;
    let settings = settings(context, &config, &tuples)?;
    let SharedState::Open(seat) = record::open_for_all(world, &dir, "train", settings)? else {
        if comm.rank() == 0 {
            // Killed between the last two things that it did.
            Checkpoints::of(&dir).remove()?;
        }
        context.ui.done("train", &dir, json!({}), format!("train: {} is finished", dir.display()));
        return Ok(());
    };
    if comm.rank() == 0 {
        tuples.verify()?;
    }
    let split = Split::of(store, &config.train, derive_named(config.seed, "validation subsets"))?;
    let work = Train { context, comm, config: &config, store, split: &split, dir: &dir, bucket };
    let found = dispatch(&config.device, context, work)?;
    let mut files = vec![];
    if let Some((best, validation)) = &found {
        let report = json!({
            "best_step": best.step,
            "best": validation,
            "held_out": split.describe(store),
            // What the norms of clients' updates are compared with.
            "students": Norms::of(store)?,
        });
        write_json(&dir.join("validation.json"), &report)?;
        files.extend(["config.json", "model.safetensors", "metrics.jsonl", "validation.json"]);
        if dir.join("normalization.safetensors").is_file() {
            files.push("normalization.safetensors");
        }
    }
    seat.finish(&files.into_iter().map(String::from).collect::<Vec<_>>())?;
    if let Some((best, _)) = found {
        Checkpoints::of(&dir).remove()?;
        let text = format!(
            "train: best relative error of generated updates {:.4}, at step {}, {}",
            best.relative_error,
            best.step,
            dir.display()
        );
        let numbers = json!({ "relative_error": best.relative_error, "best_step": best.step });
        context.ui.done("train", &dir, numbers, text);
    }
    Ok(())
}

/// What the result depends on.
fn settings(context: &Context, config: &Config, tuples: &Tuples) -> Result<serde_json::Value> {
    let pretrained = &config.translator.pretrained;
    let pretrained = match pretrained.as_os_str().is_empty() {
        true => None,
        false => Some(fingerprint(pretrained, context.threads)?),
    };
    Ok(json!({
        "seed": config.seed,
        "tuples": tuples.manifest,
        "spaces": { "student": tuples.store.space(Role::Student), "teacher": tuples.store.space(Role::Teacher) },
        // Not where the weights lie that it starts from, but which they are.
        "translator": TranslatorConfig { pretrained: PathBuf::new(), ..config.translator.clone() },
        "pretrained": pretrained,
        "train": config.train,
        "device": config.device,
    }))
}

/// Sizes of the translator between two sides, each `[blocks, width]`.
pub fn model_config(
    settings: &TranslatorConfig,
    student: [usize; 2],
    teacher: [usize; 2],
) -> Result<GradTransformerConfig> {
    let t5 = if settings.pretrained.as_os_str().is_empty() {
        T5Config {
            d_model: settings.d_model,
            d_kv: settings.d_kv,
            d_ff: settings.d_ff,
            num_layers: settings.encoder_layers,
            num_decoder_layers: settings.decoder_layers,
            num_heads: settings.heads,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            dropout_rate: settings.dropout,
        }
    } else {
        let published = T5Config::open(&settings.pretrained.join("config.json"))?;
        T5Config { dropout_rate: settings.dropout, ..published }
    };
    Ok(GradTransformerConfig {
        student_blocks: student[0],
        student_width: student[1],
        teacher_blocks: teacher[0],
        teacher_width: teacher[1],
        start_token: StartToken::parse(&settings.start).expect("the configuration was checked"),
        t5,
    })
}

/// A training that is to be done, on this rank.
struct Train<'a> {
    context: &'a Context,
    comm: &'a dyn Comm,
    config: &'a Config,
    store: &'a TupleStore,
    split: &'a Split,
    dir: &'a Path,
    /// Elements of a bucket of gradients at least.
    bucket: usize,
}

impl Work for Train<'_> {
    /// On rank 0 the best step, and its validation.
    type Output = Option<(Best, Validation)>;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Self::Output> {
        let (settings, train) = (&self.config.translator, &self.config.train);
        let [student, teacher] = Role::BOTH.map(|role| self.store.space(role));
        let sizes = |space: &UpdateSpace| [space.blocks, space.width];
        let shape = model_config(settings, sizes(student), sizes(teacher))?;
        let key = derive_named(self.config.seed, "translator");
        let mut model = match settings.pretrained.as_os_str().is_empty() {
            true => GradTransformer::<D, X>::random(device, shape, derive_named(key, "weights"))?,
            false => {
                GradTransformer::from_t5(device, shape, &settings.pretrained, derive_named(key, "weights"))?
            }
        };
        let mut ranks = Ranks::new(self.comm, device, model.layout(), self.bucket)?;
        let threads = Threads::new(self.context.threads)?;
        model.set_normalization(self.units(&ranks, &threads, sizes(student), sizes(teacher))?)?;
        let micro_batch = train.micro_batch.min(ranks.part(train.batch).len());
        let at_once = ranks.part(self.split.validation.len()).len().clamp(1, validate::AT_ONCE);
        let own = ranks.owned();
        let mut plan =
            Trainer::plan_of_ranges(&model, micro_batch, own.iter().map(|range| range.len()).sum())?;
        plan.extend(Generator::plan(&model, at_once)?);
        plan.extend(ranks.plan(X::DTYPE.size()));
        plan.check(memory_for(device, self.comm.place())?)?;
        self.context.ui.line(totals("train", &plan));
        let mut trainer = Trainer::of_ranges(&mut model, micro_batch, own)?;
        self.context.ui.line(format!(
            "train: {} parameters, {} tuples, {} held out",
            model.layout().count(),
            self.split.training.len(),
            self.split.validation.len(),
        ));
        let _patience = Patience::begin();
        let mut checkpoints = Checkpoints::of(self.dir);
        let progress = checkpoints.restore(&mut ranks, &mut model, &mut trainer)?;
        if let Some(progress) = &progress {
            self.context.ui.line(format!("train: going on after step {}", progress.steps));
        }
        let run = Run {
            train: &self,
            key,
            checkpoints,
            mean: self.mean(&ranks, &threads)?,
            generator: Generator::new(&model, at_once)?,
            model,
            trainer,
            ranks,
            progress: progress.unwrap_or_default(),
        };
        run.finish()
    }
}

impl Train<'_> {
    /// Statistics of the training tuples: rank 0 reads them all, for all.
    fn units<D: Collective>(
        &self,
        ranks: &Ranks<'_, D>,
        threads: &Threads,
        student: [usize; 2],
        teacher: [usize; 2],
    ) -> Result<Normalization> {
        let name = &self.config.translator.normalization;
        let mode = NormalizationMode::parse(name).expect("the configuration was checked");
        let mut values = vec![];
        if ranks.is_first() {
            values = tuples::fit(self.store, &self.split.training, mode, threads)?.values();
        }
        Ok(Normalization::from_values(mode, student, teacher, &ranks.values_of_first(values)?)?)
    }

    /// The mean of the training teachers.
    fn mean<D: Collective>(&self, ranks: &Ranks<'_, D>, threads: &Threads) -> Result<Vec<f32>> {
        let mut mean = vec![];
        if ranks.is_first() {
            mean = mean_teacher(self.store, &self.split.training, threads)?;
        }
        ranks.values_of_first(mean)
    }
}
