//! `translate`: from clients' updates of the TinyLM to one update of the LLM.
//!
//! In: update vectors; with the Grad-Transformer `RUN/translator`, with the translators
//! of comparison and by products `RUN/shadow`. Out: `update.safetensors` and `adapter/` of the LLM, and
//! `clients.json`, what is known of the clients; by products also `products.json`, and the adapter is of
//! another rank than the shadows'.

use crate::aggregate::{self, Aggregation, Allow, Combined, Norms};
use crate::artifacts::{
    Translator, Tuples, open_pair, open_translator, open_tuples, open_update, warn_of_changes,
};
use crate::card::{self, Made};
use crate::clients::{CLIENTS_FILE, Clients, Given};
use crate::default_out;
use crate::fold::Fold;
use crate::products;
use crate::records::TranslateInputs;
use anyhow::{Context as _, Result};
use gradtx_kernels::rng::{Stream, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::grad_transformer::{Generator, GradTransformer, Targets};
use gradtx_run::config::{Config, RunArgs, RunSettings};
use gradtx_run::context::Context;
use gradtx_run::dispatch::{Work, dispatch};
use gradtx_run::paths::UPDATE_FILE;
use gradtx_run::stage::{self, Stage};
use gradtx_run::text::counted;
use gradtx_runtime::artifact::{
    MANIFEST, Privacy, TupleStore, UpdateVector, checksum_file, public_name, write_json,
};
use gradtx_train::baselines::{Baseline, Method, Pairs};
use gradtx_train::model_spec::ModelSpec;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// How a translation by products came to be.
pub(crate) const DETAILS_FILE: &str = "products.json";

/// What to translate, how, to where.
pub struct Job {
    /// Update vector files of the TinyLM.
    pub updates: Vec<PathBuf>,
    /// Directory of the results.
    pub out: PathBuf,
    /// The translator.
    pub method: Method,
    /// How several updates become one.
    pub aggregation: Aggregation,
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
    /// The updates as one.
    combined: Combined,
    /// The shadow updates that a Grad-Transformer was trained on, or why they are not there.
    seen: Result<Box<Tuples>, String>,
}

impl<'a> Translate<'a> {
    /// Opens what a job needs. Everything that is used is checked before anything is written.
    pub fn open(context: &Context, args: &RunArgs, job: &'a Job) -> Result<Self> {
        let mut settings = RunSettings::open(args)?;
        let config = settings.config().clone().on_device(context, &job.out)?;
        let [student, teacher] = open_pair(&config, context.threads)?;
        let open = |path: &PathBuf| open_update(&student, &teacher, path);
        let updates = job.updates.iter().map(open).collect::<Result<Vec<_>>>()?;
        let sums = job.updates.iter().map(|path| checksum_file(path)).collect::<Result<Vec<_>, _>>()?;
        warn_of_changes(context, &settings, Self::NAME)?;
        let source = Source::open(&mut settings, job, &student, &teacher)?;
        aggregate::check(&job.updates, &updates, &source.students()?, job.allow)?;
        let combined = aggregate::combine(&job.updates, &updates, &job.aggregation)?;
        let seen = match &source {
            Source::Translator(translator) if job.fold.is_none() => {
                translator.tuples_at_hand(&mut settings, [&student.space, &teacher.space]).map(Box::new)
            }
            _ => Err(String::new()),
        };
        Ok(Self { job, settings, config, student, teacher, source, updates, sums, combined, seen })
    }
}

impl Translate<'_> {
    /// The updates as they were combined.
    fn clients(&self) -> Vec<&[f32]> {
        let given = self.updates.iter().map(|update| update.values.as_slice());
        let clipped = &self.combined.clipped;
        given.enumerate().map(|(i, update)| clipped.get(&i).map_or(update, Vec::as_slice)).collect()
    }

    /// The clients, compared with each other and with the shadows.
    fn compare(&self, context: &Context) -> Result<Clients> {
        let tuples = match &self.source {
            Source::Translator(_) => self.seen.as_deref().map_err(Clone::clone),
            Source::Coordinates(_, tuples) | Source::Baseline(tuples, _) | Source::Products(tuples) => {
                Ok(&**tuples)
            }
        };
        let run = self.settings.run();
        let given = Given {
            names: default_out::names_of_updates(run, &self.job.updates),
            checksums: &self.sums,
            updates: &self.updates,
            combined: &self.combined,
            combine: self.job.aggregation.combine,
            aggregation: self.job.aggregation.inputs(),
            students: self.source.students()?,
        };
        Ok(Clients::compare(context, run, &given, tuples))
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
            combine: self.job.aggregation.combine,
            aggregation: self.job.aggregation.inputs(),
            random_student: self.job.random_student,
            updates: self.sums.clone(),
            with: self.source.sums(),
            llm: self.teacher.space.base_model.clone(),
            device: self.config.device.clone(),
            held_out: Fold::held_out(self.job.fold.as_ref()),
            products: matches!(self.source, Source::Products(_))
                .then(|| products::Translation::inputs(&self.config)),
            lora_r: matches!(self.source, Source::Coordinates(..)).then_some(self.config.translate.lora_r),
        })
    }

    fn make(&self, context: &Context) -> Result<(Vec<String>, ())> {
        let Self { job, config, teacher, source, sums, .. } = self;
        let (mut combined, examples) = (self.combined.values.clone(), self.combined.examples);
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
            Source::Coordinates(translator, tuples) => {
                let components = translator.components(tuples)?;
                let work = Translation { dir: &translator.dir, update: &combined };
                let predicted = dispatch(&config.device, context, work)?;
                let (side, factors) =
                    self.by_products(context, tuples).of_coordinates(&components, &combined, &predicted)?;
                of_rank = Some(side);
                factors
            }
            Source::Baseline(tuples, baseline) => {
                baseline.translate(&Snapshots::of(&tuples.store, *baseline), &combined)?
            }
            Source::Products(tuples) => {
                let (clients, shares) = match &self.combined.shares {
                    // What every client changes is added up, not the factors that it is made of.
                    Some(shares) if !job.random_student => (self.clients(), shares.clone()),
                    _ => (vec![combined.as_slice()], vec![1.0]),
                };
                let (side, update, details) = self.by_products(context, tuples).of(&clients, &shares)?;
                write_json(&job.out.join(DETAILS_FILE), &details)?;
                files.push(DETAILS_FILE.into());
                of_rank = Some(side);
                update
            }
        };
        let teacher = of_rank.as_ref().unwrap_or(teacher);
        let mut update = teacher.update(translated, examples);
        update.meta.privacy = self.privacy();
        update.check().with_context(|| format!("translate: what {} gives", job.method.name()))?;
        files.extend(teacher.write_peft(&job.out, &update.values)?);
        let mut made = made_of(job, &public_name(&self.student.dir), examples);
        made.privacy = update.meta.privacy.clone();
        files.push(card::write_beside_adapter(&teacher.dir, &teacher.layout, &made, &job.out)?);
        update.write(&job.out.join(UPDATE_FILE))?;
        files.push(UPDATE_FILE.into());
        if job.fold.is_none() {
            let clients = self.compare(context)?;
            clients.show(context);
            write_json(&job.out.join(CLIENTS_FILE), &clients)?;
            files.push(CLIENTS_FILE.into());
        }
        Ok((files, ()))
    }

    fn report(&self, context: &Context, (): &()) -> Result<()> {
        let Job { method, out, .. } = self.job;
        let text = format!("translate: {}, {}", method.name(), out.display());
        context.ui.done("translate", out, json!({ "method": method }), text);
        Ok(())
    }
}

impl Translate<'_> {
    /// What is made of an update without looking at its examples again has the guarantee of the update. Of several updates
    /// each has its own.
    fn privacy(&self) -> Privacy {
        match (self.updates.as_slice(), self.job.random_student) {
            ([update], false) => update.meta.privacy.clone(),
            _ => Privacy::None,
        }
    }
}

impl<'a> Translate<'a> {
    fn by_products<'b>(&'b self, context: &'b Context, tuples: &'b Tuples) -> products::Translation<'b> {
        let Self { job, settings, config, teacher, .. } = self;
        products::Translation {
            context,
            run: settings.run(),
            fold: job.fold.as_ref(),
            config,
            teacher,
            tuples,
        }
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
    Made { how, settings, privacy: Privacy::None }
}

/// What is translated with.
enum Source {
    Translator(Translator),
    /// One that predicts coordinates, and the tuples whose products these are of.
    Coordinates(Translator, Box<Tuples>),
    Baseline(Box<Tuples>, &'static dyn Baseline),
    Products(Box<Tuples>),
}

impl Source {
    /// Opens what a method needs of a run, and verifies all of it.
    fn open(settings: &mut RunSettings, job: &Job, student: &ModelSpec, teacher: &ModelSpec) -> Result<Self> {
        let (method, fold) = (job.method, job.fold.as_ref());
        let mut translator = None;
        if method.is_trained() {
            let [student, teacher] = [&student.space, &teacher.space];
            let opened = open_translator(settings, fold, method.targets(), student, teacher)?;
            if opened.targets == Targets::Factors {
                return Ok(Self::Translator(opened));
            }
            translator = Some(opened);
        }
        let tuples = open_tuples(settings, [Some(&student.space), Some(&teacher.space)])?.without(fold);
        tuples.verify()?;
        let tuples = Box::new(tuples);
        Ok(match (translator, method.baseline()) {
            (Some(translator), _) => Self::Coordinates(translator, tuples),
            (None, Some(baseline)) => Self::Baseline(tuples, baseline),
            (None, None) => Self::Products(tuples),
        })
    }

    /// Checksums of everything that is used.
    fn sums(&self) -> Map<String, Value> {
        match self {
            Self::Translator(translator) | Self::Coordinates(translator, _) => translator.sums.clone(),
            Self::Baseline(tuples, _) | Self::Products(tuples) => {
                Map::from_iter([(MANIFEST.into(), tuples.manifest.clone().into())])
            }
        }
    }

    /// Norms of the shadow students' updates.
    fn students(&self) -> Result<Norms> {
        match self {
            Self::Translator(translator) | Self::Coordinates(translator, _) => Ok(translator.students),
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
