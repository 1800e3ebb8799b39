//! `bench train`: a training step of the Grad-Transformer: forward with dropout, backward of all
//! parameters, norm and clipping, AdamW.
//!
//! Two lines: `train`, with the batch on the device already, which is the arithmetic; and `train
//! with loading`, the trainer's own step as `gradtx train` does it, by the same code, where the
//! next tuples are read from a store on the disk, prepared and uploaded meanwhile. The first is held
//! against the targets, and its line says how its time divides. Two more lines report what preparing
//! the tuples of a step takes by itself ([`tuples`]).
//!
//! **Operations**, by [`TranslatorWork::training`]: 6 per value and block that it multiplies, 4
//! for the two projections whose inputs need no gradient, and attention's. The optimizer's are
//! not counted: its work is bytes.

use super::counts::Count;
use super::finetune::STEP;
use super::measure::{self, Repeats, Times};
use super::models::{NamedTranslator, TranslatorArgs, check_memory};
use super::options::{Common, at_least_one};
use super::results::{Entry, Results, rounded};
use super::{Measured, On, machine, profile, tuples};
use anyhow::{Result, ensure};
use gradtx_kernels::ops::{AdamWStep, Out};
use gradtx_kernels::rng::Stream;
use gradtx_kernels::{Backend, Real, bf16};
use gradtx_models::grad_transformer::{Activations, GradTransformer, Trainer, Tuples};
use gradtx_models::t5::Grads;
use gradtx_plan::cost::rates::Kind;
use gradtx_plan::cost::work::TranslatorWork;
use gradtx_runtime::comm::Solo;
use gradtx_runtime::parallel::BUCKET_BYTES;
use gradtx_train::translator::data_parallel::DataParallel;
use gradtx_train::translator::prefetch::{Part, Prefetcher};
use gradtx_train::translator::steps::gradients;
use serde_json::json;

/// A step's sizes.
#[derive(Debug, clap::Args)]
pub struct Job {
    #[command(flatten)]
    pub(super) common: Common,
    #[command(flatten)]
    sizes: TranslatorArgs,
    /// Tuples of a step (default: 8 on a CPU, 32 on a GPU).
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Dropout, in the place of the model's 0.1.
    #[arg(long, value_name = "P")]
    dropout: Option<f64>,
}

impl Measured for Job {
    fn measure<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        on: &On<'_, D>,
        results: &mut Results,
    ) -> Result<()> {
        let is_cpu = on.machine.is_cpu();
        let mut translator = NamedTranslator::find(&self.sizes, is_cpu)?;
        if let Some(dropout) = self.dropout {
            ensure!(
                (0.0..1.0).contains(&dropout),
                "--dropout {dropout}: expected a number from 0 to below 1"
            );
            translator.config.t5.dropout_rate = dropout;
        }
        let batch = self.batch.unwrap_or(if is_cpu { 8 } else { 32 });
        at_least_one("--batch", batch)?;
        let outline = GradTransformer::<D, X>::meta(on.device, translator.config.clone())?;
        check_memory(on.device, &translator.name, "--batch", batch, |n| {
            let mut plan = Trainer::plan(&outline, n)?;
            // The resident batch has activations of its own.
            plan.extend(Activations::plan(&outline, n)?);
            Ok(plan)
        })?;
        if self.sizes.translator.is_none() && is_cpu {
            results.say(
                "a small translator, since this is a CPU: --translator large --batch 32 is the real one",
            );
        }
        steps::<X, D>(on, results, &translator, batch)
    }
}

/// Update vectors of a normal distribution.
pub(super) fn updates(len: usize, key: u64) -> Vec<f32> {
    let mut stream = Stream::new(key);
    let made: Vec<f32> = (0..len.min(1_000_003)).map(|_| stream.normal() as f32).collect();
    made.iter().copied().cycle().take(len).collect()
}

fn steps<X: Real<Acc = f32>, D: Backend<X>>(
    on: &On<'_, D>,
    results: &mut Results,
    translator: &NamedTranslator,
    batch: usize,
) -> Result<()> {
    let config = &translator.config;
    let mut model = translator.make::<X, D>(on.device)?;
    let mut trainer = Trainer::new(&mut model, batch)?;
    let students = updates(batch * config.student_len(), 3);
    let teachers = updates(batch * config.teacher_len(), 4);
    let keys: Vec<u64> = (0..batch as u64).collect();
    let tuples = Tuples { student: &students, teacher: &teachers, keys: &keys };
    let values = model.layout().count() as f64;
    let work = TranslatorWork { config, values, element: size_of::<X>() as f64 };
    let flops = work.training(batch as f64).flops;
    let shape = format!("{} batch {batch}", translator.shape());
    let fields = |times: &Times| {
        json!({"model": translator.name, "batch": batch, "parameters": values,
            "student": format!("{}x{}", config.student_blocks, config.student_width),
            "teacher": format!("{}x{}", config.teacher_blocks, config.teacher_width),
            "tuples_per_s": rounded(batch as f64 / times.median())})
    };

    let mut resident = Resident::new(&model, tuples)?;
    let repeats = results.repeats();
    let times = measure::step(on.device, repeats, || {
        if resident.step as usize == repeats.warmup {
            machine::start_profile(on.device);
        }
        resident.step(&mut model, &mut trainer)
    })?;
    let mut more = fields(&times);
    more["share_of_time"] = machine::shares_of_time(on.device, times.total());
    more["seconds_of"] = resident.phases(&mut model, &mut trainer, repeats)?;
    more["operations"] = profile::of_step(on, || resident.step(&mut model, &mut trainer))?;
    drop(resident);
    let entry = Entry::new("train", shape.as_str(), Count::flops(flops), times);
    results.add(on.device, entry.of(Kind::Translator).with(more))?;

    let store = tuples::Store::make(config, batch, on.threads)?;
    store.measure::<f32, D>(on, results)?;
    store.measure::<bf16, D>(on, results)?;
    let times = with_loading(on, repeats, &store, &mut model, &mut trainer)?;
    let more = fields(&times);
    results.add(on.device, Entry::new("train with loading", shape, Count::flops(flops), times).with(more))
}

/// Steps after which all work on both sets of inputs is repeated from the device's memory: the first
/// two run as they are, and the next two are captured.
const FIRST_STEPS: usize = 4;

/// The step of `gradtx train`, with its own prefetcher of tuples from the disk.
fn with_loading<X: Real<Acc = f32>, D: Backend<X>>(
    on: &On<'_, D>,
    repeats: Repeats,
    store: &tuples::Store,
    model: &mut GradTransformer<D, X>,
    trainer: &mut Trainer<D, X>,
) -> Result<Times> {
    let (config, batch) = (model.config().clone(), store.batch());
    let scale = 1.0 / (batch * config.teacher_len()) as f64;
    let solo = Solo::default();
    let mut ranks = DataParallel::new(&solo, on.device, model.layout(), BUCKET_BYTES / size_of::<f32>())?;
    let part = Part { steps: 0..u32::MAX, own: 0..batch };
    let repeats = Repeats { warmup: repeats.warmup + FIRST_STEPS, ..repeats };
    std::thread::scope(|scope| {
        let (units, source) = (store.units().clone(), store.source()?);
        let mut prefetcher = Prefetcher::start(scope, on.device, &config, units, source, part, on.threads)?;
        let mut step = 0;
        measure::step(on.device, repeats, || {
            step += 1;
            let tuples = prefetcher.next_step()?;
            let loss = gradients(&mut ranks, model, trainer, &tuples, &mut prefetcher, scale)? * scale;
            ensure!(loss.is_finite(), "the loss is {loss}");
            let squares = trainer.sum_squares(on.device)?;
            trainer.apply(model, AdamWStep { step, ..STEP }, Some(1.0), squares)?;
            prefetcher.give_back(tuples);
            Ok(())
        })
    })
}

/// A batch that stays on the device. Its passes are repeated from the device's memory of them,
/// as the trainer does.
struct Resident<D: Backend<X>, X: Real<Acc = f32>> {
    acts: Activations<D, X>,
    forward: D::Graph,
    backward: D::Graph,
    scale: f64,
    step: u32,
}

impl<D: Backend<X>, X: Real<Acc = f32>> Resident<D, X> {
    fn new(model: &GradTransformer<D, X>, tuples: Tuples<'_>) -> Result<Self> {
        let mut acts = Activations::new(model, tuples.len())?;
        model.load_batch(&mut acts, tuples)?;
        let scale = 1.0 / (tuples.len() * model.config().teacher_len()) as f64;
        let (forward, backward) = (D::Graph::default(), D::Graph::default());
        Ok(Self { acts, forward, backward, scale, step: 0 })
    }

    fn forward(&mut self, model: &GradTransformer<D, X>) -> Result<()> {
        let Self { acts, forward, scale, .. } = self;
        model.device().capture_or_launch(forward, &mut || {
            model.forward(acts, true)?;
            model.losses(acts, *scale)
        })?;
        Ok(model.release_losses(acts)?)
    }

    fn backward(&mut self, model: &GradTransformer<D, X>, trainer: &mut Trainer<D, X>) -> Result<()> {
        let Self { acts, backward, .. } = self;
        let (device, buf) = (model.device(), trainer.gradients_mut());
        Ok(device.capture_or_launch(backward, &mut || {
            model.backward(acts, true, &mut Grads::new(device, buf, Out::Assign, &mut |_, _| Ok(())))
        })?)
    }

    fn update(&mut self, model: &mut GradTransformer<D, X>, trainer: &mut Trainer<D, X>) -> Result<()> {
        self.step += 1;
        let squares = trainer.sum_squares(model.device())?;
        trainer.apply(model, AdamWStep { step: self.step, ..STEP }, Some(1.0), squares)?;
        Ok(())
    }

    fn check_loss(&mut self, model: &GradTransformer<D, X>) -> Result<()> {
        let loss = model.sum_of_losses(&mut self.acts)?;
        ensure!(loss.is_finite(), "the loss is {loss}");
        Ok(())
    }

    fn step(&mut self, model: &mut GradTransformer<D, X>, trainer: &mut Trainer<D, X>) -> Result<()> {
        self.forward(model)?;
        self.backward(model, trainer)?;
        self.check_loss(model)?;
        self.update(model, trainer)
    }

    /// Medians of the parts of a step, each waited for, so that their sum is more than a step.
    fn phases(
        &mut self,
        model: &mut GradTransformer<D, X>,
        trainer: &mut Trainer<D, X>,
        repeats: Repeats,
    ) -> Result<serde_json::Value> {
        let device = model.device().clone();
        let forward = measure::step(&device, repeats, || self.forward(model))?;
        let backward = measure::step(&device, repeats, || self.backward(model, trainer))?;
        let update = measure::step(&device, repeats, || self.update(model, trainer))?;
        let [forward, backward, update] = [forward, backward, update].map(|t| rounded(t.median()));
        Ok(json!({ "forward": forward, "backward": backward, "update": update }))
    }
}
