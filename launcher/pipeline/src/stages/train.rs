//! `train`: from tuples to a translator.
//!
//! In: the tuple store of `RUN/shadow`. Out, in `RUN/translator`: what [`Train`] makes of it,
//! and `validation.json` (what was held out, and what it measured).

use crate::aggregate::Norms;
use crate::artifacts::{Tuples, open_tuples, spaces_at_hand, warn_of_changes};
use crate::fold::Fold;
use crate::records::{Spaces, TrainInputs};
use anyhow::Result;
use gradtx_kernels::rng::derive_named;
use gradtx_run::cluster::World;
use gradtx_run::config::{Config, RunArgs, RunSettings, TranslatorConfig, is_reused};
use gradtx_run::context::Context;
use gradtx_run::dispatch::dispatch;
use gradtx_run::failure::{failed, unusable};
use gradtx_run::paths::TRANSLATOR_DIR;
use gradtx_run::stage::{self, Stage};
use gradtx_run::text::quoted;
use gradtx_runtime::artifact::{Role, fingerprint, write_json};
use gradtx_runtime::comm::Comm;
use gradtx_runtime::parallel::BUCKET_BYTES;
use gradtx_train::products::Groups;
use gradtx_train::translator::Train;
use gradtx_train::translator::resume::{Best, Checkpoints};
use gradtx_train::translator::tuples::Split;
use gradtx_train::translator::validate::Validation;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Trains the translator, unless that is done.
pub fn run(context: &Context, world: &World, args: &RunArgs) -> Result<()> {
    run_in_buckets(context, world, args, BUCKET_BYTES / size_of::<f32>())
}

/// [`run`], with gradients summed in buckets of at least so many elements.
pub fn run_in_buckets(context: &Context, world: &World, args: &RunArgs, bucket: usize) -> Result<()> {
    let stage = Training::open(context, world, args, bucket, None)?;
    stage::run_on_ranks(context, world.comm(), &stage).map(drop)
}

/// Trains the translator of a fold, unless that is done.
pub fn run_fold(context: &Context, args: &RunArgs, fold: &Fold) -> Result<()> {
    let alone = World::alone();
    let stage = Training::open(context, &alone, args, BUCKET_BYTES / size_of::<f32>(), Some(fold))?;
    stage::run_on_ranks(context, alone.comm(), &stage).map(drop)
}

/// A training that is ready to begin, on one of the ranks that share it.
pub struct Training<'a> {
    comm: &'a dyn Comm,
    settings: RunSettings,
    /// The settings on this device.
    config: Config,
    tuples: Tuples,
    split: Split,
    dir: PathBuf,
    /// Fingerprint of the weights that it starts from.
    pretrained: Option<String>,
    /// Elements of a bucket of gradients at least.
    bucket: usize,
    /// Shadow pairs that are left out.
    held_out: Vec<usize>,
}

impl<'a> Training<'a> {
    /// Opens what a run needs. Rank 0 compares and verifies for all.
    pub fn open(
        context: &Context,
        world: &'a World,
        args: &RunArgs,
        bucket: usize,
        fold: Option<&Fold>,
    ) -> Result<Self> {
        let dir = fold.map_or_else(|| args.run.join(TRANSLATOR_DIR), Fold::translator_dir);
        let mut settings = RunSettings::open_on_ranks(args, world)?;
        let other = &settings.config().reuse.translator;
        if fold.is_none() && !other.as_os_str().is_empty() {
            return Err(is_reused(&args.run, other, "translator", Self::NAME));
        }
        let mut config = settings.config().clone().on_device_of_ranks(context, world, &dir)?;
        let comm = world.comm();
        let (ranks, batch) = (comm.size(), config.train.global_batch_size);
        if ranks > batch {
            return Err(unusable(format!(
                "train.global_batch_size is {batch}: so many ranks at most can share a step, but {ranks} were started"
            )));
        }
        let mut expected = [None, None];
        if comm.rank() == 0 {
            expected =
                spaces_at_hand(&config, context.threads, |text| context.ui.line(format!("train: {text}")))?;
        }
        if comm.rank() == 0 {
            warn_of_changes(context, &settings, Self::NAME)?;
        }
        let tuples = open_tuples(&mut settings, expected.each_ref().map(Option::as_ref))?.without(fold);
        let groups = || {
            let known = tuples.groups()?.ok_or_else(|| {
                let what = "train.val_split_by = \"group\": an older version of gradtx made these tuples, without the \
                            groups of shadow subsets";
                failed(what, "curate in a run directory of its own, or give train.val_split_by = \"subset\"")
            })?;
            Ok(Groups::new(&known))
        };
        let key = derive_named(config.seed, "validation subsets");
        let split = Split::of(&tuples.store, groups, &config.train, key)?;
        config.train = config.train.resolved(split.training.len());
        let pretrained = match config.translator.pretrained_path.as_path() {
            path if path.as_os_str().is_empty() => None,
            path => Some(fingerprint(path, context.threads)?),
        };
        let held_out = Fold::held_out(fold);
        Ok(Self { comm, settings, config, tuples, split, dir, pretrained, bucket, held_out })
    }
}

impl Stage for Training<'_> {
    type Inputs = TrainInputs;
    /// On rank 0 the best step, and its validation.
    type Output = Option<(Best, Validation)>;
    const HAS_RANKS: bool = true;
    const RESUMES: bool = true;

    fn dir(&self) -> &Path {
        &self.dir
    }

    fn settings(&self) -> Option<&RunSettings> {
        Some(&self.settings)
    }

    fn advice(&self) -> String {
        let [run, tuples, dir] =
            [self.settings.run(), self.tuples.run(), &self.dir].map(|path| quoted(&path.to_string_lossy()));
        format!(
            "to keep it, train on the same tuples in another run: gradtx train --run OTHER --tuples {tuples} with \
             the settings to change; or remove {dir} and run gradtx train --run {run} again"
        )
    }

    fn inputs(&self) -> Result<TrainInputs> {
        let Self { config, tuples, pretrained, .. } = self;
        let [student, teacher] = Role::BOTH.map(|role| tuples.store.space(role).clone());
        Ok(TrainInputs {
            seed: config.seed,
            tuples: tuples.manifest.clone(),
            spaces: Spaces { student, teacher },
            held_out: self.held_out.clone(),
            // Not where the weights lie that it starts from, but which they are.
            translator: TranslatorConfig { pretrained_path: PathBuf::new(), ..config.translator.clone() },
            pretrained: pretrained.clone(),
            train: config.train.clone(),
            device: config.device.clone(),
        })
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, Self::Output)> {
        let Self { comm, config, tuples, split, dir, bucket, .. } = self;
        let store = &tuples.store;
        if comm.rank() == 0 {
            tuples.verify()?;
        }
        let work = Train { context, comm: *comm, config, store, split, dir, bucket: *bucket };
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
        Ok((files.into_iter().map(String::from).collect(), found))
    }

    fn report(&self, context: &Context, found: &Self::Output) -> Result<()> {
        let Some((best, _)) = found else { return Ok(()) };
        Checkpoints::of(&self.dir).remove()?;
        let text = format!(
            "train: best relative error of generated updates {:.4}, at step {}, {}",
            best.relative_error,
            best.step,
            self.dir.display()
        );
        let numbers = json!({ "relative_error": best.relative_error, "best_step": best.step });
        context.ui.done("train", &self.dir, numbers, text);
        Ok(())
    }

    fn was_finished(&self, context: &Context) -> Result<()> {
        let dir = &self.dir;
        if self.comm.rank() == 0 {
            // Killed between the last two things that it did.
            Checkpoints::of(dir).remove()?;
        }
        context.ui.done("train", dir, json!({}), format!("train: {} is finished", dir.display()));
        Ok(())
    }
}
