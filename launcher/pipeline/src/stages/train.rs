//! `train`: from tuples to a translator.
//!
//! In: the tuple store of `RUN/shadow`. Out, in `RUN/translator`: what [`Train`] makes of it,
//! and `validation.json` (what was held out, and what it measured). Where it predicts coordinates
//! (`train.targets`), rank 0 computes them for all before the first step, and `components.safetensors` says
//! what they mean.

use crate::aggregate::Norms;
use crate::artifacts::{Tuples, open_tuples, sides_at_hand, warn_of_changes};
use crate::fold::Fold;
use crate::products;
use crate::records::{CoordinateInputs, Spaces, TrainInputs};
use anyhow::Result;
use gradtx_kernels::rng::derive_named;
use gradtx_models::grad_transformer::{Components, Targets};
use gradtx_run::cluster::World;
use gradtx_run::config::{Config, RunArgs, RunSettings, TranslatorConfig, is_reused};
use gradtx_run::context::Context;
use gradtx_run::dispatch::dispatch;
use gradtx_run::failure::{failed, unusable};
use gradtx_run::paths::TRANSLATOR_DIR;
use gradtx_run::stage::{self, Stage};
use gradtx_run::text::quoted;
use gradtx_runtime::artifact::{Role, fingerprint, write_json};
use gradtx_runtime::comm::{Collectives, Comm};
use gradtx_runtime::parallel::BUCKET_BYTES;
use gradtx_train::model_spec::ModelSpec;
use gradtx_train::products::Groups;
use gradtx_train::products::coordinates::Coordinates;
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
    let stage = Training::open(context, world, args, bucket, None, None)?;
    stage::run_on_ranks(context, world.comm(), &stage).map(drop)
}

/// Trains the translator of a fold, unless that is done; `targets` in the place of those of the settings.
pub(crate) fn run_fold(
    context: &Context,
    args: &RunArgs,
    fold: &Fold,
    targets: Option<Targets>,
) -> Result<()> {
    let alone = World::alone();
    let bucket = BUCKET_BYTES / size_of::<f32>();
    let stage = Training::open(context, &alone, args, bucket, Some(fold), targets)?;
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
    fold: Option<Fold>,
    /// The LLM, on rank 0, if it is at hand.
    llm: Option<ModelSpec>,
}

impl<'a> Training<'a> {
    /// Opens what a run needs. Rank 0 compares and verifies for all.
    pub fn open(
        context: &Context,
        world: &'a World,
        args: &RunArgs,
        bucket: usize,
        fold: Option<&Fold>,
        targets: Option<Targets>,
    ) -> Result<Self> {
        let dir = fold.map_or_else(|| args.run.join(TRANSLATOR_DIR), |fold| fold.translator_dir(targets));
        let mut settings = RunSettings::open_on_ranks(args, world)?;
        let other = &settings.config().reuse.translator;
        if fold.is_none() && !other.as_os_str().is_empty() {
            return Err(is_reused(&args.run, other, "translator", Self::NAME));
        }
        let mut config = settings.config().clone().on_device_of_ranks(context, world, &dir)?;
        config.train.targets = targets.unwrap_or(config.train.targets);
        let comm = world.comm();
        let (ranks, batch) = (comm.size(), config.train.global_batch_size);
        if ranks > batch {
            return Err(unusable(format!(
                "train.global_batch_size is {batch}: so many ranks at most can share a step, but {ranks} were started"
            )));
        }
        let mut sides = [None, None];
        if comm.rank() == 0 {
            sides =
                sides_at_hand(&config, context.threads, |text| context.ui.line(format!("train: {text}")))?;
        }
        if comm.rank() == 0 {
            warn_of_changes(context, &settings, Self::NAME)?;
        }
        let expected = sides.each_ref().map(|side| side.as_ref().map(|side| &side.space));
        let tuples = open_tuples(&mut settings, expected)?.without(fold);
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
        let ([_, llm], fold) = (sides, fold.cloned());
        Ok(Self { comm, settings, config, tuples, split, dir, pretrained, bucket, fold, llm })
    }

    /// What is predicted in the place of the LLM's updates, on all ranks; and on rank 0 what that means.
    fn coordinates(&self, context: &Context) -> Result<Option<(Coordinates, Option<Components>)>> {
        let Self { comm, config, tuples, .. } = self;
        if config.train.targets == Targets::Factors {
            return Ok(None);
        }
        let (mut components, mut own) = (None, None);
        if comm.rank() == 0 {
            let targets = config.train.targets;
            let Some(teacher) = &self.llm else {
                let what = format!(
                    "train.targets = {}: needs the LLM, to know which values of its updates are of which \
                     matrix; models.llm is not there",
                    targets.name()
                );
                return Err(unusable(what));
            };
            let (run, fold) = (self.settings.run(), self.fold.as_ref());
            let translation = products::Translation { context, run, fold, config, teacher, tuples };
            let (found, coordinates) = translation.coordinates(targets, config.train.max_components)?;
            let [blocks, width] = coordinates.shape();
            context.ui.line(format!("train: {width} coordinates for each of the LLM's {blocks} blocks"));
            (components, own) = (Some(found), Some(coordinates));
        }
        Ok(Some((of_first(*comm, own, tuples.store.steps())?, components)))
    }
}

/// Coordinates of tuples with so many snapshots, from rank 0, which has them, to all.
fn of_first(comm: &dyn Comm, own: Option<Coordinates>, steps: usize) -> Result<Coordinates> {
    let mut shape = [0u64; 3];
    let mut values = vec![];
    if let Some(coordinates) = own {
        let [blocks, width] = coordinates.shape();
        shape = [coordinates.values().len(), blocks, width].map(|n| n as u64);
        values = coordinates.into_values();
    }
    comm.broadcast(0, &mut shape)?;
    let [count, blocks, width] = shape.map(|n| n as usize);
    values.resize(count, 0.0);
    comm.broadcast(0, &mut values)?;
    Ok(Coordinates::new(values, steps, [blocks, width]))
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
            held_out: Fold::held_out(self.fold.as_ref()),
            // Not where the weights lie that it starts from, but which they are.
            translator: TranslatorConfig { pretrained_path: PathBuf::new(), ..config.translator.clone() },
            pretrained: pretrained.clone(),
            train: config.train.clone(),
            device: config.device.clone(),
            coordinates: match config.train.targets {
                Targets::Factors => None,
                targets => Some(CoordinateInputs {
                    groups: tuples.groups()?,
                    penalty: (targets == Targets::Residual).then(|| products::choice(config)),
                }),
            },
        })
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, Self::Output)> {
        let Self { comm, config, tuples, split, dir, bucket, .. } = self;
        let store = &tuples.store;
        if comm.rank() == 0 {
            tuples.verify()?;
        }
        let coordinates = self.coordinates(context)?;
        let work = Train {
            context,
            comm: *comm,
            config,
            store,
            split,
            coordinates: coordinates.as_ref().map(|(coordinates, _)| coordinates),
            dir,
            bucket: *bucket,
        };
        let found = dispatch(&config.device, context, work)?;
        let mut files = vec![];
        if let Some((_, Some(components))) = &coordinates {
            components.save(dir, &tuples.manifest)?;
            files.push(Components::FILE);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ranks_have_the_coordinates_of_the_first() {
        let wanted = Coordinates::new((0..24).map(|i| i as f32).collect(), 2, [2, 3]);
        let found: Vec<Coordinates> = std::thread::scope(|scope| {
            let of_rank = |comm: gradtx_runtime::comm::Local| {
                let own = (comm.rank() == 0).then(|| wanted.clone());
                of_first(&comm, own, 2).unwrap()
            };
            let ranks = gradtx_runtime::comm::local(3).into_iter();
            let ranks: Vec<_> = ranks.map(|comm| scope.spawn(move || of_rank(comm))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        assert_eq!(found, [wanted.clone(), wanted.clone(), wanted.clone()]);
        assert_eq!(found[1].of(1, 1), [18.0, 19.0, 20.0, 21.0, 22.0, 23.0]);
    }
}
