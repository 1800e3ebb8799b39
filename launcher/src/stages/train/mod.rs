//! `train`: from tuples to a translator.
//!
//! In: the tuple store of `RUN/shadow`. Out, in `RUN/translator`: the Grad-Transformer
//! that had the smallest validation error, its normalisation, `metrics.jsonl` (every
//! step's loss, written as it goes), `throughput.jsonl` (tuples per second), and
//! `validation.json` (what was held out, and what it measured).
//!
//! [`tuples`] tells which tuples a step has, [`mod@validate`] measures generated updates, and
//! [`resume`] keeps checkpoints.
//!
//! Validation splits by shadow subset unless told otherwise: the tuples of one subset are
//! near duplicates. Its error is relative: 1 is what the mean of the teachers reaches.

pub mod resume;
pub mod tuples;
pub mod validate;

use crate::args::RunArgs;
use crate::cluster::World;
use crate::config::{Config, TrainConfig, TranslatorConfig};
use crate::dispatch::{Work, dispatch};
use crate::failure::failed;
use crate::record::{self, State};
use crate::stages::{Context, SHADOW_DIR, TRANSLATOR_DIR, totals};
use anyhow::{Context as _, Result, ensure};
use gradtx_kernels::ops::AdamWStep;
use gradtx_kernels::rng::{derive, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::grad_transformer::{
    Generator, GradTransformer, GradTransformerConfig, NormalizationMode, StartToken, StepReport, Trainer,
    Tuples,
};
use gradtx_models::t5::T5Config;
use gradtx_runtime::artifact::{Role, TupleStore, UpdateSpace, checksum_file, fingerprint, write_json};
use gradtx_runtime::metrics::JsonLines;
use gradtx_runtime::optim::Schedule;
use gradtx_runtime::plan::available_memory;
use resume::{Best, Checkpoints, Progress};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tuples::{Source, Split, Tuple};
use validate::{Validation, mean_teacher, validate};

/// What helps against a damaged tuple store.
const MAKE_ANEW: &str = "run `gradtx curate` again: it makes anew what is damaged";

/// Opens the tuple store of a run.
pub fn open_store(run: &Path) -> Result<TupleStore> {
    let dir = run.join(SHADOW_DIR);
    if !dir.join("manifest.json").is_file() {
        return Err(failed(
            format!("{}: there is no tuple store", dir.display()),
            "run `gradtx curate` first",
        ));
    }
    TupleStore::open(&dir).map_err(|e| failed(e.to_string(), MAKE_ANEW))
}

/// Trains the translator, unless that is done.
pub fn run(context: &Context, world: &World, args: &RunArgs) -> Result<()> {
    let config = Config::of_ranks(args, world)?;
    ensure!(world.comm().size() == 1, "several ranks cannot do this yet");
    let store = open_store(&args.run)?;
    let dir = args.run.join(TRANSLATOR_DIR);
    let pretrained = &config.translator.pretrained;
    let pretrained = match pretrained.as_os_str().is_empty() {
        true => None,
        false => Some(fingerprint(pretrained, context.threads)?),
    };
    let settings = json!({
        "seed": config.seed,
        "tuples": checksum_file(&args.run.join(SHADOW_DIR).join("manifest.json"))?,
        // Not where the weights lie that it starts from, but which they are.
        "translator": TranslatorConfig { pretrained: PathBuf::new(), ..config.translator.clone() },
        "pretrained": pretrained,
        "train": config.train,
        "device": config.device,
    });
    let State::Open(output) = record::open(&dir, "train", settings)? else {
        context.ui.done("train", &dir, json!({}), format!("train: {} is finished", dir.display()));
        return Ok(());
    };
    if let Some(problem) = store.verify().into_iter().next() {
        return Err(failed(problem, MAKE_ANEW));
    }
    let split = Split::of(&store, &config.train, derive_named(config.seed, "validation subsets"))?;
    let work = Train { context, config: &config, store: &store, split: &split, dir: &dir };
    let (best, validation) = dispatch(&config.device, context.threads, work)?;
    let report = json!({
        "best_step": best.step,
        "best": validation,
        "held_out": split.describe(&store),
    });
    write_json(&dir.join("validation.json"), &report)?;
    let mut files = vec!["config.json", "model.safetensors", "metrics.jsonl", "validation.json"];
    if dir.join("normalization.safetensors").is_file() {
        files.push("normalization.safetensors");
    }
    output.finish(&files.into_iter().map(String::from).collect::<Vec<_>>())?;
    Checkpoints::of(&dir).remove()?;
    let text = format!(
        "train: best relative error of generated updates {:.4}, at step {}, {}",
        best.relative_error,
        best.step,
        dir.display()
    );
    let numbers = json!({ "relative_error": best.relative_error, "best_step": best.step });
    context.ui.done("train", &dir, numbers, text);
    Ok(())
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

struct Train<'a> {
    context: &'a Context,
    config: &'a Config,
    store: &'a TupleStore,
    split: &'a Split,
    dir: &'a Path,
}

impl Work for Train<'_> {
    /// The best step, and its validation.
    type Output = (Best, Validation);

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<(Best, Validation)> {
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
        let mode = NormalizationMode::parse(&settings.normalization).expect("the configuration was checked");
        model.set_normalization(tuples::fit(self.store, &self.split.training, mode)?)?;
        let mut plan = Trainer::plan(&model, train.micro_batch)?;
        plan.extend(Generator::plan(&model, self.validated_at_once())?);
        plan.check(available_memory()?)?;
        self.context.ui.line(totals("train", &plan));
        let mut trainer = Trainer::new(&mut model, train.micro_batch)?;
        self.context.ui.line(format!(
            "train: {} parameters, {} tuples, {} held out",
            model.layout().count(),
            self.split.training.len(),
            self.split.validation.len(),
        ));
        let checkpoints = Checkpoints::of(self.dir);
        let progress = checkpoints.restore(device, &mut model, &mut trainer)?;
        if let Some(progress) = &progress {
            self.context.ui.line(format!("train: going on after step {}", progress.steps));
        }
        let run = Run {
            train: &self,
            key,
            checkpoints,
            mean: mean_teacher(self.store, &self.split.training)?,
            generator: Generator::new(&model, self.validated_at_once())?,
            model,
            trainer,
            progress: progress.unwrap_or_default(),
        };
        run.finish(device)
    }
}

impl Train<'_> {
    fn validated_at_once(&self) -> usize {
        self.split.validation.len().min(validate::AT_ONCE)
    }
}

/// A training on its way.
struct Run<'a, D: Backend<X>, X: Real<Acc = f32>> {
    train: &'a Train<'a>,
    key: u64,
    model: GradTransformer<D, X>,
    trainer: Trainer<D, X>,
    generator: Generator<D, X>,
    /// The mean of the training teachers.
    mean: Vec<f32>,
    checkpoints: Checkpoints,
    progress: Progress,
}

impl<D: Backend<X>, X: Real<Acc = f32>> Run<'_, D, X> {
    fn finish(mut self, device: &D) -> Result<(Best, Validation)> {
        let Train { context, config, store, split, dir } = *self.train;
        let train = &config.train;
        let mut source = Source::new(store, train, &split.training, self.key)?;
        let begun = self.progress.steps;
        let mut metrics = JsonLines::resume(&dir.join("metrics.jsonl"), begun as u64 + 1)?;
        let mut throughput = JsonLines::resume(&dir.join("throughput.jsonl"), begun as u64 + 1)?;
        let mut bar = context.ui.progress_from("train", begun as u64, train.steps as u64);
        let (started, mut saved) = (Instant::now(), Instant::now());
        let every = Duration::try_from_secs_f64(60.0 * train.checkpoint_minutes).unwrap_or(Duration::MAX);
        while !self.has_ended() {
            let step = self.progress.steps;
            let report = self.step(&mut source, step)?;
            self.progress.steps += 1;
            let done = self.progress.steps;
            let rate = ((done - begun) as usize * train.batch) as f64 / started.elapsed().as_secs_f64();
            bar.set(done as u64, format!("loss {:.4}, {rate:.0} tuples/s", report.loss));
            let mut line = json!({ "step": done, "loss": report.loss, "grad_norm": report.grad_norm });
            if done.is_multiple_of(train.validate_every) || done == train.steps {
                let validation = self.validate()?;
                line["validation"] = json!(validation);
                throughput.write(&json!({ "step": done, "tuples_per_s": rate }))?;
                let error = validation.relative_error;
                context
                    .ui
                    .line(format!("train: step {done}, loss {:.4}, validation {error:.4}", report.loss));
            }
            metrics.write(&line)?;
            if saved.elapsed() >= every && !self.has_ended() {
                metrics.sync()?;
                self.checkpoints.save(device, &self.model, &self.trainer, &self.progress)?;
                saved = Instant::now();
            }
        }
        self.result()
    }

    /// One optimizer step, counted from 0.
    fn step(&mut self, source: &mut Source<'_>, step: u32) -> Result<StepReport> {
        let train = &self.train.config.train;
        let batch = source.step(step, self.model.normalization())?;
        let dropout = derive(derive_named(self.key, "dropout"), step as u64);
        let keys: Vec<u64> = (0..train.batch).map(|i| derive(dropout, i as u64)).collect();
        let tuples = Tuples { student: &batch.students, teacher: &batch.teachers, keys: &keys };
        let clip = (train.max_norm > 0.0).then_some(train.max_norm);
        self.trainer.train_step(&mut self.model, tuples, optimizer_step(train, step), clip).with_context(
            || {
                let store = self.train.store;
                let names: Vec<_> = source.tuples(step).iter().map(|t| name(store, t)).collect();
                format!("train: step {}, tuples {}", step + 1, names.join(" "))
            },
        )
    }

    /// Validates, and keeps the model if it is the best so far.
    fn validate(&mut self) -> Result<Validation> {
        let Train { store, split, dir, .. } = *self.train;
        let found = validate(&self.model, &mut self.generator, store, &split.validation, &self.mean)?;
        let best = self.progress.best.as_ref().map_or(f64::INFINITY, |best| best.relative_error);
        if found.relative_error < best {
            self.model.save_values(dir, &self.trainer.master_values(&self.model)?)?;
            self.progress.best = Some(Best {
                step: self.progress.steps,
                relative_error: found.relative_error,
                file: checksum_file(&dir.join("model.safetensors"))?,
            });
            self.progress.since_best = 0;
        } else {
            self.progress.since_best += 1;
        }
        Ok(found)
    }

    /// All steps are done, or validations have not become better for long enough.
    fn has_ended(&self) -> bool {
        let train = &self.train.config.train;
        let patience = train.patience > 0 && self.progress.since_best >= train.patience;
        self.progress.steps >= train.steps || patience
    }

    /// The best step, and its validation as the metrics have it.
    fn result(self) -> Result<(Best, Validation)> {
        let Some(best) = self.progress.best else {
            return Err(failed("train: no validation gave a number", "try a smaller train.lr"));
        };
        let path = self.train.dir.join("metrics.jsonl");
        let lines = JsonLines::read(&path)?;
        let line = lines.iter().find(|line| line["step"] == best.step && line["validation"].is_object());
        let line =
            line.with_context(|| format!("{}: no validation of step {}", path.display(), best.step))?;
        let validation = serde_json::from_value(line["validation"].clone())
            .with_context(|| format!("{}: the validation of step {}", path.display(), best.step))?;
        Ok((best, validation))
    }
}

/// A tuple as people know it: shadow subset and snapshot.
fn name(store: &TupleStore, &(pair, snapshot): &Tuple) -> String {
    format!("{}/{snapshot}", store.shadow(pair))
}

fn optimizer_step(train: &TrainConfig, step: u32) -> AdamWStep {
    let schedule = Schedule {
        peak: train.lr,
        decay: train.decay,
        warmup: train.warmup as u64,
        hold: 0,
        steps: train.steps as u64,
        final_fraction: train.final_fraction,
    };
    AdamWStep {
        lr: schedule.lr(step as u64),
        beta1: 0.9,
        beta2: 0.999,
        eps: train.eps,
        weight_decay: train.weight_decay,
        step: step + 1,
    }
}
