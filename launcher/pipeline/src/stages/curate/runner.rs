//! [`GroupRunner`]: what one process does: takes groups from its source and trains them, one after
//! the other, with one base model loaded at a time.

use super::collection::{CHECKPOINTS, Collection, Finished};
use super::job_source::{JobProgress, JobSource, Task, TimeBreakdown};
use anyhow::{Context as _, Result};
use gradtx_kernels::{Backend, Real};
use gradtx_models::decoder::Decoder;
use gradtx_run::context::Context;
use gradtx_run::dispatch::{self, memory_for};
use gradtx_run::record::make_dir;
use gradtx_run::role::Role;
use gradtx_runtime::data::Dataset;
use gradtx_runtime::metrics::Rate;
use gradtx_train::lora::trainer::{Callback, LoraTrainer, Step};
use std::time::Instant;

/// One process's part of the work.
pub struct GroupRunner<'a> {
    /// Where messages go.
    pub context: &'a Context,
    /// What is collected.
    pub collection: &'a Collection,
    /// The examples as each model sees them, where that model has work.
    pub examples: &'a [Option<Dataset>; 2],
    /// Where the work comes from.
    pub source: Box<dyn JobSource + 'a>,
}

impl dispatch::Work for GroupRunner<'_> {
    /// The exit code, if it was asked to stop before everything was done.
    type Output = Option<u8>;

    fn run<X: Real<Acc = f32>, D: Backend<X>>(mut self, device: &D) -> Result<Option<u8>> {
        make_dir(&self.collection.dir.join(CHECKPOINTS))?;
        let mut resident: Option<(Role, Decoder<D, X>)> = None;
        let (mut times, mut unfinished) = (TimeBreakdown::default(), false);
        loop {
            let at = Instant::now();
            let task = self.source.next(resident.as_ref().map(|(role, _)| *role))?;
            times.waiting += at.elapsed();
            let Some(task) = task else { break };
            let role = task.work.side;
            let at = Instant::now();
            let decoder = match resident.take() {
                Some((held, decoder)) if held == role => decoder,
                other => {
                    // Before the next one is loaded: both may not fit.
                    drop(other);
                    self.check::<X, D>(device, &task)?;
                    Decoder::load(device, &self.collection.side(role).dir)?
                }
            };
            times.loading += at.elapsed();
            unfinished = !self.train(&decoder, task, &mut times)?;
            if unfinished {
                break;
            }
            times.groups += 1;
            resident = Some((role, decoder));
        }
        drop(resident);
        self.source.end(unfinished, times)
    }
}

impl GroupRunner<'_> {
    fn training(&self, role: Role) -> (LoraTrainer<'_>, &Dataset) {
        let examples = self.examples[role as usize].as_ref();
        (self.collection.training(role), examples.expect("a model with work has examples"))
    }

    /// Fails if there is not enough memory to train a group of this model.
    fn check<X: Real<Acc = f32>, D: Backend<X>>(&self, device: &D, task: &Task) -> Result<()> {
        let (training, examples) = self.training(task.work.side);
        let name = task.work.side.name();
        let group = self.collection.groups()[task.work.group].clone();
        let (plan, packing) = training.plan::<X, D>(&self.collection.jobs(examples, &group))?;
        plan.check(memory_for(device, &self.context.place)?)?;
        self.context.ui.detail(format!("curate {name}: subsets {group:?} in {packing}"));
        self.context.show_plan(&format!("curate {name}"), &plan);
        Ok(())
    }

    /// Trains a group; false when it was stopped on its way.
    fn train<X: Real<Acc = f32>, D: Backend<X>>(
        &mut self,
        decoder: &Decoder<D, X>,
        task: Task,
        times: &mut TimeBreakdown,
    ) -> Result<bool> {
        let begin = Instant::now();
        let Task { work, claim } = task;
        let collection = self.collection;
        let group = collection.groups()[work.group].clone();
        let examples = self.examples[work.side as usize].as_ref();
        let jobs = collection.jobs(examples.expect("a model with work has examples"), &group);
        let training = collection.training(work.side);
        let rate = Rate { tokens: 0, time: Default::default() };
        let now = JobProgress {
            work,
            jobs: jobs.len(),
            done: 0,
            steps: training.recipe.max_steps,
            rate,
            loss: None,
        };
        let mut told = ReportSteps { source: &mut *self.source, now };
        let checkpoint = collection.checkpoint(work.side, &group);
        let trained = training
            .run(decoder, &jobs, Some(&checkpoint), &mut told)
            .with_context(|| format!("curate {}: subsets {group:?}", work.side.name()))?;
        times.training += begin.elapsed();
        let Some((jobs, rate)) = trained else { return Ok(false) };
        let now = JobProgress { done: now.steps, rate, ..now };
        let begin = Instant::now();
        self.source.deliver(Finished { work, jobs, claim }, &now)?;
        times.delivering += begin.elapsed();
        Ok(true)
    }
}

/// Passes on how far a group is.
struct ReportSteps<'o> {
    source: &'o mut dyn JobSource,
    now: JobProgress,
}

impl Callback for ReportSteps<'_> {
    fn between(&mut self) -> Result<()> {
        self.source.between()
    }

    fn step(&mut self, step: &Step<'_>) -> Result<bool> {
        self.now = JobProgress { done: step.done, rate: step.rate, loss: Some(step.loss()), ..self.now };
        self.source.step(&self.now)
    }
}
