//! `Run`: a training from its first step, or its last checkpoint, to its end.
//!
//! A step: this rank's part of the tuples → gradients, summed over ranks → all ranks tell each
//! other their [`LocalStep`] → this rank updates what it owns → all values come to all. What
//! decides how it continues (validation, early stop, checkpoint, a signal) is the same on all
//! ranks, so they stay together. Only rank 0 writes metrics.

use super::Train;
use super::data_parallel::{DataParallel, GlobalStep, LocalStep};
use super::prefetch::{Part, Prefetcher};
use super::resume::{Best, Checkpoints, Progress};
use super::tuples::{Tuple, TupleSampler};
use super::validate::{Validation, validate};
use crate::step_log::StepLog;
use anyhow::{Context as _, Result};
use gradtx_kernels::{Backend, Real};
use gradtx_models::grad_transformer::{Batch, Generator, GradTransformer, StagedTuples, StepReport, Trainer};
use gradtx_run::config::TrainConfig;
use gradtx_run::failure::{failed, stopped};
use gradtx_run::progress::{self, RankProgress};
use gradtx_run::{interrupt, ui};
use gradtx_runtime::artifact::TupleStore;
use gradtx_runtime::comm::Collectives;
use gradtx_runtime::metrics::JsonLines;
use serde_json::{Map, Value, json};
use std::time::{Duration, Instant};

/// How often rank 0 shows how far all are.
const SHOW_EVERY: Duration = Duration::from_millis(500);

/// A training on its way, on this rank.
pub(super) struct Run<'a, D: Backend<X>, X: Real<Acc = f32>> {
    // First, so that on a failure it ends what the devices exchange before their memory goes.
    pub ranks: DataParallel<'a, D>,
    pub train: &'a Train<'a>,
    pub key: u64,
    pub model: GradTransformer<D, X>,
    pub trainer: Trainer<D, X>,
    pub generator: Generator<D, X>,
    /// The mean of the training teachers.
    pub mean: Vec<f32>,
    pub checkpoints: Checkpoints,
    pub progress: Progress,
    /// Bytes that the training allocates.
    pub bytes: u64,
}

/// What is reported while it goes: by rank 0 in files, and to whoever watches.
struct Journal {
    /// Metrics, and throughput between validations; on rank 0 only.
    files: Option<(StepLog, JsonLines)>,
    bar: ui::Progress,
    /// All ranks, as rank 0 shows them.
    rank_states: Vec<RankProgress>,
    shown: Instant,
    /// Steps that were done when this process began, and when that was.
    started: (u32, Instant),
    times: Times,
}

impl Journal {
    /// Tuples per second since this process began.
    fn rate(&self, done: u32, train: &TrainConfig) -> f64 {
        let (before, since) = self.started;
        ((done - before) as usize * train.global_batch_size) as f64 / since.elapsed().as_secs_f64()
    }

    /// Shows that a step is done.
    fn show(&mut self, done: u32, train: &TrainConfig, loss: f64) {
        let rate = self.rate(done, train);
        self.bar.set(done as u64, format!("loss {loss:.4}, {rate:.0} tuples/s"));
        if self.shown.elapsed() >= SHOW_EVERY {
            self.shown = Instant::now();
            show(&mut self.rank_states, done, train, rate);
        }
    }

    /// Writes the line of a step of so many tuples.
    fn write(&mut self, metrics: &Map<String, Value>, tuples: usize) -> Result<()> {
        self.files.as_mut().map_or(Ok(()), |(log, _)| log.write(metrics, tuples as u64))
    }

    /// Where the time of the steps since the last such line went.
    fn write_throughput(&mut self, done: u32, train: &TrainConfig) -> Result<()> {
        let (rate, seconds) = (self.rate(done, train), std::mem::take(&mut self.times).told());
        let ranks = self.rank_states.len();
        let line = json!({ "step": done, "tuples_per_s": rate, "ranks": ranks, "seconds": seconds });
        self.files.as_mut().map_or(Ok(()), |(_, file)| Ok(file.write(&line)?))
    }

    /// Waits until the metrics are on the disk.
    fn sync(&self) -> Result<()> {
        self.files.as_ref().map_or(Ok(()), |(log, _)| log.sync())
    }
}

/// Where the time of steps went since the last line about it.
#[derive(Default)]
struct Times {
    steps: u32,
    all: Duration,
    communication: f64,
    data: f64,
}

impl Times {
    /// Mean seconds per step.
    fn told(&self) -> Value {
        let mean = |seconds: f64| seconds / self.steps.max(1) as f64;
        let compute = self.all.as_secs_f64() - self.communication - self.data;
        json!({ "compute": mean(compute), "communication": mean(self.communication), "data": mean(self.data) })
    }
}

impl<'a, D: Backend<X>, X: Real<Acc = f32>> Run<'a, D, X> {
    /// Trains to the end. On rank 0: the best step, and its validation as the metrics have it.
    pub fn finish(mut self) -> Result<Option<(Best, Validation)>> {
        let train = &self.train.config.train;
        let source = self.source()?;
        let part = Part {
            steps: self.progress.steps..train.max_steps,
            own: self.ranks.part(train.global_batch_size),
        };
        let threads = self.train.context.threads;
        std::thread::scope(|scope| {
            let (device, config) = (self.model.device().clone(), self.model.config().clone());
            let units = self.model.normalization().clone();
            let mut prefetcher = Prefetcher::start(scope, &device, &config, units, source, part, threads)?;
            self.all_steps(&mut prefetcher)
        })?;
        // Nobody writes a checkpoint any more when rank 0 removes them.
        self.checkpoints.wait()?;
        self.ranks.comm().barrier()?;
        self.ranks.close(self.model.device());
        if self.ranks.is_first() { self.result().map(Some) } else { Ok(None) }
    }

    fn source(&self) -> Result<TupleSampler<'a>> {
        let Train { config, split, .. } = *self.train;
        TupleSampler::new(self.train.source(), &config.train, &split.training, self.key)
    }

    fn all_steps(&mut self, prefetcher: &mut Prefetcher<D, X>) -> Result<()> {
        let train = &self.train.config.train;
        let mut journal = self.journal()?;
        let mut saved = Instant::now();
        let every = Duration::try_from_secs_f64(60.0 * train.save_minutes).unwrap_or(Duration::MAX);
        while !self.has_ended() {
            let due = saved.elapsed() >= every;
            let (report, agreed) = self.timed_step(prefetcher, due, &mut journal.times)?;
            self.progress.steps += 1;
            self.tell(&mut journal, report)?;
            if (agreed.due || agreed.asked.is_some()) && !self.has_ended() {
                journal.sync()?;
                self.checkpoints.start(&self.ranks, &self.model, &self.trainer, &self.progress)?;
                saved = Instant::now();
                if let Some(code) = agreed.asked {
                    self.checkpoints.wait()?;
                    self.ranks.comm().barrier()?;
                    return Err(stopped(code));
                }
            }
        }
        Ok(())
    }

    fn journal(&self) -> Result<Journal> {
        let Train { context, config, dir, .. } = *self.train;
        let started = self.progress.steps;
        let first = started as u64 + 1;
        let mut files = None;
        if self.ranks.is_first() {
            let log = StepLog::resume(dir, first, "tuples", self.bytes)?;
            files = Some((log, JsonLines::resume(&dir.join("throughput.jsonl"), first)?));
        }
        Ok(Journal {
            files,
            bar: context.ui.progress_from("train", started as u64, config.train.max_steps as u64),
            rank_states: self.rank_states()?,
            shown: Instant::now(),
            started: (started, Instant::now()),
            times: Times::default(),
        })
    }

    /// Tells about the step that was just done, and validates after it if it is time.
    fn tell(&mut self, journal: &mut Journal, report: StepReport) -> Result<()> {
        let Train { context, config, .. } = *self.train;
        let (train, done) = (&config.train, self.progress.steps);
        journal.show(done, train, report.loss);
        let tuples = f64::from(done) * train.global_batch_size as f64;
        let mut line = Map::from_iter([
            ("step".into(), json!(done)),
            ("loss".into(), json!(report.loss)),
            ("grad_norm".into(), json!(report.grad_norm)),
            ("learning_rate".into(), json!(train.optimizer().step(done - 1).lr)),
            ("epoch".into(), json!(tuples / self.train.split.training.len() as f64)),
        ]);
        if done.is_multiple_of(train.eval_steps) || done == train.max_steps {
            let validation = self.validate()?;
            line.insert("validation".into(), json!(validation));
            journal.write_throughput(done, train)?;
            let (loss, error) = (report.loss, validation.relative_error);
            context.ui.line(format!("train: step {done}, loss {loss:.4}, validation {error:.4}"));
        }
        journal.write(&line, train.global_batch_size)
    }

    /// All ranks, as rank 0 shows them.
    fn rank_states(&self) -> Result<Vec<RankProgress>> {
        let comm = self.ranks.comm();
        let own = (&comm.place().node, std::process::id());
        let all = comm.all_gather_bytes(&serde_json::to_vec(&own)?)?;
        let state = |(rank, bytes): (usize, &Vec<u8>)| -> Result<RankProgress> {
            let (node, pid) = serde_json::from_slice(bytes)?;
            Ok(RankProgress { rank, node, pid, ..RankProgress::default() })
        };
        all.iter().enumerate().map(state).collect()
    }

    /// The next step; `due` if it is time for a checkpoint.
    fn timed_step(
        &mut self,
        prefetcher: &mut Prefetcher<D, X>,
        due: bool,
        times: &mut Times,
    ) -> Result<(StepReport, GlobalStep)> {
        // What was communicated for other purposes does not count.
        self.ranks.take_seconds();
        let begin = Instant::now();
        let batch = prefetcher.next_step()?;
        let found = self.step(&batch, prefetcher, due)?;
        prefetcher.give_back(batch);
        times.steps += 1;
        times.all += begin.elapsed();
        times.communication += self.ranks.take_seconds();
        times.data += prefetcher.take_seconds();
        let written = found.1.written;
        if self.ranks.is_first() {
            self.checkpoints.complete(written, &self.progress)?;
        }
        Ok(found)
    }

    /// One optimizer step with this rank's tuples.
    fn step(
        &mut self,
        batch: &StagedTuples<D, X>,
        prefetcher: &mut Prefetcher<D, X>,
        due: bool,
    ) -> Result<(StepReport, GlobalStep)> {
        let train = &self.train.config.train;
        let step = self.progress.steps;
        let scale = 1.0 / (train.global_batch_size * self.model.config().teacher_len()) as f64;
        let error = gradients(&mut self.ranks, &self.model, &mut self.trainer, batch, prefetcher, scale)?;
        let squares = self.trainer.sum_squares(self.model.device())?;
        let (asked, written) = (interrupt::stop_requested(), self.checkpoints.written()?);
        let agreed = self.ranks.exchange(LocalStep { error, squares, asked, due, written })?;
        // As a number of the accumulators' type, which clipping computes in.
        if !((agreed.squares as f32).is_finite() && agreed.error.is_finite()) {
            return Err(self.not_finite(batch.into(), scale, agreed)?);
        }
        let optimizer = train.optimizer();
        let (numbers, clip) = (optimizer.step(step), optimizer.max_grad_norm);
        let grad_norm = self.trainer.apply(&mut self.model, numbers, clip, agreed.squares)?;
        self.ranks.gather_values(&mut self.model)?;
        Ok((StepReport { loss: agreed.error * scale, grad_norm }, agreed))
    }

    /// The error about a step whose gradient is not finite, the same on all ranks. Each tries
    /// its tuples one by one, to name the one that is to blame; if none is alone, all are named.
    fn not_finite(
        &mut self,
        tuples: Batch<'_, D, X>,
        scale: f64,
        agreed: GlobalStep,
    ) -> Result<anyhow::Error> {
        let Train { store, config, .. } = *self.train;
        let (step, batch) = (self.progress.steps, config.train.global_batch_size);
        let mut source = self.source()?;
        let mut names = vec![];
        for (row, i) in self.ranks.part(batch).enumerate() {
            let one = tuples.part(self.model.config(), row, row + 1);
            if !self.trainer.is_finite(&self.model, one, scale)? {
                names.push(name(store, &source.parts(step, i)));
            }
        }
        let mut all: Vec<String> = vec![];
        for of_rank in self.ranks.comm().all_gather_bytes(&serde_json::to_vec(&names)?)? {
            all.extend(serde_json::from_slice::<Vec<String>>(&of_rank)?);
        }
        if all.is_empty() {
            all.extend((0..batch).map(|i| name(store, &source.parts(step, i))));
        }
        let what = format!(
            "train: step {}, {} {}: gradient of the model: its norm is {}, the loss {}; nothing was updated",
            step + 1,
            if all.len() == 1 { "tuple" } else { "tuples" },
            all.join(" "),
            agreed.squares.sqrt(),
            agreed.error * scale
        );
        Ok(failed(what, "look at these shadow subsets; or try a smaller train.learning_rate, or other units"))
    }

    /// Validates, and keeps the model if it is the best so far.
    fn validate(&mut self) -> Result<Validation> {
        let Train { split, comm, .. } = *self.train;
        let (source, tuples) = (self.train.source(), &split.validation);
        let found = validate(comm, &self.model, &mut self.generator, source, tuples, &self.mean)?;
        let best = self.progress.best.as_ref().map_or(f64::INFINITY, |best| best.relative_error);
        if found.relative_error < best {
            let step = self.progress.steps;
            let masters = self.ranks.masters_on_first(&self.model, &self.trainer)?;
            let mut files = vec![];
            if self.ranks.is_first() {
                files = serde_json::to_vec(&self.checkpoints.save_best(&self.model, &masters, step)?)?;
            }
            comm.broadcast_bytes(0, &mut files)?;
            let files = serde_json::from_slice(&files).context("checksums of a translator's files")?;
            self.progress.best = Some(Best {
                step,
                relative_error: found.relative_error,
                validation: json!(found).to_string(),
                files,
            });
            self.progress.since_best = 0;
            if self.ranks.is_first() {
                self.checkpoints.remove_other_bests(&self.progress)?;
            }
        } else {
            self.progress.since_best += 1;
        }
        Ok(found)
    }

    /// All steps are done, or validations have not become better for long enough.
    fn has_ended(&self) -> bool {
        let train = &self.train.config.train;
        let patience =
            train.early_stopping_patience > 0 && self.progress.since_best >= train.early_stopping_patience;
        self.progress.steps >= train.max_steps || patience
    }

    /// On rank 0: puts the best translator into its place; returns its step and validation.
    fn result(self) -> Result<(Best, Validation)> {
        let Some(best) = self.progress.best else {
            return Err(failed("train: no validation gave a number", "try a smaller train.learning_rate"));
        };
        self.checkpoints.place_best(&best)?;
        let validation = serde_json::from_str(&best.validation)
            .with_context(|| format!("train: the validation of step {}", best.step))?;
        Ok((best, validation))
    }
}

/// The gradients of a step, summed over ranks, from this rank's tuples. Meanwhile those of the next
/// step go to the device, if they are ready. Returns the sum of squared errors of this rank's.
pub fn gradients<D: Backend<X>, X: Real<Acc = f32>>(
    ranks: &mut DataParallel<'_, D>,
    model: &GradTransformer<D, X>,
    trainer: &mut Trainer<D, X>,
    batch: &StagedTuples<D, X>,
    prefetcher: &mut Prefetcher<D, X>,
    scale: f64,
) -> Result<f64> {
    let error = ranks.gradients(model, trainer, batch, scale)?;
    if let Some(next) = prefetcher.ahead() {
        trainer.load_ahead(model, next)?;
    }
    ranks.finish_gradients(model, trainer)?;
    Ok(error)
}

/// Shows that all ranks have done their part of a step: without any of them it would not be done.
fn show(rank_states: &mut [RankProgress], done: u32, train: &TrainConfig, rate: f64) {
    let share = rate / rank_states.len() as f64;
    for state in rank_states.iter_mut() {
        (state.part, state.unit) = ("train".into(), "tuples".into());
        (state.done, state.total) = (done.into(), train.max_steps.into());
        (state.rate, state.updated) = (share, progress::unix_now());
    }
    if let Some(output) = progress::current() {
        output.set_ranks(rank_states);
    }
}

/// A tuple as people know it: shadow subset and snapshot; if it is a combination of several,
/// all of them.
fn name(store: &TupleStore, parts: &[Tuple]) -> String {
    let names: Vec<String> =
        parts.iter().map(|&(pair, snapshot)| format!("{}/{snapshot}", store.shadow(pair))).collect();
    names.join("+")
}
