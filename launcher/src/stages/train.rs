//! `train`: from tuples to a translator.
//!
//! In: the tuple store of `RUN/shadow`. Out, in `RUN/translator`: the Grad-Transformer
//! that had the smallest validation error, its normalisation, `metrics.jsonl` (every
//! step's loss, written as it goes), `throughput.jsonl` (tuples per second), and
//! `validation.json` (which shadow subsets were held out, and what they measured).
//!
//! Validation splits by shadow subset, never by tuple: the tuples of one subset are near
//! duplicates. It is measured by generation, as in use: every block is predicted from
//! predictions. The error is relative: 1 is what the mean of the teachers reaches.

use crate::args::RunArgs;
use crate::config::{Config, TrainConfig, TranslatorConfig};
use crate::dispatch::{Work, dispatch};
use crate::failure::{failed, unusable};
use crate::record::{self, State};
use crate::stages::{Context, SHADOW_DIR, TRANSLATOR_DIR, totals};
use anyhow::Result;
use gradtx_kernels::ops::AdamWStep;
use gradtx_kernels::rng::{Stream, derive, derive_named};
use gradtx_kernels::{Backend, Real};
use gradtx_models::grad_transformer::{
    Generator, GradTransformer, GradTransformerConfig, NormalizationFit, NormalizationMode, StartToken,
    Trainer, Tuples,
};
use gradtx_models::t5::T5Config;
use gradtx_runtime::artifact::{Role, TupleStore, UpdateSpace, checksum_file, write_json};
use gradtx_runtime::data::Order;
use gradtx_runtime::metrics::JsonLines;
use gradtx_runtime::optim::Schedule;
use gradtx_runtime::plan::available_memory;
use serde_json::json;
use std::path::Path;
use std::time::Instant;

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
pub fn run(context: &Context, args: &RunArgs) -> Result<()> {
    let config = Config::of_run(args)?;
    let store = open_store(&args.run)?;
    let dir = args.run.join(TRANSLATOR_DIR);
    let settings = json!({
        "seed": config.seed,
        "tuples": checksum_file(&args.run.join(SHADOW_DIR).join("manifest.json"))?,
        "translator": config.translator,
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
    let split = Split::of(&store, config.train.validation, derive_named(config.seed, "validation subsets"))?;
    let work = Train { context, config: &config, store: &store, split: &split, dir: &dir };
    let best = dispatch(&config.device, context.threads, work)?;
    if !best.is_finite() {
        return Err(failed("train: no validation gave a number", "try a smaller train.lr"));
    }
    let held_out: Vec<usize> = split.validation.iter().map(|&pair| store.shadow(pair)).collect();
    write_json(&dir.join("validation.json"), &json!({ "subsets": held_out, "relative_error": best }))?;
    let mut files = vec!["config.json", "model.safetensors", "metrics.jsonl", "validation.json"];
    if dir.join("normalization.safetensors").is_file() {
        files.push("normalization.safetensors");
    }
    output.finish(&files.into_iter().map(String::from).collect::<Vec<_>>())?;
    let text = format!("train: best relative error of generated updates {best:.4}, {}", dir.display());
    context.ui.done("train", &dir, json!({ "relative_error": best }), text);
    Ok(())
}

/// Pairs of the store for training and for validation.
struct Split {
    training: Vec<usize>,
    validation: Vec<usize>,
}

impl Split {
    fn of(store: &TupleStore, part: f64, key: u64) -> Result<Self> {
        let pairs = store.pairs();
        let count = (pairs as f64 * part).ceil() as usize;
        if count == 0 || count >= pairs {
            let what = "train.validation: at least one shadow subset must be held out, and one left";
            return Err(unusable(format!("{what}; {count} of {pairs} are asked for")));
        }
        let mut training = Stream::new(key).permutation(pairs);
        let mut validation = training.split_off(pairs - count);
        training.sort_unstable();
        validation.sort_unstable();
        Ok(Self { training, validation })
    }
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

/// Student and teacher updates, one after the other, in the model's units.
struct Updates {
    students: Vec<f32>,
    teachers: Vec<f32>,
}

struct Train<'a> {
    context: &'a Context,
    config: &'a Config,
    store: &'a TupleStore,
    split: &'a Split,
    dir: &'a Path,
}

impl Work for Train<'_> {
    /// The smallest validation error.
    type Output = f64;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(self, device: &D) -> Result<f64> {
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
        model.set_normalization(self.fit()?.finish()?)?;
        let plan = Trainer::plan(&model, train.micro_batch)?;
        plan.check(available_memory()?)?;
        self.context.ui.line(totals("train", &plan));
        let mut trainer = Trainer::new(&mut model, train.micro_batch)?;
        let parameters = model.layout().count();
        self.context.ui.line(format!(
            "train: {parameters} parameters, {} tuples of {} subsets, {} subsets held out",
            self.split.training.len() * self.store.steps(),
            self.split.training.len(),
            self.split.validation.len(),
        ));
        let tuples: Vec<(usize, usize)> = self.all(&self.split.training);
        let held_out = self.read(&model, &self.all(&self.split.validation))?;
        let mut order = Order::new(tuples.len(), train.batch, derive_named(key, "order"))?;
        let mut metrics = JsonLines::resume(&self.dir.join("metrics.jsonl"), 0)?;
        let mut throughput = JsonLines::resume(&self.dir.join("throughput.jsonl"), 0)?;
        let mut best = f64::INFINITY;
        let mut progress = self.context.ui.progress("train", train.steps as u64);
        let started = Instant::now();
        for step in 0..train.steps {
            let chosen: Vec<_> = order.step(step as usize).into_iter().map(|i| tuples[i]).collect();
            let batch = self.read(&model, &chosen)?;
            let keys: Vec<u64> = (0..chosen.len())
                .map(|i| derive(derive(derive_named(key, "dropout"), step as u64), i as u64))
                .collect();
            let tuples = Tuples { student: &batch.students, teacher: &batch.teachers, keys: &keys };
            let clip = (train.max_norm > 0.0).then_some(train.max_norm);
            let report = trainer.train_step(&mut model, tuples, optimizer_step(train, step), clip)?;
            let seconds = started.elapsed().as_secs_f64();
            let per_second = ((step as usize + 1) * train.batch) as f64 / seconds.max(1e-9);
            progress.set(step as u64 + 1, format!("loss {:.4}, {per_second:.0} tuples/s", report.loss));
            let mut line = json!({ "step": step + 1, "loss": report.loss, "grad_norm": report.grad_norm });
            if (step + 1) % train.validate_every == 0 || step + 1 == train.steps {
                let error = relative_error(&model, &held_out)?;
                line["validation"] = json!(error);
                throughput.write(&json!({ "step": step + 1, "tuples_per_s": per_second }))?;
                self.context.ui.line(format!(
                    "train: step {}, loss {:.4}, validation {error:.4}",
                    step + 1,
                    report.loss
                ));
                if error < best {
                    best = error;
                    model.save(self.dir)?;
                }
            }
            metrics.write(&line)?;
        }
        Ok(best)
    }
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

impl Train<'_> {
    /// All tuples of these pairs, as (pair, step).
    fn all(&self, pairs: &[usize]) -> Vec<(usize, usize)> {
        pairs.iter().flat_map(|&pair| (0..self.store.steps()).map(move |step| (pair, step))).collect()
    }

    /// Statistics of the training tuples.
    fn fit(&self) -> Result<NormalizationFit> {
        let mode = NormalizationMode::parse(&self.config.translator.normalization);
        let mode = mode.expect("the configuration was checked");
        let (s, t) = (self.store.space(Role::Student), self.store.space(Role::Teacher));
        let mut fit = NormalizationFit::new(mode, [s.blocks, s.width], [t.blocks, t.width]);
        let (mut student, mut teacher) = (vec![0.0; s.values()], vec![0.0; t.values()]);
        for (pair, step) in self.all(&self.split.training) {
            self.store.read_pair(pair, step, &mut student, &mut teacher)?;
            fit.add(&student, &teacher)?;
        }
        Ok(fit)
    }

    fn read<X: Real, D: Backend<X>>(
        &self,
        model: &GradTransformer<D, X>,
        tuples: &[(usize, usize)],
    ) -> Result<Updates> {
        let (s, t) = (model.config().student_len(), model.config().teacher_len());
        let mut students = vec![0.0; tuples.len() * s];
        let mut teachers = vec![0.0; tuples.len() * t];
        for ((&(pair, step), student), teacher) in
            tuples.iter().zip(students.chunks_mut(s)).zip(teachers.chunks_mut(t))
        {
            self.store.read_pair(pair, step, student, teacher)?;
        }
        model.normalization().apply_student(&mut students)?;
        model.normalization().apply_teacher(&mut teachers)?;
        Ok(Updates { students, teachers })
    }
}

/// Squared error of generated updates, over that of always predicting zero, which in the
/// units of a centred normalisation is the mean teacher.
fn relative_error<X: Real, D: Backend<X>>(model: &GradTransformer<D, X>, held_out: &Updates) -> Result<f64> {
    let count = held_out.students.len() / model.config().student_len();
    let generated = Generator::new(model, count.min(64))?.generate(model, &held_out.students)?;
    let (mut error, mut zero) = (0.0, 0.0);
    for (&found, &wanted) in generated.iter().zip(&held_out.teachers) {
        error += (found as f64 - wanted as f64).powi(2);
        zero += (wanted as f64).powi(2);
    }
    Ok(error / zero)
}
