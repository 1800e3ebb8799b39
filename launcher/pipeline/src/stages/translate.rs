//! `translate`: from clients' updates of the TinyLM to one update of the LLM.
//!
//! In: update vectors; with the Grad-Transformer `RUN/translator`, with the translators
//! of comparison `RUN/shadow`. Out: `update.safetensors` and `adapter/` of the LLM.

use crate::aggregate::{self, Allow, Combine, Norms};
use crate::artifacts::{Translator, Tuples, open_side, open_translator, open_tuples, open_update};
use anyhow::{Context as _, Result};
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::grad_transformer::{Generator, GradTransformer};
use gradtx_run::config::{Config, RunArgs};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, dispatch};
use gradtx_run::paths::UPDATE_FILE;
use gradtx_run::record::{self, State};
use gradtx_run::role::Role;
use gradtx_runtime::artifact::{TupleStore, checksum_file};
use gradtx_train::baselines::{self, Method, Pairs};
use gradtx_train::side::Side;
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
    /// What of unusual updates is accepted.
    pub allow: Allow,
}

/// Translates, unless that is done.
pub fn run(context: &Context, args: &RunArgs, job: &Job) -> Result<()> {
    let config = Config::of_run(args)?.on_device(context, &job.out)?;
    let student = open_side(&config, Role::Tiny, context.threads)?;
    let teacher = open_side(&config, Role::Llm, context.threads)?;
    // Everything that is used is opened and checked before anything is written.
    let open = |path: &PathBuf| open_update(&student, &teacher, path);
    let updates = job.updates.iter().map(open).collect::<Result<Vec<_>>>()?;
    let sums = job.updates.iter().map(|path| checksum_file(path)).collect::<Result<Vec<_>, _>>()?;
    let source = Source::open(&args.run, job.method, &student, &teacher)?;
    aggregate::check(&job.updates, &updates, &source.students()?, job.allow)?;
    let (mut combined, examples) = aggregate::combine(&updates, job.combine)?;
    let settings = json!({
        "method": job.method,
        "combine": job.combine,
        "random_student": job.random_student,
        "updates": sums,
        "with": source.sums(),
        "llm": teacher.space.base_model,
        "device": config.device,
    });
    let State::Open(mut output) = record::open(&job.out, "translate", settings)? else {
        let text = format!("translate: {} is finished", job.out.display());
        context.ui.done("translate", &job.out, json!({}), text);
        return Ok(());
    };
    if job.random_student {
        // Other noise for other updates, or all clients would share one draw's luck.
        let key = derive_named(derive_named(config.seed, "random student"), &sums.concat());
        combined = noise_like(&combined, key);
    }
    let translated = match &source {
        Source::Translator(translator) => {
            let work = Translation { dir: &translator.dir, update: &combined };
            let translated = dispatch(&config.device, context, work)?;
            output.computed_on(context.computed_on())?;
            translated
        }
        Source::Tuples(tuples) if job.method == Method::Ridge => {
            baselines::ridge(&All::late(&tuples.store), &combined)?
        }
        Source::Tuples(tuples) if job.method == Method::Nearest => {
            baselines::nearest(&All::of(&tuples.store), &combined)?
        }
        Source::Tuples(tuples) => baselines::mean(&All::of(&tuples.store))?,
    };
    let update = teacher.update(translated, examples);
    update.check().with_context(|| format!("translate: what {} gives", job.method.name()))?;
    let mut files = teacher.write_peft(&job.out, &update.values)?;
    update.write(&job.out.join(UPDATE_FILE))?;
    files.push(UPDATE_FILE.into());
    output.finish(&files)?;
    let text = format!("translate: {}, {}", job.method.name(), job.out.display());
    context.ui.done("translate", &job.out, json!({ "method": job.method }), text);
    Ok(())
}

/// What is translated with.
enum Source {
    Translator(Translator),
    Tuples(Box<Tuples>),
}

impl Source {
    /// Opens what a method needs of a run, and verifies all of it.
    fn open(run: &Path, method: Method, student: &Side, teacher: &Side) -> Result<Self> {
        match method {
            Method::GradTransformer => {
                Ok(Self::Translator(open_translator(run, &student.space, &teacher.space)?))
            }
            Method::Mean | Method::Nearest | Method::Ridge => {
                let tuples = open_tuples(run, [Some(&student.space), Some(&teacher.space)])?;
                tuples.verify()?;
                Ok(Self::Tuples(Box::new(tuples)))
            }
        }
    }

    /// Checksums of everything that is used.
    fn sums(&self) -> Value {
        match self {
            Self::Translator(translator) => translator.sums.clone(),
            Self::Tuples(tuples) => json!({ "manifest.json": tuples.manifest }),
        }
    }

    /// Norms of the shadow students' updates.
    fn students(&self) -> Result<Norms> {
        match self {
            Self::Translator(translator) => Ok(translator.students),
            Self::Tuples(tuples) => Norms::of(&tuples.store),
        }
    }
}

/// Normal noise with the root mean square of an update.
fn noise_like(update: &[f32], key: u64) -> Vec<f32> {
    let square = update.iter().map(|&x| (x as f64).powi(2)).sum::<f64>() / update.len().max(1) as f64;
    let mut stream = Stream::new(key);
    update.iter().map(|_| (stream.normal() * square.sqrt()) as f32).collect()
}

struct Translation<'a> {
    dir: &'a Path,
    update: &'a [f32],
}

impl Work for Translation<'_> {
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
