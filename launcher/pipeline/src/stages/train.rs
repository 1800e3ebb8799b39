//! `train`: from tuples to a translator.
//!
//! In: the tuple store of `RUN/shadow`. Out, in `RUN/translator`: what [`Train`] makes of it,
//! and `validation.json` (what was held out, and what it measured).

use crate::aggregate::Norms;
use crate::artifacts::{Tuples, open_tuples, spaces_at_hand};
use anyhow::Result;
use gradtx_kernels::rng::derive_named;
use gradtx_run::cluster::World;
use gradtx_run::config::{Config, RunArgs, TranslatorConfig};
use gradtx_run::context::Context;
use gradtx_run::dispatch::dispatch;
use gradtx_run::failure::unusable;
use gradtx_run::paths::TRANSLATOR_DIR;
use gradtx_run::record::{self, SharedState};
use gradtx_runtime::artifact::{Role, fingerprint, write_json};
use gradtx_runtime::parallel::BUCKET_BYTES;
use gradtx_train::translator::Train;
use gradtx_train::translator::resume::Checkpoints;
use gradtx_train::translator::tuples::Split;
use serde_json::json;
use std::path::PathBuf;

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
    let SharedState::Open(mut seat) = record::open_for_all(comm, &dir, "train", settings)? else {
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
    let done = dispatch(&config.device, context, work);
    // Also of an attempt that was stopped, whose checkpoint others may go on with.
    seat.computed_on(context.computed_on())?;
    let found = done?;
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
