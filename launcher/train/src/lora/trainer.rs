//! Fine-tuning of several adapters of one model at once: what curation and clients share.
//!
//! In: a model, and jobs of examples in an order of their own. Out: for every job its
//! losses and the snapshots of its update. The jobs share the packed streams
//! of an optimizer step; a job's numbers do not depend on which others share it, up to rounding: in the same bits on
//! CPUs and where GPUs multiply with kernels of our own, while cuBLASLt chooses how it adds by the length of the whole
//! stream. The same jobs packed in the same way have the same bits with the same GPU and library, which the record
//! of a stage names.
//! [`Callback`] hears of every step, and may stop the work; [`JobCheckpoint`] keeps what is done so far.

use crate::lora::checkpoint::JobCheckpoint;
use crate::lora::streams::{StepStreams, tokens_of_step};
use crate::model_spec::ModelSpec;
use anyhow::Result;
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::Decoder;
use gradtx_models::lora::MultiLora;
use gradtx_run::config::Recipe;
use gradtx_runtime::metrics::{Rate, TokenMeter};
use gradtx_runtime::plan::MemoryPlan;
use serde_json::{Map, Value, json};
use std::time::Instant;

pub use crate::lora::streams::{Job, Packing};

/// Which steps' updates are kept: `count` of them, `every` steps apart, the last of the last step.
#[derive(Clone, Copy, Debug)]
pub struct Snapshots {
    /// Number of them.
    pub count: usize,
    /// Steps from one to the next.
    pub every: u32,
}

impl Snapshots {
    /// Whether the update after this step (from 0, of `steps`) is kept.
    fn at(&self, step: u32, steps: u32) -> bool {
        let back = steps - 1 - step;
        back.is_multiple_of(self.every) && ((back / self.every) as usize) < self.count
    }
}

/// What came of a job.
#[derive(Clone, Debug, Default)]
pub struct JobResult {
    /// Loss of every optimizer step, averaged as the recipe says.
    pub losses: Vec<f64>,
    /// Norm of the gradient of every optimizer step, before clipping.
    pub grad_norms: Vec<f64>,
    /// Tokens of every optimizer step.
    pub tokens: Vec<u64>,
    /// `[snapshots, L, d]`
    pub updates: Vec<f32>,
}

impl JobResult {
    /// The metrics of a step, counted from 0 and done, for a job of so many examples.
    pub fn line(&self, step: usize, recipe: &Recipe, examples: usize) -> Map<String, Value> {
        let done = step + 1;
        Map::from_iter([
            ("step".into(), json!(done)),
            ("loss".into(), json!(self.losses[step])),
            ("grad_norm".into(), json!(self.grad_norms[step])),
            ("learning_rate".into(), json!(recipe.optimizer().step(step as u32).lr)),
            ("epoch".into(), json!((done * recipe.global_batch_size) as f64 / examples.max(1) as f64)),
            ("tokens".into(), json!(self.tokens[..done].iter().sum::<u64>())),
        ])
    }
}

/// How jobs of one model are trained.
#[derive(Clone, Copy)]
pub struct LoraTrainer<'a> {
    /// The model and its adapters.
    pub side: &'a ModelSpec,
    /// The recipe of every job.
    pub recipe: &'a Recipe,
    /// What is kept.
    pub snapshots: Snapshots,
    /// Most tokens of one packed stream.
    pub stream_tokens: usize,
}

/// Who hears how far a training is.
pub trait Callback {
    /// Between the streams of a step: time to look after other things for a moment.
    fn between(&mut self) -> Result<()> {
        Ok(())
    }

    /// After an optimizer step. Whether to continue.
    fn step(&mut self, step: &Step<'_>) -> Result<bool>;
}

/// An optimizer step that was just done.
pub struct Step<'a> {
    /// Steps that are done.
    pub done: u32,
    /// What came of every job so far.
    pub jobs: &'a [JobResult],
    /// Tokens since this process began, and their time.
    pub rate: Rate,
}

impl Step<'_> {
    /// Mean of the jobs' losses.
    pub fn loss(&self) -> f64 {
        let last = self.jobs.iter().filter_map(|job| job.losses.last());
        last.sum::<f64>() / self.jobs.len().max(1) as f64
    }
}

impl LoraTrainer<'_> {
    /// The base model and every buffer of training these jobs together, and how well their
    /// streams are filled.
    pub fn plan<X: Real<Acc = f32>, D: Backend<X>>(&self, jobs: &[Job<'_>]) -> Result<(MemoryPlan, Packing)> {
        let streams = self.streams();
        let packing = streams.packing(&mut streams.orders(jobs)?, jobs);
        let mut plan = Decoder::<D, X>::plan(&self.side.model, false);
        plan.extend(MultiLora::<D, X>::plan(
            &self.side.model,
            &self.side.layout,
            jobs.len(),
            packing.capacity,
        ));
        Ok((plan, packing))
    }

    /// Tokens of all steps of these jobs.
    pub fn tokens(&self, jobs: &[Job<'_>]) -> Result<u64> {
        self.streams().tokens(jobs)
    }

    /// Trains jobs together, and returns what came of them and how fast it went; nothing when
    /// the callback stopped it. Begins with what `checkpoint` has, and leaves there what is done
    /// so far: now and then, and when it is stopped.
    pub fn run<X: Real<Acc = f32>, D: Backend<X>>(
        &self,
        decoder: &Decoder<D, X>,
        jobs: &[Job<'_>],
        checkpoint: Option<&JobCheckpoint>,
        callback: &mut dyn Callback,
    ) -> Result<Option<(Vec<JobResult>, Rate)>> {
        let streams = self.streams();
        let mut orders = streams.orders(jobs)?;
        let capacity = streams.packing(&mut orders, jobs).capacity;
        let (layout, init) = (&self.side.layout, &self.side.init);
        let mut adapters = MultiLora::new(decoder, layout, jobs.len(), init, capacity)?;
        let mut trained = vec![JobResult::default(); jobs.len()];
        let (steps, optimizer) = (self.recipe.max_steps, self.recipe.optimizer());
        let started = match checkpoint {
            Some(checkpoint) => checkpoint.restore(decoder.device(), &mut adapters, &mut trained)?,
            None => 0,
        };
        let (mut meter, mut saved) = (TokenMeter::start(), Instant::now());
        for step in started..steps {
            let mut losses = vec![0.0; jobs.len()];
            for stream in streams.of_step(&mut orders, jobs, step) {
                let part = adapters.accumulate(decoder, &stream)?;
                meter.add(stream.len());
                losses.iter_mut().zip(part).for_each(|(sum, loss)| *sum += loss);
                callback.between()?;
            }
            let norms = adapters.apply(optimizer.step(step), optimizer.max_grad_norm)?;
            let tokens = tokens_of_step(&mut orders, jobs, step);
            trained.iter_mut().zip(tokens).for_each(|(result, tokens)| result.tokens.push(tokens));
            for (job, (result, (loss, norm))) in
                trained.iter_mut().zip(losses.into_iter().zip(norms)).enumerate()
            {
                result.losses.push(loss);
                result.grad_norms.push(norm);
                if self.snapshots.at(step, steps) {
                    result.updates.extend(adapters.update(job)?);
                }
            }
            let done = step + 1;
            let continues = callback.step(&Step { done, jobs: &trained, rate: meter.total() })?;
            let due = |checkpoint: &&JobCheckpoint| !continues || saved.elapsed() >= checkpoint.every;
            if let Some(checkpoint) = checkpoint.filter(due).filter(|_| done < steps) {
                checkpoint.save(decoder.device(), &mut adapters, done, &trained)?;
                saved = Instant::now();
            }
            if !continues && done < steps {
                return Ok(None);
            }
        }
        Ok(Some((trained, meter.total())))
    }

    fn streams(&self) -> StepStreams<'_> {
        StepStreams { recipe: self.recipe, stream_tokens: self.stream_tokens }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_metrics_has_what_a_run_is_watched_by() {
        let recipe = Recipe {
            max_steps: 2,
            global_batch_size: 4,
            warmup_steps: 2,
            learning_rate: 0.5,
            ..Recipe::default()
        };
        let trained = JobResult {
            losses: vec![2.0, 1.0],
            grad_norms: vec![0.25, 0.125],
            tokens: vec![40, 44],
            ..JobResult::default()
        };
        let lines = [0, 1].map(|step| Value::Object(trained.line(step, &recipe, 16)));
        let first = json!({ "step": 1, "loss": 2.0, "grad_norm": 0.25, "learning_rate": recipe.optimizer().step(0).lr,
            "epoch": 0.25, "tokens": 40 });
        assert_eq!(lines[0], first);
        assert_eq!((&lines[1]["tokens"], &lines[1]["epoch"]), (&json!(84), &json!(0.5)));
        assert_ne!(recipe.optimizer().step(0).lr, recipe.optimizer().step(1).lr);
    }

    #[test]
    fn snapshots_end_with_the_last_step() {
        let kept = |count, every| {
            let snapshots = Snapshots { count, every };
            (0..10).filter(|&step| snapshots.at(step, 10)).collect::<Vec<u32>>()
        };
        assert_eq!(kept(3, 2), [5, 7, 9]);
        assert_eq!(kept(1, 4), [9]);
        assert_eq!(kept(10, 1), (0..10).collect::<Vec<_>>());
    }
}
