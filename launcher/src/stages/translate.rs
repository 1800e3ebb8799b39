//! `translate`: from clients' updates of the TinyLM to one update of the LLM.
//!
//! In: update vectors; with the Grad-Transformer `RUN/translator`, with the translators
//! of comparison `RUN/shadow`. Out: `update.safetensors` and `adapter/` of the LLM.

use crate::args::{Combine, Method, Role, RunArgs};
use crate::config::Config;
use crate::dispatch::{Work, dispatch};
use crate::failure::failed;
use crate::record::{self, State};
use crate::stages::side::Side;
use crate::stages::train::open_store;
use crate::stages::{Context, SHADOW_DIR, TRANSLATOR_DIR, UPDATE_FILE};
use crate::translators::{self, Pairs};
use anyhow::Result;
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::grad_transformer::{Generator, GradTransformer};
use gradtx_runtime::artifact::{TupleStore, UpdateVector, checksum_file};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// What to translate, how, to where.
pub struct Job {
    /// Update vector files of the TinyLM.
    pub updates: Vec<PathBuf>,
    /// Directory of the results.
    pub out: PathBuf,
    /// The translator.
    pub method: Method,
    /// How several updates become one.
    pub combine: Combine,
    /// Translate noise in the place of the update.
    pub random_student: bool,
}

/// Translates, unless that is done.
pub fn run(context: &Context, args: &RunArgs, job: &Job) -> Result<()> {
    let config = Config::of_run(args)?.on_device(context, &job.out)?;
    let student = Side::new(&config, Role::Tiny, context.threads)?;
    let teacher = Side::new(&config, Role::Llm, context.threads)?;
    let read = |path: &PathBuf| read_update(&student, &teacher, path);
    let updates = job.updates.iter().map(read).collect::<Result<Vec<_>>>()?;
    let sums = job.updates.iter().map(|path| checksum_file(path)).collect::<Result<Vec<_>, _>>()?;
    let settings = json!({
        "method": job.method,
        "combine": job.combine,
        "random_student": job.random_student,
        "updates": sums,
        "with": source(&args.run, job.method)?,
        "llm": teacher.space.base_model,
        "device": config.device,
    });
    let State::Open(output) = record::open(&job.out, "translate", settings)? else {
        let text = format!("translate: {} is finished", job.out.display());
        context.ui.done("translate", &job.out, json!({}), text);
        return Ok(());
    };
    let mut combined = combine(&updates, job.combine);
    if job.random_student {
        // Other noise for other updates, or all clients would share one draw's luck.
        let key = derive_named(derive_named(config.seed, "random student"), &sums.concat());
        combined = noise_like(&combined, key);
    }
    let translated = match job.method {
        Method::GradTransformer => {
            let translator = Translator { dir: &args.run.join(TRANSLATOR_DIR), update: &combined };
            dispatch(&config.device, context, translator)?
        }
        Method::Mean => translators::mean(&All::of(&open_store(&args.run)?))?,
        Method::Nearest => translators::nearest(&All::of(&open_store(&args.run)?), &combined)?,
        Method::Ridge => translators::ridge(&All::late(&open_store(&args.run)?), &combined)?,
    };
    let mut files = teacher.write_peft(&job.out, &translated)?;
    let examples = updates.iter().map(|u| u.meta.examples).sum();
    teacher.update(translated, examples).write(&job.out.join(UPDATE_FILE))?;
    files.push(UPDATE_FILE.into());
    output.finish(&files)?;
    let text = format!("translate: {}, {}", job.method.name(), job.out.display());
    context.ui.done("translate", &job.out, json!({ "method": job.method }), text);
    Ok(())
}

/// Reads an update of the TinyLM.
fn read_update(student: &Side, teacher: &Side, path: &Path) -> Result<UpdateVector> {
    student.read_update(path).map_err(|error| match teacher.read_update(path) {
        Ok(_) => failed(
            format!("{}: an update of the LLM; expected one of the TinyLM (its base model)", path.display()),
            "translate what `gradtx finetune --model tiny` has written",
        ),
        Err(_) => error,
    })
}

/// Checksums of what a method translates with.
fn source(run: &Path, method: Method) -> Result<Value> {
    let file = match method {
        Method::GradTransformer => run.join(TRANSLATOR_DIR).join("model.safetensors"),
        Method::Mean | Method::Nearest | Method::Ridge => run.join(SHADOW_DIR).join("manifest.json"),
    };
    if !file.is_file() {
        let stage = if method == Method::GradTransformer { "train" } else { "curate" };
        return Err(failed(format!("{}: not there", file.display()), format!("run `gradtx {stage}` first")));
    }
    Ok(json!(checksum_file(&file)?))
}

/// Mean or sum of updates, added up in order.
fn combine(updates: &[UpdateVector], how: Combine) -> Vec<f32> {
    let share = match how {
        Combine::Mean => 1.0 / updates.len() as f64,
        Combine::Sum => 1.0,
    };
    let mut sum = vec![0.0f64; updates.first().map_or(0, |u| u.values.len())];
    for update in updates {
        sum.iter_mut().zip(&update.values).for_each(|(s, &x)| *s += x as f64);
    }
    sum.into_iter().map(|s| (s * share) as f32).collect()
}

/// Normal noise with the root mean square of an update.
fn noise_like(update: &[f32], key: u64) -> Vec<f32> {
    let square = update.iter().map(|&x| (x as f64).powi(2)).sum::<f64>() / update.len().max(1) as f64;
    let mut stream = Stream::new(key);
    update.iter().map(|_| (stream.normal() * square.sqrt()) as f32).collect()
}

struct Translator<'a> {
    dir: &'a Path,
    update: &'a [f32],
}

impl Work for Translator<'_> {
    type Output = Vec<f32>;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<Vec<f32>> {
        let model = GradTransformer::<D, X>::load(device, self.dir)?;
        Ok(Generator::new(&model, 1)?.translate(&model, self.update)?)
    }
}

/// All tuples of a store.
struct All<'a> {
    store: &'a TupleStore,
    /// The last so many snapshots of each pair.
    last: usize,
}

impl<'a> All<'a> {
    fn of(store: &'a TupleStore) -> Self {
        Self { store, last: store.steps() }
    }

    /// The last two snapshots of each pair: a regression holds all of its tuples in
    /// memory, and the tuples of one subset are near duplicates.
    fn late(store: &'a TupleStore) -> Self {
        Self { store, last: store.steps().min(2) }
    }

    fn read(&self, role: gradtx_runtime::artifact::Role, tuple: usize) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.store.space(role).values()];
        let step = self.store.steps() - self.last + tuple % self.last;
        self.store.read(role, tuple / self.last, step, &mut out)?;
        Ok(out)
    }
}

impl Pairs for All<'_> {
    fn count(&self) -> usize {
        self.store.pairs() * self.last
    }
    fn subset(&self, pair: usize) -> usize {
        pair / self.last
    }
    fn student(&self, pair: usize) -> Result<Vec<f32>> {
        self.read(gradtx_runtime::artifact::Role::Student, pair)
    }
    fn teacher(&self, pair: usize) -> Result<Vec<f32>> {
        self.read(gradtx_runtime::artifact::Role::Teacher, pair)
    }
}
