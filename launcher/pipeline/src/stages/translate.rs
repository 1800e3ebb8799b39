//! `translate`: from clients' updates of the TinyLM to one update of the LLM.
//!
//! In: update vectors; with the Grad-Transformer `RUN/translator`, with the translators
//! of comparison and by products `RUN/shadow`. Out: `update.safetensors` and `adapter/` of the LLM; by
//! products also `products.json`, and the adapter is of another rank than the shadows'.

use crate::aggregate::{self, Allow, Combine, Norms};
use crate::artifacts::{
    Translator, Tuples, open_side, open_translator, open_tuples, open_update, warn_of_changes,
};
use crate::card::{self, Made};
use crate::fold::Fold;
use crate::products;
use crate::records::TranslateInputs;
use anyhow::{Context as _, Result};
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::grad_transformer::{Generator, GradTransformer};
use gradtx_run::config::{Config, RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, dispatch};
use gradtx_run::paths::UPDATE_FILE;
use gradtx_run::role::Role;
use gradtx_run::stage::{self, Stage};
use gradtx_run::text::counted;
use gradtx_runtime::artifact::{MANIFEST, TupleStore, UpdateVector, checksum_file, public_name, write_json};
use gradtx_train::baselines::{Baseline, Method, Pairs};
use gradtx_train::model_spec::ModelSpec;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// How a translation by products came to be.
pub const DETAILS_FILE: &str = "products.json";

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
    /// Shadow pairs that the translator must not have seen.
    pub fold: Option<Fold>,
}

/// Translates, unless that is done.
pub fn run(context: &Context, args: &RunArgs, job: &Job) -> Result<()> {
    stage::run(context, &Translate::open(context, args, job)?).map(drop)
}

/// A translation that is ready to begin.
pub struct Translate<'a> {
    job: &'a Job,
    settings: RunSettings,
    /// The settings on this device.
    config: Config,
    student: ModelSpec,
    teacher: ModelSpec,
    source: Source,
    updates: Vec<UpdateVector>,
    /// Checksums of the updates.
    sums: Vec<String>,
    /// The updates as one, and the examples behind it.
    combined: (Vec<f32>, u64),
}

impl<'a> Translate<'a> {
    /// Opens what a job needs. Everything that is used is checked before anything is written.
    pub fn open(context: &Context, args: &RunArgs, job: &'a Job) -> Result<Self> {
        let mut settings = RunSettings::open(args)?;
        let config = settings.config().clone().on_device(context, &job.out)?;
        let student = open_side(&config, Role::Tiny, context.threads)?;
        let teacher = open_side(&config, Role::Llm, context.threads)?;
        let open = |path: &PathBuf| open_update(&student, &teacher, path);
        let updates = job.updates.iter().map(open).collect::<Result<Vec<_>>>()?;
        let sums = job.updates.iter().map(|path| checksum_file(path)).collect::<Result<Vec<_>, _>>()?;
        warn_of_changes(context, &settings, Self::NAME)?;
        let source = Source::open(&mut settings, job, &student, &teacher)?;
        aggregate::check(&job.updates, &updates, &source.students()?, job.allow)?;
        let combined = aggregate::combine(&updates, job.combine)?;
        Ok(Self { job, settings, config, student, teacher, source, updates, sums, combined })
    }
}

impl Stage for Translate<'_> {
    type Inputs = TranslateInputs;
    type Output = ();

    fn dir(&self) -> &Path {
        &self.job.out
    }

    fn settings(&self) -> Option<&RunSettings> {
        Some(&self.settings)
    }

    fn inputs(&self) -> Result<TranslateInputs> {
        Ok(TranslateInputs {
            method: self.job.method,
            combine: self.job.combine,
            random_student: self.job.random_student,
            updates: self.sums.clone(),
            with: self.source.sums(),
            llm: self.teacher.space.base_model.clone(),
            device: self.config.device.clone(),
            held_out: Fold::held_out(self.job.fold.as_ref()),
            products: matches!(self.source, Source::Products(_))
                .then(|| products::Translation::inputs(&self.config)),
        })
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, ())> {
        let Self { job, config, teacher, source, sums, combined: (combined, examples), .. } = self;
        let mut combined = combined.clone();
        if job.random_student {
            // Other noise for other updates, or all clients would share one draw's luck.
            let key = derive_named(derive_named(config.seed, "random student"), &sums.concat());
            combined = noise_like(&combined, key);
        }
        let mut files = vec![];
        let mut of_rank = None;
        let translated = match source {
            Source::Translator(translator) => {
                dispatch(&config.device, context, Translation { dir: &translator.dir, update: &combined })?
            }
            Source::Baseline(tuples, baseline) => {
                baseline.translate(&Snapshots::of(&tuples.store, *baseline), &combined)?
            }
            Source::Products(tuples) => {
                // What every client changes is added up, not the factors that it is made of.
                let clients: Vec<&[f32]> = match job.random_student {
                    true => vec![&combined],
                    false => self.updates.iter().map(|update| update.values.as_slice()).collect(),
                };
                let work = products::Translation {
                    context,
                    run: self.settings.run(),
                    fold: job.fold.as_ref(),
                    config,
                    teacher,
                    tuples,
                };
                let (side, update, details) = work.of(&clients, job.combine)?;
                write_json(&job.out.join(DETAILS_FILE), &details)?;
                files.push(DETAILS_FILE.into());
                of_rank = Some(side);
                update
            }
        };
        let teacher = of_rank.as_ref().unwrap_or(teacher);
        let update = teacher.update(translated, *examples);
        update.check().with_context(|| format!("translate: what {} gives", job.method.name()))?;
        files.extend(teacher.write_peft(&job.out, &update.values)?);
        let made = made_of(job, &public_name(&self.student.dir), *examples);
        files.push(card::write_beside_adapter(&teacher.dir, teacher.layout.lora(), &made, &job.out)?);
        update.write(&job.out.join(UPDATE_FILE))?;
        files.push(UPDATE_FILE.into());
        Ok((files, ()))
    }

    fn report(&self, context: &Context, (): &()) -> Result<()> {
        let Job { method, out, .. } = self.job;
        let text = format!("translate: {}, {}", method.name(), out.display());
        context.ui.done("translate", out, json!({ "method": method }), text);
        Ok(())
    }
}

/// What the card of the adapter says; `tiny` is the public name of the model that updates are of.
fn made_of(job: &Job, tiny: &str, examples: u64) -> Made {
    let clients = counted(job.updates.len(), "client");
    let how = match job.random_student {
        true => {
            format!("was translated from noise in the place of an update of `{tiny}`: a control, of no use")
        }
        false => {
            format!("was translated from the updates of `{tiny}` of {clients}, without any of their examples")
        }
    };
    let settings =
        vec![("translator", job.method.name().into()), ("examples of all clients", examples.to_string())];
    Made { how, settings }
}

/// What is translated with.
enum Source {
    Translator(Translator),
    Baseline(Box<Tuples>, &'static dyn Baseline),
    Products(Box<Tuples>),
}

impl Source {
    /// Opens what a method needs of a run, and verifies all of it.
    fn open(settings: &mut RunSettings, job: &Job, student: &ModelSpec, teacher: &ModelSpec) -> Result<Self> {
        let (method, fold) = (job.method, job.fold.as_ref());
        if let (Method::GradTransformer, None) = (method, method.baseline()) {
            return Ok(Self::Translator(open_translator(settings, fold, &student.space, &teacher.space)?));
        }
        let tuples = open_tuples(settings, [Some(&student.space), Some(&teacher.space)])?.without(fold);
        tuples.verify()?;
        let tuples = Box::new(tuples);
        Ok(match method.baseline() {
            Some(baseline) => Self::Baseline(tuples, baseline),
            None => Self::Products(tuples),
        })
    }

    /// Checksums of everything that is used.
    fn sums(&self) -> Map<String, Value> {
        match self {
            Self::Translator(translator) => translator.sums.clone(),
            Self::Baseline(tuples, _) | Self::Products(tuples) => {
                Map::from_iter([(MANIFEST.into(), tuples.manifest.clone().into())])
            }
        }
    }

    /// Norms of the shadow students' updates.
    fn students(&self) -> Result<Norms> {
        match self {
            Self::Translator(translator) => Ok(translator.students),
            Self::Baseline(tuples, _) | Self::Products(tuples) => Norms::of(&tuples.store),
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

/// The last snapshots of every pair of a store.
struct Snapshots<'a> {
    store: &'a TupleStore,
    /// So many of each pair.
    last: usize,
}

impl<'a> Snapshots<'a> {
    /// Those that a baseline uses.
    fn of(store: &'a TupleStore, baseline: &dyn Baseline) -> Self {
        let last = baseline.snapshots().map_or(store.steps(), |wanted| wanted.min(store.steps()));
        Self { store, last }
    }

    fn read(&self, role: gradtx_runtime::artifact::Role, tuple: usize) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.store.space(role).values()];
        let step = self.store.steps() - self.last + tuple % self.last;
        self.store.read(role, tuple / self.last, step, &mut out)?;
        Ok(out)
    }
}

impl Pairs for Snapshots<'_> {
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
